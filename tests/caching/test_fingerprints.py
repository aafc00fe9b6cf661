"""A fingerprint finds a scan again whatever was done to its file, and takes no other scan for it."""

import functools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from mim3d.caching.fingerprints import CELLS, Fingerprint, ScanIdentity, distances, find_leaks, fingerprint_of
from mim3d.caching.resampling import plan_resampling, resample_linear, target_grid
from mim3d.core.errors import DataError
from mim3d.phantoms.body import make_phantom
from mim3d.scans.volumes import read_volume


@functools.cache
def phantom(seed):
    """Voxels, spacing and affine of a phantom."""
    made = make_phantom((0, 0, seed), (64, 64, 56))
    return made.image, made.spacing_mm, made.affine


@functools.cache
def real(path):
    """Voxels, spacing and affine of a scan on disk."""
    volume = read_volume(path)
    return volume.array, volume.spacing_mm, volume.affine


def is_same_scan(first, second):
    """Whether two fingerprints are those of one scan."""
    return bool(distances([(first, second)])[0] <= 1)


def resampled(scan, spacing_mm):
    image, have_mm, affine = scan
    shape, got_mm, new = target_grid(image.shape, affine, have_mm, spacing_mm)
    return resample_linear(image, plan_resampling(image.shape, have_mm, shape, got_mm)), got_mm, new


def cropped(scan, start, end):
    image, spacing_mm, affine = scan
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ np.array(start)
    box = tuple(slice(first, size - last) for first, last, size in zip(start, end, image.shape, strict=True))
    return image[box], spacing_mm, moved


def in_8_bits(scan, low, high):
    image, spacing_mm, affine = scan
    ratio = np.clip((image.astype(np.float32) - low) / (high - low), 0, 1)
    return np.rint(255 * ratio).astype(np.uint8), spacing_mm, affine


def without_place(scan):
    image, spacing_mm, _ = scan
    return image, spacing_mm, np.diag([*spacing_mm, 1.0])


def mapped(scan, function):
    return (function(scan[0]), *scan[1:])


CHANGES = {
    "1.5 mm": lambda scan: resampled(scan, (1.5, 1.5, 1.5)),
    "4 mm": lambda scan: resampled(scan, (4.0, 4.0, 4.0)),
    "thick slices": lambda scan: resampled(scan, (1.5, 1.5, 4.0)),
    "scaled and shifted": lambda scan: mapped(scan, lambda image: image * np.float32(0.4) + 1200),
    "place lost": without_place,
    "borders off": lambda scan: cropped(scan, (2, 2, 2), (2, 2, 2)),
    "slices off": lambda scan: cropped(scan, (0, 0, 3), (0, 0, 0)),
    "slices off, place lost": lambda scan: without_place(cropped(scan, (0, 0, 2), (0, 0, 0))),
}

WINDOWS = {
    "clipped to the wide window": lambda scan: mapped(scan, lambda image: np.clip(image, -1000, 1000)),
    "clipped to the narrow window": lambda scan: mapped(scan, lambda image: np.clip(image, -175, 250)),
    "8 bits of the wide window": lambda scan: in_8_bits(scan, -1000, 1000),
    "8 bits of the narrow window": lambda scan: in_8_bits(scan, -175, 250),
    "8 bits, 3 mm": lambda scan: in_8_bits(resampled(scan, (3.0, 3.0, 3.0)), -175, 250),
}


@pytest.mark.parametrize("change", CHANGES | WINDOWS)
def test_a_ct_is_found_again(change):
    scan = phantom(0)
    assert is_same_scan(fingerprint_of(*scan), fingerprint_of(*(CHANGES | WINDOWS)[change](scan)))


@pytest.mark.parametrize("change", CHANGES | WINDOWS)
def test_a_real_ct_is_found_again(change, shared_data):
    for name in ("001", "005", "051"):
        scan = real(str(shared_data / f"sts_ct/images/STS_{name}.nii.gz"))
        assert is_same_scan(fingerprint_of(*scan), fingerprint_of(*(CHANGES | WINDOWS)[change](scan))), name


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("4 mm", "slices off, place lost")])
def test_a_small_crop_of_mri_is_found_again(change, shared_data):
    for path in sorted((shared_data / "hippocampus/imagesTr").glob("*.nii.gz"))[:8]:
        scan = real(str(path))
        assert is_same_scan(fingerprint_of(*scan), fingerprint_of(*CHANGES[change](scan))), path.name


@pytest.mark.parametrize("change", CHANGES)
def test_other_phantoms_are_told_apart(change):
    changed = fingerprint_of(*CHANGES[change](phantom(0)))
    others = [fingerprint_of(*phantom(seed)) for seed in range(1, 8)]
    assert distances([(changed, other) for other in others]).min() > 1


