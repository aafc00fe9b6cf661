"""What a data set looks like, and the plan that follows from it."""

import itertools
import math
import os
from pathlib import Path

import numpy as np
import pytest

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.settings import build_settings, read_yaml, to_mapping, write_yaml
from mim3d.datasets.cases import Case
from mim3d.planning import fingerprint as dataset_fingerprint
from mim3d.planning.fingerprint import (
    ChannelValues,
    ClassFacts,
    DatasetFingerprint,
    ScanGrid,
    file_sources,
    fingerprint_key,
    fingerprint_of,
    voxel_time_s,
)
from mim3d.planning.plan import (
    FILLED_SHARE,
    MAX_PATCH_VOXELS,
    MAX_STEPS,
    MIN_STEPS,
    FixedChoices,
    Plan,
    choose_batch,
    choose_patch,
    growing_patches,
    plan_dataset,
    plan_spacing,
    plan_window,
    shapes_at,
)
from mim3d.scans.intensity import Intensity
from tests.nifti import affine_of, noise, write_nifti


def grid(spacing_mm, shape=(100, 100, 100), name="scan", num_channels=1) -> ScanGrid:
    return ScanGrid(id=name, shape=shape, spacing_mm=spacing_mm, num_channels=num_channels, orientation="RAS")


def fingerprint(grids, *, ct=True, low=-50.0, high=150.0, ratio=0.02, num_channels=1) -> DatasetFingerprint:
    channel = ChannelValues(
        num_ct=len(grids) if ct else 0,
        minimum=-1000.0 if ct else 0.0,
        maximum=1000.0,
        body_mean=0.0,
        body_std=100.0,
        class_percentile_00_5=low,
        class_median=(low + high) / 2,
        class_percentile_99_5=high,
    )
    facts = ClassFacts(
        value=1, name="liver", num_scans=1, volume_ml=(1.0, 2.0, 3.0), num_components=1, extent_mm=(50.0, 60.0, 70.0)
    )
    return DatasetFingerprint(
        key="key",
        scans=tuple(grids),
        voxel_scans=tuple(g.id for g in grids),
        channels=(channel,) * num_channels,
        classes=(facts,),
        foreground_ratio=ratio,
    )


class Line:
    """Memory that is a line over the voxels of a batch."""

    def __init__(self, usable_bytes: int, bytes_per_voxel: int = 100) -> None:
        self.usable_bytes = usable_bytes
        self.bytes_per_voxel = bytes_per_voxel
        self.asked: list = []

    def need_bytes(self, patch_size, batch_size: int) -> int:
        self.asked.append((patch_size, batch_size))
        return 10**6 + self.bytes_per_voxel * math.prod(patch_size) * batch_size


def case_of(folder: Path, name: str, image: np.ndarray, label: np.ndarray | None = None, affine=None) -> Case:
    images = image if isinstance(image, list) else [image]
    paths = [str(write_nifti(folder / f"{name}_{c}.nii.gz", array, affine)) for c, array in enumerate(images)]
    drawn = None if label is None else str(write_nifti(folder / f"{name}_label.nii.gz", label, affine))
    return Case(id=name, images=tuple(paths), label=drawn, patient=name)


def boxes(shape=(16, 18, 20)) -> np.ndarray:
    """Two boxes of label 1 that do not touch, and one voxel of label 3."""
    label = np.zeros(shape, dtype=np.uint8)
    label[4:6, 5:8, 6:10] = 1
    label[8:10, 5:8, 6:10] = 1
    label[6, 12, 12] = 3
    return label


# Fingerprints of files.


