"""What a scan is: declared, read from its voxels by robust shares, or taken from its set; and what is said of a set."""

import warnings
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from mim3d.caching.build import build_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.set_modality import require_one_kind
from mim3d.core.errors import DataError
from mim3d.datasets.cases import read_cases
from mim3d.planning.plan import plan_intensity
from mim3d.scans.modality import decide, modality_name, modality_of_channels, sign_of

SHAPE = (40, 40, 32)


def body(air, tissue, lesion, noise=10.0, seed=0):
    """Air around a box of tissue with a brighter box in it."""
    rng = np.random.default_rng(seed)
    array = np.full(SHAPE, float(air))
    array[6:34, 6:34, 4:28] = tissue
    array[14:26, 14:26, 10:20] = lesion
    array[6:34, 6:34, 4:28] += rng.normal(0, noise, (28, 28, 24))
    return np.rint(array).astype(np.int16)


def ct(seed=0):
    return body(-1024, 40, 100, seed=seed)


def mri(seed=0):
    return body(0, 600, 1800, 15.0, seed=seed)


def overshoot():
    """An MRI with three voxels below -200."""
    array = mri()
    array[5, 6, 4] = array[34, 20, 20] = array[5, 30, 20] = -250
    return array


def crop():
    """A CT of soft tissue alone."""
    return np.rint(np.random.default_rng(1).normal(50, 30, SHAPE)).astype(np.int16)


def padded(value):
    array = ct()
    array[:4] = value
    return array


def with_metal(share):
    array = ct()
    array.ravel()[: int(share * array.size)] = 20000
    return array


def resampled_padding():
    """A CT in a field of view of its own, as linear and cubic resampling leave its edge."""
    array = ct().astype(np.float32)
    array[:4], array[4], array[5] = -3024.0, -2900.0, np.linspace(-2400, -1200, 32)
    return array


def cached(folder, scans, intensities="8-bit", **declared):
    """The cache of a set of scans, by name."""
    (folder / "data").mkdir(exist_ok=True, parents=True)
    for name, array in scans.items():
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "data" / f"{name}.nii.gz")
    found = read_cases(folder / "data")
    cases = tuple(replace(case, modality=declared.get(case.id)) for case in found.cases)
    return build_cache(replace(found, cases=cases), folder / "cache", Preprocessing(intensities=intensities))


def modality_of(cache, name):
    return next(scan for scan in cache if scan.case.id == name).modalities[0]


@pytest.mark.parametrize(
    ("array", "sign"),
    [
        (ct(), "HU"),
        (padded(-2000), "HU"),
        (padded(-3024), "HU"),
        (ct().astype(np.float32) + 0.25, "HU"),
        (mri(), "unlike"),
        (overshoot(), "unlike"),
        (body(-32000, -5000, 20000, 300), "outside"),
        (crop(), "unknown"),
        ((ct() + 1024).astype(np.uint16), "HU + 1024"),
        ((ct().clip(-175, 250) + 175) / 425, "outside"),
        (np.zeros(SHAPE), "outside"),
        (np.full(SHAPE, -1000), "HU"),
        (with_metal(0.02), "HU"),
        (with_metal(0.2), "outside"),
        (resampled_padding(), "HU"),
        (np.where(padded(-2000) == -2000, -2000, ct() + 1024), "HU + 1024"),
        (np.rint((body(-900, 40, 1100).clip(-1000, 1000) + 1000) / 2000 * 255), "outside"),
        (body(0, 700, 1300, 300.0), "unlike"),
        (crop() * 4.0 - 150, "unknown"),
    ],
)
def test_voxels_are_judged_by_shares_never_by_the_darkest(array, sign):
    assert sign_of(array) == sign


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("CT", "CT"),
        ("0: MRI", "MR"),
        ("computed tomography", "CT"),
        ("Magnetic Resonance", "MR"),
        ("T1w", "MR"),
        ("PET_images_STS_003", "PT"),
        ("liver", None),
        ("PET-CT", None),
    ],
)
def test_words_name_modalities(text, name):
    assert modality_name(text) == name


def test_one_declaration_serves_all_channels_or_each_its_own():
    assert modality_of_channels("CT", 2) == ["CT", "CT"]
    assert modality_of_channels("CT; suv", 2) == ["CT", "PT"]
    assert modality_of_channels(None, 2) == modality_of_channels("venous phase", 2) == [None, None]
    assert modality_of_channels("FLAIR;prior;us", 3) == ["MR", None, "US"]


def test_declarations_win_over_voxels_but_for_what_cannot_be_hu():
    assert decide("unlike", declared="CT").in_hu
    assert decide("unlike", declared="CT").is_unlike_ct and not decide("unknown", declared="CT").is_unlike_ct
    assert not decide("HU", declared="MR").in_hu and decide("HU", declared="MR").is_like_ct
    assert not decide("outside", declared="CT").in_hu and not decide("HU + 1024", header="CT").in_hu
    assert decide("unlike", header="MR").by == "header"


def test_an_mri_with_overshoot_keeps_its_contrast(tmp_path):
    cache = cached(tmp_path, {"a": mri(), "b": overshoot()})
    for scan in cache:
        values = scan.to_values(scan.read((0, 0, 0), scan.shape))
        assert values[0, 20, 20, 15] > 1700 and 500 < values[0, 8, 8, 6] < 700
    assert cache.remarks == () and plan_intensity(cache).kind == "zscore"