@pytest.mark.parametrize("folder", ["sts_ct/images", "hippocampus/imagesTr"])
def test_other_patients_are_told_apart(folder, shared_data):
    paths = sorted((shared_data / folder).glob("*.nii.gz"))
    entries = [ScanIdentity(id=p.name, digest=p.name, fingerprint=fingerprint_of(*real(str(p)))) for p in paths]
    assert [leak for at, entry in enumerate(entries) for leak in find_leaks(entries[:at], [entry])] == []


def test_a_dicom_series_and_the_nifti_made_from_it_are_one_scan(shared_data):
    series = fingerprint_of(*real(str(shared_data / "dicom/sts002_ct_rtstruct/image")))
    converted = shared_data / "sts_ct/images/STS_002.nii.gz"
    other = shared_data / "sts_ct/images/STS_001.nii.gz"
    assert is_same_scan(series, fingerprint_of(*real(str(converted))))
    assert not is_same_scan(series, fingerprint_of(*real(str(other))))


def test_a_ct_saved_under_another_affine_is_one_scan(shared_data):
    folder = shared_data / "formats/cip"
    first, second = (real(str(folder / name)) for name in ("ct-64.nrrd", "ct-64-transformed.nrrd"))
    assert is_same_scan(fingerprint_of(*first), fingerprint_of(*second))


@pytest.mark.parametrize("value", [0, -1000, 7.1])
def test_a_scan_that_shows_nothing_is_no_scan_at_all_for_others(value):
    flat = fingerprint_of(np.full((20, 20, 20), value, np.float32), (1.0, 1.0, 1.0), np.eye(4))
    assert not is_same_scan(flat, flat)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 300, 2), (97, 193, 11), (1000, 3, 96)])
def test_any_shape_has_a_fingerprint_that_survives_being_written(shape):
    image = np.random.default_rng(0).normal(0, 400, shape).astype(np.int16)
    made = fingerprint_of(image, (1.0, 1.0, 1.0), np.eye(4))
    text = made.to_text()
    again = Fingerprint.from_text(json.loads(json.dumps(text)))
    assert len(text) < 2800
    assert np.array_equal(again.cells, made.cells)
    assert np.array_equal(again.extent_mm, made.extent_mm)
    assert np.array_equal(again.centre_mm, made.centre_mm)


def test_cells_are_means_of_equal_parts():
    image = np.repeat(np.arange(10.0), 10)[:, None, None] * np.ones((1, 20, 30))
    cells = fingerprint_of(image, (1.0, 1.0, 1.0), np.eye(4)).cells
    assert np.array_equal(cells[0, :, 3, 4], np.rint(np.arange(CELLS) * 255 / (CELLS - 1)).astype(np.uint8))


@pytest.mark.parametrize("text", ["", "no base64!", "QUJD", "A" * 1400])
def test_what_is_no_fingerprint_is_refused(text):
    with pytest.raises(DataError, match="no fingerprint"):
        Fingerprint.from_text(text)


def test_a_fingerprint_of_a_large_scan_is_cheap():
    image = np.zeros((512, 512, 200), dtype=np.int16)
    image[100:400, 100:400, 20:180] = 1000
    start = time.perf_counter()
    fingerprint_of(image, (0.7, 0.7, 1.5), np.eye(4))
    assert time.perf_counter() - start < 1


def noise_entries(number, seed):
    """Entries of one size and random content."""
    rng = np.random.default_rng(seed)
    place = {"extent_mm": np.full(3, 300, np.float32), "centre_mm": np.zeros(3, np.float32)}
    cells = rng.integers(0, 256, (number, 1, CELLS, CELLS, CELLS), dtype=np.uint8)
    return [
        ScanIdentity(id=f"{seed}-{at}", digest=f"{seed}-{at}", fingerprint=Fingerprint(cells=item, **place))
        for at, item in enumerate(cells)
    ]


def test_the_same_content_and_the_same_look_are_found_under_other_names():
    training, others = noise_entries(40, 1), noise_entries(10, 2)
    copied = ScanIdentity(id="copied", digest=training[7].digest, fingerprint=training[7].fingerprint)
    converted = ScanIdentity(id="converted", digest="new", fingerprint=training[30].fingerprint)
    leaks = find_leaks(training, [*others, copied, converted])
    assert [(leak.training, leak.held_out, leak.how) for leak in leaks] == [
        ("1-7", "copied", "identical"),
        ("1-30", "converted", "the same scan, converted"),
    ]
    assert find_leaks(training, others) == find_leaks([], others) == find_leaks(training, []) == []


def test_ten_thousand_scans_are_searched_in_little_memory_and_time():
    training, others = noise_entries(10_000, 1), noise_entries(100, 2)
    start = time.perf_counter()
    assert find_leaks(training, others) == []
    assert time.perf_counter() - start < 10


def test_fingerprints_need_no_torch():
    # A build computes them in many small processes.
    code = "import sys, mim3d.caching.fingerprints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