def test_headers_of_all_scans_and_voxels_of_those_to_train_on_are_looked_at(tmp_path):
    affine = affine_of((1.0, 2.0, 3.0), signs=(-1, -1, 1))
    cases = [case_of(tmp_path, f"scan_{n}", noise((16, 18, 20), n), boxes(), affine) for n in range(4)]
    found = fingerprint_of(file_sources(cases, {}), {1: "boxes"}, learned=["scan_0", "scan_1", "scan_2"])
    assert [scan.id for scan in found.scans] == ["scan_0", "scan_1", "scan_2", "scan_3"]
    assert found.scans[0] == ScanGrid(
        id="scan_0", shape=(16, 18, 20), spacing_mm=(1.0, 2.0, 3.0), num_channels=1, orientation="LPS"
    )
    assert found.voxel_scans == ("scan_0", "scan_1", "scan_2")
    assert found.is_ct and found.channels[0].num_ct == 3
    one, three = found.classes
    assert (one.name, three.name) == ("boxes", "3")
    assert one.num_components == 2 and three.num_components == 1
    assert one.volume_ml == pytest.approx((48 * 6 / 1000,) * 3)
    assert one.extent_mm == pytest.approx((6.0, 6.0, 12.0)) and three.extent_mm == pytest.approx((1.0, 2.0, 3.0))
    assert found.foreground_ratio == pytest.approx(49 / (16 * 18 * 20))


def test_percentiles_are_those_of_labelled_voxels_alone(tmp_path):
    image, label = noise((16, 18, 20)), boxes()
    label[label == 3] = 0
    image[label == 1] = np.linspace(100, 200, 48).astype(np.int16)
    found = fingerprint_of(file_sources([case_of(tmp_path, "scan", image, label)], {}), {})
    assert found.channels[0].class_percentile_00_5 == pytest.approx(100, abs=1)
    assert found.channels[0].class_percentile_99_5 == pytest.approx(200, abs=1)
    assert found.channels[0].class_median == pytest.approx(150, abs=2)


def test_voxels_to_be_ignored_belong_to_no_structure(tmp_path):
    case = case_of(tmp_path, "scan", noise((16, 18, 20)), boxes())
    found = fingerprint_of(file_sources([case], {}, ignore_label=1), {})
    assert [facts.value for facts in found.classes] == [3]