def test_a_crop_without_air_follows_its_set_and_that_is_said(tmp_path):
    cache = cached(tmp_path, {"a": ct(), "b": ct(1), "c": crop()})
    assert [modality_of(cache, name).by for name in "abc"] == ["voxels", "voxels", "set"]
    assert all(scan.modalities[0].in_hu for scan in cache)
    (remark,) = cache.remarks
    assert "1 of 3 scans shows no air" in remark.text and remark.text.endswith("c.") and not remark.refused
    # A second build finds everything as it is.
    stamps = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cache/cases").rglob("card.json"))
    again = build_cache(read_cases(tmp_path / "data"), tmp_path / "cache", Preprocessing(intensities="8-bit"))
    assert again.digest == cache.digest and again.remarks == cache.remarks
    assert stamps == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cache/cases").rglob("card.json"))


def test_crops_of_a_set_without_air_are_left_alone(tmp_path):
    cache = cached(tmp_path, {"a": crop(), "b": crop()[:, :20]})
    assert not any(scan.modalities[0].in_hu for scan in cache) and cache.remarks == ()


@pytest.mark.parametrize("pack_gb", [None, 1.0])
def test_a_packed_cache_is_settled_alike(tmp_path, pack_gb):
    cached(tmp_path, {"a": ct(), "b": ct(1), "c": crop()})
    found = read_cases(tmp_path / "data")
    for _ in range(2):
        made = build_cache(found, tmp_path / "packed", Preprocessing(intensities="8-bit"), pack_gb=pack_gb)
        assert modality_of(made, "c").by == "set"


def test_a_ct_with_1024_added_is_named(tmp_path):
    scans = {f"ct{place}": ct(place) for place in range(4)} | {"odd": (ct(9) + 1024).astype(np.uint16)}
    cache = cached(tmp_path, scans)
    (remark,) = cache.remarks
    assert remark.refused and "odd (darkest voxel 0 where the CT have -1024: not in HU" in remark.text
    assert not modality_of(cache, "odd").in_hu


def test_a_whole_set_with_1024_added_is_named(tmp_path):
    cache = cached(tmp_path, {f"ct{place}": (ct(place) + 1024).astype(np.uint16) for place in range(3)})
    (remark,) = cache.remarks
    assert remark.refused and remark.text.startswith("3 scans: 3 CT not in HU; ct0, ct1, ct2 (darkest voxel 0: not")
    assert plan_intensity(cache).kind == "zscore"


def test_an_mri_declared_as_ct_is_named_and_taken_as_declared(tmp_path):
    cache = cached(tmp_path, {"a": ct(), "b": ct(1), "c": mri(), "d": crop()}, **dict.fromkeys("abcd", "CT"))
    (remark,) = cache.remarks
    assert remark.refused and "1 of 4 scans shows neither air nor tissue" in remark.text
    assert "though declared as CT: c (darkest voxel 0)" in remark.text and modality_of(cache, "c").in_hu
    # All of them may be what lies within a mask.
    (remark,) = cached(tmp_path / "all", {"a": mri()}, a="CT").remarks
    assert not remark.refused


def test_mixed_kinds_are_counted_and_refused_unless_declared(tmp_path):
    scans = {"CT_1": ct(), "CT_2": ct(1), "MR_1": mri(), "MR_2": mri(1), "PET_1": body(0, 3, 20, 1)}
    (remark,) = cached(tmp_path, scans).remarks
    assert remark.refused and "2 CT, 2 MR, 1 PT" in remark.text
    declared = cached(tmp_path, scans, CT_1="CT", CT_2="CT", MR_1="MR", MR_2="T1", PET_1="PET")
    (remark,) = declared.remarks
    assert not remark.refused and "2 CT, 2 MR, 1 PT" in remark.text
    assert modality_of(declared, "MR_2").name == "MR" and modality_of(declared, "MR_2").by == "declared"


def test_strict_refuses_a_mixed_set_before_any_work(tmp_path):
    scans = {f"a{place:02d}": ct(place) for place in range(20)} | {"b": mri(), "c": mri(1)}
    for name, array in scans.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "data" / f"{name}.nii.gz")
    found = read_cases(tmp_path / "data")
    with pytest.raises(DataError, match=r"different kinds: 10 CT, 1 not CT.* 11 of 22 scans were looked at, and noth"):
        require_one_kind(found)
    kinds = ["CT" if case.id.startswith("a") else "MR" for case in found.cases]
    declared = [replace(case, modality=kind) for case, kind in zip(found.cases, kinds, strict=True)]
    require_one_kind(replace(found, cases=tuple(declared)))
    # One that is declared otherwise is looked at wherever it lies.
    odd = [replace(case, modality="MR" if case.id == "a01" else "CT") for case in found.cases]
    with pytest.raises(DataError, match="like CT; a01"):
        require_one_kind(replace(found, cases=tuple(odd[:20])))


def test_a_declaration_made_later_makes_the_scan_again(tmp_path):
    first = cached(tmp_path, {"a": overshoot(), "b": ct()})
    later = cached(tmp_path, {}, a="MR", b="MR")
    assert modality_of(first, "b").in_hu and not modality_of(later, "b").in_hu
    assert "like CT" in later.remarks[0].text


def test_plain_sets_say_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = cached(tmp_path, {"a": ct(), "b": ct(1)}, intensities="lossless")
    assert cache.remarks == () and plan_intensity(cache).kind == "window"
