"""A network's card knows what it learned from; prediction warns of scans far outside, never of those of training."""

import nibabel as nib
import numpy as np
import pytest

from mim3d.caching.build import build_cache
from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.core.settings import build_settings, to_mapping
from mim3d.datasets.cases import Case, read_cases
from mim3d.inference.input_range import InputRange


def ct(seed=0, offset=0):
    rng = np.random.default_rng(seed)
    array = np.full((24, 24, 20), -1024.0)
    array[4:20, 4:20, 3:17] = rng.normal(50, 20, (16, 16, 14))
    return (np.rint(array) + offset).astype(np.int16)


def mri(seed=0, scale=1.0):
    return np.abs(np.random.default_rng(seed).normal(300, 120, (24, 24, 20)) * scale).astype(np.float32)


def saved(folder, name, array, spacing_mm=(1.0, 1.0, 1.0)):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(array, np.diag([*spacing_mm, 1.0])), path)
    return str(path)


def range_of(folder, arrays, spacing_mm=None):
    for place, array in enumerate(arrays):
        saved(folder / "data", f"scan{place}", array)
    preprocessing = Preprocessing(intensities="lossless", spacing_mm=spacing_mm)
    cache = build_cache(read_cases(folder / "data"), folder / "cache", preprocessing)
    known = InputRange.of(cache.scans)
    # As it comes back from a card.
    return build_settings(InputRange, to_mapping(known), "input_range")


def said_of(known, folder, array, to_mm=None, **options):
    path = saved(folder / "new", "new", array, options.pop("spacing_mm", (1.0, 1.0, 1.0)))
    in_hu = [channel.in_hu for channel in known.channels]
    preprocessing = Preprocessing(spacing_mm=to_mm)
    return known.warnings_on(prepare(Case(images=(path,), **options), preprocessing, set_in_hu=in_hu))


@pytest.fixture
def of_ct(tmp_path):
    return range_of(tmp_path, [ct(seed) for seed in range(3)])


def test_scans_of_the_kind_of_training_get_no_warning(of_ct, tmp_path):
    assert of_ct.channels[0].modality == "CT" and of_ct.channels[0].has_air
    assert said_of(of_ct, tmp_path, ct()) == said_of(of_ct, tmp_path, ct(9)) == []
    assert said_of(of_ct, tmp_path, ct(9), spacing_mm=(1.5, 1.5, 1.9)) == []


def test_a_scan_that_differs_from_its_set_widens_no_range(tmp_path):
    known = range_of(tmp_path, [ct(seed) for seed in range(4)] + [ct(9, offset=1024), mri(scale=30)])
    assert known.channels[0].has_air and known.channels[0].high[1] < 200


@pytest.mark.parametrize("scale", [0.2, 1.0, 1000.0])
def test_an_mri_given_to_a_network_of_ct_is_told(of_ct, tmp_path, scale):
    (text,) = said_of(of_ct, tmp_path, mri(scale=scale))
    assert "the network learned from CT" in text


def test_what_is_declared_wrong_or_stored_wrong_is_told(of_ct, tmp_path):
    assert "is not in HU" in said_of(of_ct, tmp_path, ct(), modality="MR")[0]
    assert "is not in HU" in said_of(of_ct, tmp_path, ct(offset=1024))[0]


def test_other_voxel_sizes_are_told(of_ct, tmp_path):
    (text,) = said_of(of_ct, tmp_path, ct(), spacing_mm=(1.0, 1.0, 6.0))
    assert "its voxels of 1 x 1 x 6 mm" in text


def test_voxel_sizes_are_those_of_files_where_scans_are_resampled(tmp_path):
    known = range_of(tmp_path, [ct(seed) for seed in range(2)], spacing_mm=(2.0, 2.0, 2.0))
    assert known.source_spacing_mm == ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    assert said_of(known, tmp_path, ct(9), to_mm=(2.0, 2.0, 2.0)) == []
    (text,) = said_of(known, tmp_path, ct(9), to_mm=(2.0, 2.0, 2.0), spacing_mm=(1.0, 1.0, 10.0))
    assert "its voxels of 1 x 1 x 10 mm lie far from those of training (1 x 1 x 1 to 1 x 1 x 1 mm)" in text


def test_a_network_of_mri_takes_mri_of_any_scale_and_tells_ct(tmp_path):
    known = range_of(tmp_path, [mri(seed) for seed in range(3)])
    assert said_of(known, tmp_path, mri(9, scale=50.0)) == []
    assert "this scan is CT" in said_of(known, tmp_path, ct())[0]