def test_as_many_scans_as_wanted_are_drawn_and_always_the_same(tmp_path):
    cases = [case_of(tmp_path, f"scan_{n}", noise((6, 7, 8), n)) for n in range(8)]
    draws = [fingerprint_of(file_sources(cases, {}), {}, num_voxel_scans=3, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert len(draws[0].voxel_scans) == 3 and draws[0].voxel_scans != draws[2].voxel_scans
    assert draws[0].channels[0].class_percentile_00_5 is None and draws[0].classes == ()


def test_threads_change_nothing(tmp_path):
    cases = [case_of(tmp_path, f"scan_{n}", noise((12, 12, 12), n), boxes((12, 13, 14))[:, :12, :12]) for n in range(5)]
    sources = file_sources(cases, {})
    assert fingerprint_of(sources, {}, num_workers=1) == fingerprint_of(sources, {}, num_workers=3)


def test_bad_scans_are_passed_over_with_a_warning_and_none_at_all_is_an_error(tmp_path):
    good = case_of(tmp_path, "good", noise())
    bad = case_of(tmp_path, "bad", noise())
    Path(bad.images[0]).write_bytes(b"no scan")
    holes = case_of(tmp_path, "holes", np.where(noise() > 0, np.nan, noise()).astype(np.float32))
    with pytest.warns(UserWarning, match=r"passed over in planning: .*(bad|holes)_0") as said:
        found = fingerprint_of(file_sources([bad, good, holes], {}), {})
    assert len(said) == 2
    assert [scan.id for scan in found.scans] == ["good", "holes"] and found.voxel_scans == ("good",)
    with pytest.warns(UserWarning, match="passed over"), pytest.raises(DataError, match="can be read"):
        fingerprint_of(file_sources([bad], {}), {})


def test_cases_of_different_channels_are_refused(tmp_path):
    cases = [case_of(tmp_path, "one", noise()), case_of(tmp_path, "two", [noise(), noise(seed=1)])]
    with pytest.raises(DataError, match=r"case two has 2 images, but case one has 1"):
        fingerprint_of(file_sources(cases, {}), {})


def test_a_fingerprint_comes_back_from_its_file_while_the_scans_are_the_same(tmp_path):
    case = case_of(tmp_path, "scan", noise((16, 18, 20)), boxes())
    found = fingerprint_of(file_sources([case], {}), {1: "boxes"})
    path = tmp_path / "fingerprint.json"
    found.save(path)
    key = fingerprint_key(file_sources([case], {}), ["scan"], dataset_fingerprint.DEFAULT_VOXEL_SCANS, 0)
    assert key == found.key and DatasetFingerprint.load(path, key) == found
    os.utime(case.images[0], ns=(1, 1))
    changed = fingerprint_key(file_sources([case], {}), ["scan"], dataset_fingerprint.DEFAULT_VOXEL_SCANS, 0)
    assert DatasetFingerprint.load(path, changed) is None
    path.write_text(path.read_text()[:-40])
    assert DatasetFingerprint.load(path, key) is None


def test_the_time_it_takes_grows_with_voxels_and_channels():
    one = voxel_time_s([grid((1.0, 1.0, 1.0))])
    assert voxel_time_s([grid((1.0, 1.0, 1.0), num_channels=2)] * 3) == pytest.approx(6 * one)


# Spacing.


def test_scans_of_one_spacing_are_left_alone():
    grids = [grid((0.8, 0.8, 2.0)), grid((0.803, 0.8, 2.01))]
    spacing, reason = plan_spacing(grids)
    assert spacing is None and "0.8015 x 0.8 x 2.005 mm" in reason


def test_scans_of_several_spacings_go_to_the_median():
    grids = [grid((z / 2, 0.8, z)) for z in (1.0, 1.5, 2.0)]
    spacing, reason = plan_spacing(grids)
    assert spacing == (0.75, 0.8, 1.5) and "1 to 2 mm" in reason


def test_few_coarse_slices_go_to_the_10th_percentile_but_never_below_the_plane():
    slices = [grid((1.0, 1.0, z), (300, 300, 40)) for z in (2.0, 4.0, 5.0, 6.0, 7.0)]
    spacing, reason = plan_spacing(slices)
    assert spacing == (1.0, 1.0, 2.8) and "10th percentile" in reason and "5 mm is over 3 times 1 mm" in reason
    many = [grid(scan.spacing_mm, (300, 300, 200)) for scan in slices]
    assert plan_spacing(many)[0] == (1.0, 1.0, 5.0)
    finer = [grid((1.0, 1.0, z), (300, 300, 40)) for z in (0.5, 0.5, 4.0, 5.0, 6.0, 7.0)]
    assert plan_spacing(finer)[0] == (1.0, 1.0, 1.0)


def test_shapes_follow_from_the_spacing():
    assert shapes_at([grid((1.0, 1.0, 3.0), (100, 50, 20))], (2.0, 1.0, 1.5)) == [(50, 50, 40)]
    assert shapes_at([grid((1.0, 1.0, 3.0), (100, 50, 20))], None) == [(100, 50, 20)]


# Patches.


def test_patches_grow_token_by_token_in_the_proportions_of_the_scan():
    patches = list(growing_patches((256.0, 256.0, 128.0), (16, 16, 16)))
    assert patches[-1] == (256, 256, 128)
    for small, large in itertools.pairwise(patches):
        assert all(have <= more for have, more in zip(small, large, strict=True)) and small != large
    assert all(voxels % 16 == 0 for patch in patches for voxels in patch)
    assert all(x == y for x, y, _ in patches), "axes alike stay alike"
    x, _, z = next(patch for patch in patches if patch[0] == 128)
    assert abs(x / z - 2) <= 0.5


def test_a_stack_of_few_slices_gets_thin_patches():
    patch_size, _ = choose_patch((512.0, 512.0, 12.0), (16, 16, 16), None, 2)
    assert patch_size[2] == 16 and patch_size[0] == patch_size[1] > 256
    assert math.prod(patch_size) <= MAX_PATCH_VOXELS


def test_a_scan_smaller_than_a_token_gets_two_tokens_along_its_longest_axis():
    assert list(growing_patches((10.0, 12.0, 9.0), (16, 16, 16))) == [(16, 32, 16)]
    assert list(growing_patches((40.0, 40.0, 9.0), (32, 32, 8)))[-1] == (64, 64, 16)


def test_a_scan_that_fits_is_covered_and_a_large_one_is_not_beyond_the_limit():
    assert choose_patch((35.0, 50.0, 36.0), (8, 8, 8), None, 2)[0] == (40, 56, 40)
    large, reason = choose_patch((400.0, 300.0, 500.0), (16, 16, 16), None, 2)
    assert 0.6 * MAX_PATCH_VOXELS < math.prod(large) <= MAX_PATCH_VOXELS
    assert "128 x 128 x 128" in reason


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4, 0.75, 0.99, 2.0])
def test_the_largest_patch_that_memory_holds_is_found_with_few_questions(share):
    whole = Line(1)
    patches = [p for p in growing_patches((400.0, 300.0, 500.0), (8, 8, 8)) if math.prod(p) <= MAX_PATCH_VOXELS]
    memory = Line(int(share * whole.need_bytes(patches[-1], 2) / FILLED_SHARE))
    chosen, reason = choose_patch((400.0, 300.0, 500.0), (8, 8, 8), memory, 2)
    fitting = [p for p in patches if memory.need_bytes(p, 2) <= FILLED_SHARE * memory.usable_bytes]
    assert chosen == fitting[-1]
    questions = len(memory.asked) - len(patches)
    assert questions <= 8
    if share < 1:
        assert "would need" in reason and "of memory" in reason


