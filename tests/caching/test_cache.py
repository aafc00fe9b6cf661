"""The cache gives back what was prepared, crop by crop, and never something stale."""

import csv
import json
import os
import pickle
import shutil
import warnings

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mim3d.caching.build import build_cache
from mim3d.caching.cache import is_cache, open_cache
from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.caching.stored_voxels import Shown, levels_of
from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import read_cases
from mim3d.datasets.splits import split_cases
from tests.nifti import affine_of, noise, write_nifti


def make_set(folder, num_cases=3, shape=(40, 36, 9)):
    """A labelled folder of CT-like scans, two classes."""
    for index in range(num_cases):
        array = noise(shape, seed=index)
        write_nifti(folder / "images" / f"c{index}.nii.gz", array)
        label = (array > 0).astype(np.uint8)
        label[:20] *= 2
        write_nifti(folder / "labels" / f"c{index}.nii.gz", label)
    return folder


def built(data, out, num_workers=0, pack_gb=None, **settings):
    """Cache of a data set."""
    return build_cache(read_cases(data), out, Preprocessing(**settings), num_workers=num_workers, pack_gb=pack_gb)


def tree(folder):
    """Every file below a folder and its bytes."""
    return {
        os.path.relpath(os.path.join(path, name), folder): open(os.path.join(path, name), "rb").read()
        for path, _, names in os.walk(folder)
        for name in names
    }


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A small labelled data set and its cache."""
    folder = tmp_path_factory.mktemp("cached")
    data = make_set(folder / "data")
    return data, built(data, folder / "cache")


def test_a_whole_read_equals_the_prepared_case(cached):
    data, cache = cached
    for case, scan in zip(read_cases(data).cases, cache, strict=True):
        prepared = prepare(case, Preprocessing())
        assert scan.case == case
        assert scan.shape == prepared.image.shape[1:]
        assert scan.statistics == prepared.statistics
        image = scan.read((0, 0, 0), scan.shape)
        assert image.dtype == prepared.image.dtype == np.int16
        np.testing.assert_array_equal(image, prepared.image)
        np.testing.assert_array_equal(scan.read_label((0, 0, 0), scan.shape), prepared.label)
        np.testing.assert_array_equal(scan.affine, prepared.affine)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_scan_leaves_open_is_said_once_and_stored_whoever_read_it(tmp_path, num_workers):
    for index in range(2):
        # Without a matrix nibabel sets neither orientation code.
        (tmp_path / "data").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(noise((9, 8, 7), seed=index), None), tmp_path / "data" / f"c{index}.nii")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = built(tmp_path / "data", tmp_path / "cache", num_workers=num_workers)
    said = [str(warning.message) for warning in caught if "sform_code" in str(warning.message)]
    assert sorted(sentence.split(":")[0] for sentence in said) == [case.images[0] for case in (s.case for s in cache)]
    for scan in cache:
        with open(f"{scan.source}/card.json") as file:
            card = json.load(file)
        assert "sform_code are 0" in card["assumed"][0]
        assert scan.assumed == tuple(card["assumed"])
    assert json.loads((tmp_path / "cache/summary.json").read_text())["assumed"].keys() == {"c0", "c1"}


corner = st.tuples(*[st.integers(-50, 60)] * 3)
extent = st.tuples(*[st.integers(1, 50)] * 3)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(origin=corner, size=extent)
def test_any_crop_equals_the_padded_volume(cached, origin, size):
    scan = cached[1][0]
    whole = scan.read((0, 0, 0), scan.shape)
    pad = [(0, 0)] + [(50, 110 - length) for length in scan.shape]
    cut = tuple(slice(first + 50, first + 50 + length) for first, length in zip(origin, size, strict=True))
    padded = np.pad(whole, pad, constant_values=int(scan.statistics[0].low))
    np.testing.assert_array_equal(scan.read(origin, size), padded[(slice(None), *cut)])
    label = np.pad(scan.read_label((0, 0, 0), scan.shape), pad[1:])
    np.testing.assert_array_equal(scan.read_label(origin, size), label[cut])


def test_the_card_tells_box_places_and_labels(cached):
    _, cache = cached
    scan = cache[0]
    assert cache.labels == {0: "background", 1: "label_1", 2: "label_2"}
    start, stop = scan.body_box
    assert all(0 <= first < last <= limit for first, last, limit in zip(start, stop, scan.shape, strict=True))
    label = scan.read_label((0, 0, 0), scan.shape)
    assert set(scan.class_locations) == {1, 2}
    for value, places in scan.class_locations.items():
        assert places.shape[1] == 3
        assert (label[tuple(places.T)] == value).all()
        assert scan.num_voxels[value] == (label == value).sum()


def test_every_level_halves_the_one_before_and_is_padded_like_it(cached):
    scan = cached[1][0]
    assert scan.num_levels == 3
    assert scan.level_shapes == ((40, 36, 9), (20, 18, 5), (10, 9, 3))
    for level, expected in enumerate(levels_of(scan.read((0, 0, 0), scan.shape), 3, [Shown(-1000, 1000, -1000)])):
        np.testing.assert_array_equal(scan.read((0, 0, 0), scan.level_shapes[level], level), expected)
        padded = np.pad(expected, ((0, 0), (3, 3), (2, 2), (1, 1)), constant_values=-1000)
        np.testing.assert_array_equal(scan.read((-3, -2, -1), padded.shape[1:], level), padded)
        assert (scan.read((100, 0, 0), (4, 4, 4), level) == -1000).all()
    with pytest.raises(DataError, match="no level 3"):
        scan.read((0, 0, 0), (4, 4, 4), 3)


def test_eight_bits_hold_a_ct_within_half_a_step_of_the_window(tmp_path):
    data = make_set(tmp_path / "data", num_cases=1)
    scan = built(data, tmp_path / "cache", intensities="8-bit", window=(-100.0, 200.0), num_levels=1)[0]
    stored = scan.read((-2, 0, 0), (42, 36, 9))
    assert stored.dtype == np.uint8
    assert scan.level_shapes == ((40, 36, 9),)
    expected = np.clip(np.pad(noise((40, 36, 9), seed=0), ((2, 0), (0, 0), (0, 0)), constant_values=-1000), -100, 200)
    assert np.abs(scan.to_values(stored)[0] - expected).max() <= 300 / 255 * 0.5001
    assert scan.statistics[0].minimum == -1000


def test_auto_stores_a_labelled_data_set_without_loss_and_others_in_8_bits(tmp_path):
    data = make_set(tmp_path / "data", num_cases=2)
    os.remove(data / "labels" / "c1.nii.gz")
    assert built(data, tmp_path / "labelled").preprocessing.intensities == "lossless"
    cache = built(data / "images", tmp_path / "images")
    assert cache.preprocessing == open_cache(tmp_path / "images").preprocessing
    assert cache.preprocessing.intensities == "8-bit"
    assert [scan.read((0, 0, 0), (1, 1, 1)).dtype for scan in cache] == [np.uint8, np.uint8]
    make_set(data)
    with pytest.raises(ConfigError, match="holds a cache of other settings"):
        built(data, tmp_path / "images")


def test_a_cache_of_the_first_version_is_refused_with_the_way_out(tmp_path):
    built(make_set(tmp_path / "data", num_cases=1), tmp_path / "cache")
    path = tmp_path / "cache" / "cache.json"
    path.write_text(path.read_text().replace('"version": 3', '"version": 1'))
    with pytest.raises(DataError, match="a cache of version 1, but this mim3d reads version 3; build it again"):
        open_cache(tmp_path / "cache")


def test_scans_travel_to_other_processes(cached):
    scan = cached[1][1]
    scan.read((0, 0, 0), (4, 4, 4))
    assert len(scan.class_locations) == 2
    payload = pickle.dumps(scan)
    assert len(payload) < 5000
    np.testing.assert_array_equal(pickle.loads(payload).read((1, 2, 3), (5, 5, 5)), scan.read((1, 2, 3), (5, 5, 5)))


def test_scans_can_be_read_in_a_forked_process_after_being_read_here(cached):
    scan = cached[1][0]
    expected = int(scan.read((0, 0, 0), (8, 8, 8)).sum())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(int(scan.read((0, 0, 0), (8, 8, 8)).sum())).encode())
        os._exit(0)
    assert int(os.read(reader, 100)) == expected
    os.waitpid(child, 0)


def test_subsets_follow_a_split_and_pass_over_missing_ids(cached):
    data, cache = cached
    split = split_cases(read_cases(data).cases, num_folds=3)
    assert [scan.case for scan in cache.subset(split.val)] == list(split.val)
    assert len(cache.subset(split.train)) == 2
    assert len(cache[1:]) == 2
    with pytest.raises(DataError, match="none of the 1 cases"):
        cache.subset([type(split.val[0])(id="other", images=("x",), patient="x")])


def test_channels_are_cached_together_and_padded_each_with_its_own_low(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", noise())
    write_nifti(tmp_path / "b.nii.gz", np.full((6, 7, 8), 5, np.int16))
    (tmp_path / "list.csv").write_text("image,class\na.nii.gz;b.nii.gz,benign\n")
    cache = built(tmp_path / "list.csv", tmp_path / "cache")
    crop = cache[0].to_values(cache[0].read((-1, 0, 0), (2, 2, 2)))
    assert crop[:, 0, 0, 0].tolist() == [-1000, 5]
    assert cache[0].num_channels == 2
    assert cache[0].case.class_name == "benign"
    assert cache.labels == {}
    with pytest.raises(DataError, match="no label in the cache"):
        cache[0].read_label((0, 0, 0), (1, 1, 1))


def test_running_again_makes_nothing_again(tmp_path):
    data = make_set(tmp_path / "data")
    built(data, tmp_path / "cache")
    before = tree(tmp_path / "cache")
    times = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "cache" / "cases").rglob("*")}
    built(data, tmp_path / "cache")
    assert tree(tmp_path / "cache") == before
    assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "cache" / "cases").rglob("*")} == times


def test_the_digest_does_not_depend_on_place_or_process_count(tmp_path):
    data = make_set(tmp_path / "data")
    first = built(data, tmp_path / "one")
    shutil.copytree(data, tmp_path / "moved")
    second = built(tmp_path / "moved", tmp_path / "two", num_workers=2)
    assert first.digest == second.digest
    assert [scan.digest for scan in first] == [scan.digest for scan in second]
    for one, two in zip(first, second, strict=True):
        assert tree(one.source) == tree(two.source)


def test_a_changed_scan_is_made_again_and_only_that_one(tmp_path):
    data = make_set(tmp_path / "data")
    old = built(data, tmp_path / "cache")
    changed = data / "images" / "c1.nii.gz"
    status = changed.stat()
    write_nifti(changed, noise((40, 36, 9), seed=77))
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    new = built(data, tmp_path / "cache")
    assert [one.digest == two.digest for one, two in zip(old, new, strict=True)] == [True, False, True]
    np.testing.assert_array_equal(new[1].read((0, 0, 0), new[1].shape)[0], noise((40, 36, 9), seed=77))
    assert new.digest != old.digest
    assert len(os.listdir(tmp_path / "cache" / "cases")) == 3


def test_scans_that_left_the_data_set_leave_the_cache(tmp_path):
    data = make_set(tmp_path / "data")
    built(data, tmp_path / "cache")
    for kind in ("images", "labels"):
        (data / kind / "c0.nii.gz").unlink()
    assert [scan.case.id for scan in built(data, tmp_path / "cache")] == ["c1", "c2"]
    assert len(os.listdir(tmp_path / "cache" / "cases")) == 2


def test_a_changed_list_changes_the_cases_without_making_voxels_again(tmp_path):
    make_set(tmp_path / "data")
    path = tmp_path / "list.csv"
    path.write_text("image,class\ndata/images/c0.nii.gz,benign\n")
    old = built(path, tmp_path / "cache")
    path.write_text("image,class\ndata/images/c0.nii.gz,malign\n")
    new = built(path, tmp_path / "cache")
    assert new[0].case.class_name == "malign"
    assert new[0].digest == old[0].digest
    assert new.digest != old.digest


def test_another_setting_in_the_same_folder_is_refused_and_nothing_is_lost(tmp_path):
    data = make_set(tmp_path / "data", num_cases=1)
    cache = built(data, tmp_path / "cache")
    before = tree(tmp_path / "cache")
    for other in ({"spacing_mm": (2.0,) * 3}, {"intensities": "8-bit"}, {"window": (0.0, 1.0)}, {"num_levels": 2}):
        with pytest.raises(ConfigError, match="holds a cache of other settings"):
            built(data, tmp_path / "cache", **other)
        assert built(data, tmp_path / f"{next(iter(other))}", **other).digest != cache.digest
    assert tree(tmp_path / "cache") == before
    resampled = built(data, tmp_path / "other", spacing_mm=(2.0, 2.0, 2.0))
    assert resampled.digest != cache.digest
    assert resampled[0].spacing_mm == (2.0, 2.0, 2.0)
    assert resampled.preprocessing == open_cache(tmp_path / "other").preprocessing


def test_the_cache_of_other_scans_is_refused_and_kept(tmp_path):
    built(make_set(tmp_path / "data", num_cases=1), tmp_path / "cache")
    write_nifti(tmp_path / "else" / "x.nii.gz", noise())
    with pytest.raises(DataError, match="holds a cache of other scans"):
        built(tmp_path / "else", tmp_path / "cache", intensities="lossless")
    assert len(open_cache(tmp_path / "cache")) == 1


def test_the_cache_of_other_scans_of_the_same_names_is_refused_and_kept(tmp_path):
    for patient in "ab":
        write_nifti(tmp_path / patient / "ct.nii.gz", noise(seed=ord(patient)))
    before = built(tmp_path / "a", tmp_path / "cache", intensities="lossless").digest
    with pytest.raises(DataError, match=r"of the same names \(ct is .*a/ct.nii.gz there, .*b/ct.nii.gz here"):
        built(tmp_path / "b", tmp_path / "cache", intensities="lossless")
    assert open_cache(tmp_path / "cache").digest == before
    # A copy elsewhere is the same scan, and so is what moved or changed in its place.
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    assert built(tmp_path / "copy", tmp_path / "cache", intensities="lossless").digest == before
    shutil.move(tmp_path / "copy", tmp_path / "moved")
    assert built(tmp_path / "moved", tmp_path / "cache", intensities="lossless").digest == before
    write_nifti(tmp_path / "moved" / "ct.nii.gz", noise(seed=3))
    assert built(tmp_path / "moved", tmp_path / "cache", intensities="lossless").digest != before


def test_bad_scans_are_left_out_with_their_reason(tmp_path):
    data = make_set(tmp_path / "data")
    broken = data / "images" / "c1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:400])
    write_nifti(data / "labels" / "c2.nii.gz", np.zeros((40, 36, 9), np.uint8), affine_of((2, 1, 1)))
    cache = built(data, tmp_path / "cache")
    assert [scan.case.id for scan in cache] == ["c0"]
    with open(tmp_path / "cache" / "failed.csv", newline="") as file:
        failed = list(csv.DictReader(file))
    assert [row["id"] for row in failed] == ["c1", "c2"]
    assert "c1.nii.gz" in failed[0]["reason"]
    assert "does not lie on the grid" in failed[1]["reason"]
    make_set(data)
    assert len(built(data, tmp_path / "cache")) == 3
    assert open_cache(tmp_path / "cache").failed == ()


def test_undeclared_label_values_are_left_out_with_their_reason(tmp_path):
    data = make_set(tmp_path / "data", num_cases=2)
    rows = [{"image": f"data/images/c{n}.nii.gz", "label": f"data/labels/c{n}.nii.gz"} for n in range(2)]
    write_nifti(data / "labels" / "c1.nii.gz", np.full((40, 36, 9), 9, np.uint8))
    (tmp_path / "list.json").write_text(json.dumps({"labels": {"1": "a", "2": "b"}, "cases": rows}))
    cache = built(tmp_path / "list.json", tmp_path / "cache")
    assert cache.labels == {0: "background", 1: "a", 2: "b"}
    assert "label values 9 are not declared" in cache.failed[0]["reason"]


def test_nothing_usable_is_an_error_with_the_first_reason(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.nii.gz").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"none of 1 scans can be used; the first: .*a\.nii\.gz"):
        built(tmp_path / "data", tmp_path / "cache")
    with pytest.raises(DataError, match="not finished"):
        open_cache(tmp_path / "cache")


def test_voxels_of_another_shape_than_the_card_says_are_damage(tmp_path):
    data = make_set(tmp_path / "data", num_cases=2)
    cache = built(data, tmp_path / "cache")
    shutil.rmtree(os.path.join(cache[0].source, "image"))
    shutil.copytree(os.path.join(cache[0].source, "label"), os.path.join(cache[0].source, "image", "0"))
    with pytest.raises(DataError, match="where its card says"):
        cache[0].read((0, 0, 0), (4, 4, 4))


@pytest.mark.parametrize("make", ["file", "folder"])
def test_a_place_that_holds_other_things_is_refused(tmp_path, make):
    data, out = make_set(tmp_path / "data", num_cases=1), tmp_path / "out"
    if make == "file":
        out.write_text("x")
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"is a file|holds other things"):
        built(data, out)


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    data = make_set(tmp_path / "data", num_cases=1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="the cache cannot be written"):
        built(data, tmp_path / "file" / "cache")


def test_two_builds_of_one_folder_at_once_are_refused(tmp_path):
    from mim3d.caching.layout import locked

    data = make_set(tmp_path / "data", num_cases=1)
    (tmp_path / "cache").mkdir()
    with locked(str(tmp_path / "cache")), pytest.raises(DataError, match="another process is building"):
        built(data, tmp_path / "cache")
    assert len(built(data, tmp_path / "cache")) == 1


def test_what_is_no_cache_or_damaged_is_told(tmp_path):
    assert not is_cache(tmp_path)
    with pytest.raises(DataError, match="not a mim3d cache"):
        open_cache(tmp_path)
    cache = built(make_set(tmp_path / "data", num_cases=1), tmp_path / "cache")
    assert is_cache(tmp_path / "cache")
    scan = cache[0]
    os.remove(os.path.join(scan.source, "image", "0", "c", "0", "0", "0", "0"))
    with pytest.raises(DataError, match="missing or damaged"):
        scan.read((0, 0, 0), (4, 4, 4))
    (tmp_path / "cache" / "manifest.parquet").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.parquet: missing or damaged"):
        open_cache(tmp_path / "cache")


def test_what_is_damaged_is_made_again_by_the_same_command(tmp_path):
    data = make_set(tmp_path / "data")
    cache = built(data, tmp_path / "cache")
    files = {path: path.read_bytes() for path in sorted((tmp_path / "cache").rglob("*")) if path.is_file()}

    def again(name, content, error):
        (path,) = (path for path in files if path.match(name))
        path.write_bytes(content)
        if error is not None:
            with pytest.raises(DataError, match=error):
                is_cache(tmp_path / "cache") and open_cache(tmp_path / "cache")
        assert built(data, tmp_path / "cache").digest == cache.digest
        assert path.read_bytes() == files[path]

    again("cache.json", b"{", r"cache\.json: missing or damaged .* run `mim3d cache` again .* finished is kept")
    again("cache/manifest.parquet", b"{", r"manifest\.parquet: missing or damaged .* run `mim3d cache` again")
    again("cases/c1.*/card.json", b"\xff", None)
    again("cases/c1.*/card.json", b"{}", None)


def test_what_is_damaged_and_no_cache_of_these_scans_is_refused(tmp_path):
    data = make_set(tmp_path / "data", num_cases=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cache.json").write_text("{")
    with pytest.raises(DataError, match="not the settings of a mim3d cache"):
        built(data, tmp_path / "other")
    built(data, tmp_path / "cache")
    (tmp_path / "cache" / "manifest.parquet").write_text("{")
    other = make_set(tmp_path / "more", num_cases=1)
    for part in ("images", "labels"):
        (other / part / "c0.nii.gz").rename(other / part / "d0.nii.gz")
    with pytest.raises(DataError, match="holds a cache of other scans"):
        built(tmp_path / "more", tmp_path / "cache")


def test_real_scans_of_fractions_are_cached_within_half_of_65536_steps(shared_data, tmp_path):
    cases = read_cases(shared_data / "hippocampus")
    few = type(cases)(root=cases.root, form=cases.form, cases=cases.cases[:4], labels={})
    cache = build_cache(few, tmp_path / "cache", Preprocessing())
    assert cache.labels == {0: "background", 1: "label_1", 2: "label_2"}
    for case, scan in zip(few.cases, cache, strict=True):
        image = prepare(case, Preprocessing()).image
        values = scan.to_values(scan.read((0, 0, 0), scan.shape))
        np.testing.assert_allclose(values, image, rtol=1e-6, atol=0.5001 * float(np.ptp(image)) / 65535)
