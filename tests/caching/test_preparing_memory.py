"""A scan is prepared and stored in little more memory than its voxels take, whatever is asked of it."""

import gzip
import json
import math
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from mim3d.core.resources import peak_memory_bytes

#: Prepares a case and stores it in a process of its own; tells the memory held before and the most held.
SCRIPT = """
import json, sys
import google_crc32c, nibabel, numcodecs, scipy.ndimage, SimpleITK
from mim3d.datasets.cases import Case
from mim3d.caching.foreground import class_counts_of, class_locations_of
from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.caching.shards import write_array
from mim3d.caching.stored_voxels import Shown, write_image
from mim3d.caching.stored_voxels import to_stored
from mim3d.core.resources import peak_memory_bytes

image, label, out, intensities, spacing_mm = json.loads(sys.argv[1])
before = peak_memory_bytes()
case = Case(id="a", images=(image,), label=label, patient="a")
prepared = prepare(case, Preprocessing(spacing_mm=spacing_mm and tuple(spacing_mm)))
stored, lines = to_stored(prepared.image, prepared.statistics, intensities, (-1000.0, 1000.0), [True])
write_image(out + "/image", stored, lines, 3, [Shown(-1000, 1000, -1000)] * len(lines))
if label:
    write_array(out + "/label", prepared.label)
    class_locations_of(prepared.label, class_counts_of(prepared.label))
print(json.dumps([before, peak_memory_bytes()]))
"""


def written(path, planes, num_planes, dtype):
    """A NIfTI file of the same few planes over and over, written without holding it."""
    header = nib.Nifti1Header()
    header.set_data_shape((*planes[0].shape, num_planes))
    header.set_data_dtype(dtype)
    header["pixdim"][1:4] = 1.0
    header.set_sform(np.diag([-1.0, -1.0, 1.0, 1.0]), code=1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as stream:
        stream.write(header.binaryblock + bytes(4))
        for place in range(num_planes):
            stream.write(planes[place % len(planes)].astype(dtype).tobytes(order="F"))
    return str(path)


def peak_of(folder, shape, suffix, dtype, intensities, with_label, spacing_mm):
    """Bytes held before, and at most, by a process that prepares and stores a noisy CT of a shape."""
    if peak_memory_bytes() is None:
        pytest.skip("this system does not tell the memory of a process")
    rng = np.random.default_rng(0)
    planes = [rng.normal(-1000, 10, shape[:2]) for _ in range(3)]
    for plane in planes:
        plane[shape[0] // 4 : -shape[0] // 4, shape[1] // 4 : -shape[1] // 4] += 1040
    image = written(folder / f"image{suffix}", planes, shape[2], dtype)
    label = None
    if with_label:
        label = written(folder / f"label{suffix}", [(plane > 0) * 3 for plane in planes], shape[2], dtype)
    told = json.dumps([image, label, str(folder), intensities, spacing_mm])
    done = subprocess.run([sys.executable, "-c", SCRIPT, told], capture_output=True, text=True, check=True)
    before, most = json.loads(done.stdout)
    return before, most


CASES = [
    (".nii.gz", np.int16, "8-bit", False, None),
    (".nii", np.int16, "lossless", True, None),
    (".nii", np.uint16, "lossless", True, None),
    (".nii.gz", np.int16, "lossless", True, (1.01, 0.99, 0.97)),
    (".nii", np.float32, "8-bit", False, None),
]


@pytest.mark.parametrize(("suffix", "dtype", "intensities", "with_label", "spacing_mm"), CASES)
def test_peak_memory_is_a_small_multiple_of_the_voxels(tmp_path, suffix, dtype, intensities, with_label, spacing_mm):
    shape = (256, 256, 384)
    voxels_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    before, most = peak_of(tmp_path, shape, suffix, dtype, intensities, with_label, spacing_mm)
    # What is read and what is made of it, or what is made and the numbers to store.
    held = 2.0 if spacing_mm is not None else 1.5
    assert most - before < held * voxels_bytes + 64 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "dtype", "intensities", "with_label", "spacing_mm"), CASES[:4])
def test_a_scan_of_one_and_a_half_gib_fits_a_worker_of_four(
    tmp_path, suffix, dtype, intensities, with_label, spacing_mm
):
    _, most = peak_of(tmp_path, (1024, 1024, 768), suffix, dtype, intensities, with_label, spacing_mm)
    assert most < 4 * 2**30