def test_where_nothing_fits_the_smallest_patch_is_left_for_the_memory_check_to_refuse():
    assert choose_patch((400.0, 300.0, 500.0), (16, 16, 16), Line(10), 2)[0] == (16, 16, 32)


# Batches and steps.


def test_a_batch_is_a_twentieth_of_the_training_voxels_within_bounds():
    patch = (32, 32, 32)
    assert choose_batch(patch, 100 * 32**3, None, 1)[0] == 5
    assert choose_batch(patch, 100 * 32**3, None, 2)[0] == 2
    assert choose_batch(patch, 3 * 32**3, None, 1)[0] == 2
    assert choose_batch(patch, 10**6 * 32**3, None, 1)[0] == 16


def test_a_batch_is_what_memory_holds():
    memory = Line(int((10**6 + 100 * 32**3 * 4) / FILLED_SHARE) + 1)
    chosen, reason = choose_batch((32, 32, 32), 1000 * 32**3, memory, 1)
    assert chosen == 4 and reason.startswith("5 would need")


def test_steps_follow_from_cases_and_voxels_and_stay_within_bounds():
    def steps(num_training, shape):
        plan = plan_dataset(
            fingerprint([grid((1.0, 1.0, 1.0), shape)]),
            multiple=(16, 16, 16),
            num_training=num_training,
            fixed=FixedChoices(values={"patch_size": (64, 64, 64), "batch_size": 2}),
        )
        return plan.max_steps

    assert steps(20, (64, 64, 64)) == 300 * 20 / 2
    assert steps(20, (128, 64, 64)) == 2 * steps(20, (64, 64, 64))
    assert steps(3, (64, 64, 64)) == MIN_STEPS
    assert steps(1000, (256, 256, 256)) == MAX_STEPS


# Intensities.


def test_a_known_window_is_taken_where_it_covers_the_structures_and_is_not_much_wider():
    assert plan_window(-100.0, 160.0)[0] == (-160.0, 240.0)
    assert plan_window(-160.5, 245.0)[0] == (-175.0, 250.0)
    assert plan_window(-900.0, 100.0)[0] == (-1350.0, 150.0)


def test_a_window_of_the_sets_own_has_a_margin_and_stays_within_what_ct_holds():
    window, reason = plan_window(40.0, 140.0)
    assert window == (30.0, 150.0) and "10 HU more" in reason
    assert plan_window(-1024.0, 3071.0)[0] == (-1024.0, 3071.0)
    low, high = plan_window(7.0, 7.0)[0]
    assert low < 7 < high


def test_mri_gets_the_z_score_and_ct_without_labelled_voxels_the_whole_window():
    mri = plan_dataset(fingerprint([grid((1.0, 1.0, 1.0))], ct=False), multiple=(16, 16, 16), num_training=1)
    assert mri.intensity == Intensity(kind="zscore", window=None)
    unlabelled = fingerprint([grid((1.0, 1.0, 1.0))])
    empty = ChannelValues(num_ct=1, minimum=-1000.0, maximum=1.0, body_mean=0.0, body_std=1.0)
    bare = build_settings(DatasetFingerprint, {**to_mapping(unlabelled), "channels": [to_mapping(empty)]}, "bare")
    assert plan_dataset(bare, multiple=(16, 16, 16), num_training=1).intensity == Intensity()


def test_rare_structures_are_looked_for_more_often():
    ratios = [
        plan_dataset(
            fingerprint([grid((1.0, 1.0, 1.0))], ratio=ratio), multiple=(16, 16, 16), num_training=1
        ).positive_ratio
        for ratio in (0.2, 0.01, 0.0001)
    ]
    assert ratios == sorted(ratios) and len(set(ratios)) == 3


# The plan as a whole.


def test_what_is_decided_stays_and_the_rest_follows_from_it():
    grids = [grid((1.0, 1.0, z), (200, 200, 60)) for z in (2.0, 2.5, 3.0)]
    free = plan_dataset(fingerprint(grids), multiple=(16, 16, 16), num_training=3)
    decided = FixedChoices(
        values={"spacing_mm": (2.0, 2.0, 2.0), "max_steps": None},
        by={"spacing_mm": "of the encoder", "max_steps": "max_epochs 3 given"},
    )
    bound = plan_dataset(fingerprint(grids), multiple=(16, 16, 16), num_training=3, fixed=decided)
    assert free.spacing_mm == (1.0, 1.0, 2.5) and bound.spacing_mm == (2.0, 2.0, 2.0)
    assert bound.patch_size == (112, 112, 80) and free.patch_size != bound.patch_size
    assert bound.reasons["spacing_mm"].startswith("of the encoder (the plan would be 1 1 2.5")
    assert bound.max_steps is None and "max_epochs 3" in bound.reasons["max_steps"]


def test_every_choice_has_a_reason_with_numbers():
    plan = plan_dataset(fingerprint([grid((1.0, 1.0, 1.0))]), multiple=(16, 16, 16), num_training=1)
    for name in ("spacing_mm", "intensity", "patch_size", "batch_size", "max_steps", "positive_ratio"):
        assert any(sign.isdigit() for sign in plan.reasons[name]), name


def test_a_plan_comes_back_from_yaml_as_it_was(tmp_path):
    plan = plan_dataset(fingerprint([grid((1.0, 1.0, 1.0))]), multiple=(16, 16, 16), num_training=1)
    write_yaml(tmp_path / "plan.yaml", to_mapping(plan))
    assert build_settings(Plan, read_yaml(tmp_path / "plan.yaml"), "plan") == plan


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spacing_mm": [1, 0, 1]}, "spacing_mm"),
        ({"patch_size": [0, 16, 16]}, "patch_size"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"positive_ratio": 2}, "positive_ratio is 2"),
        ({"flip_axes": [3]}, "flip_axes"),
        ({"rotation_degrees": [0, 0, 999]}, "rotation_degrees"),
        ({"patch_sise": [16, 16, 16]}, "patch_size"),
    ],
)
def test_impossible_values_and_unknown_keys_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build_settings(Plan, values, "plan")
