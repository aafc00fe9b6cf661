import numpy as np
import pytest
from scipy import ndimage

from mim3d.core.errors import ConfigError
from mim3d.phantoms import body as phantoms
from mim3d.phantoms.body import Phantom, make_phantom
from mim3d.phantoms.parts import (
    AORTA,
    BONES,
    LABELS,
    LEFT_KIDNEY,
    LESION,
    LIVER,
    LUNGS,
    RIGHT_KIDNEY,
    SPLEEN,
    draw_tissues,
)
from mim3d.phantoms.scanner import MAX_BEND_MM, draw_pose
from mim3d.phantoms.trunk import draw_trunk

SIZE = (64, 56, 48)
SEEDS = (0, 1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def made() -> dict[int, Phantom]:
    return {seed: make_phantom(seed, SIZE) for seed in SEEDS}


def centre(phantom: Phantom, label: int) -> np.ndarray:
    return np.argwhere(phantom.label == label).mean(axis=0)


def volume_ml(phantom: Phantom, label: int) -> float:
    return float((phantom.label == label).sum() * np.prod(phantom.spacing_mm) / 1000)


def test_the_same_seed_and_size_give_the_same_voxels(made: dict[int, Phantom]) -> None:
    again = make_phantom(1, SIZE)
    assert np.array_equal(again.image, made[1].image)
    assert np.array_equal(again.label, made[1].label)
    assert np.array_equal(again.affine, made[1].affine)
    assert not np.array_equal(made[1].label, made[2].label)


def test_slices_painted_at_a_time_change_no_voxel(made: dict[int, Phantom], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantoms, "SLAB_VOXELS", SIZE[0] * SIZE[1] * 7)
    again = make_phantom(2, SIZE)
    assert np.array_equal(again.image, made[2].image)
    assert np.array_equal(again.label, made[2].label)


def test_numpys_global_random_state_is_neither_used_nor_changed() -> None:
    np.random.seed(1)
    first = make_phantom((3, 0, 1), (24, 24, 20))
    drawn = np.random.random()
    np.random.seed(1)
    assert drawn == np.random.random()
    assert np.array_equal(first.image, make_phantom((3, 0, 1), (24, 24, 20)).image)


def test_a_seed_names_the_same_patient_at_every_size(made: dict[int, Phantom]) -> None:
    finer = make_phantom(1, (96, 84, 72))
    for label in (LIVER, SPLEEN, LUNGS, BONES):
        assert volume_ml(finer, label) == pytest.approx(volume_ml(made[1], label), rel=0.04)


def test_image_label_and_grid_have_the_promised_form(made: dict[int, Phantom]) -> None:
    for phantom in made.values():
        assert phantom.image.shape == phantom.label.shape == SIZE
        assert phantom.image.dtype == np.int16 and phantom.label.dtype == np.uint8
        assert phantom.image.min() >= -1024 and phantom.image.max() <= 3071
        assert np.allclose(np.diag(phantom.affine)[:3], phantom.spacing_mm)
        assert phantom.labels == LABELS


def test_spacing_is_square_in_slices_and_differs_between_patients(made: dict[int, Phantom]) -> None:
    spacings = {phantom.spacing_mm for phantom in made.values()}
    assert len(spacings) == len(SEEDS)
    assert all(x == y and x != z for x, y, z in spacings)


def test_every_organ_has_a_plausible_size(made: dict[int, Phantom]) -> None:
    ranges_ml = {
        LIVER: (600, 2600),
        SPLEEN: (60, 350),
        RIGHT_KIDNEY: (60, 320),
        LEFT_KIDNEY: (60, 320),
        AORTA: (80, 400),
        LUNGS: (1200, 6000),
        BONES: (500, 2000),
        LESION: (0.2, 300),
    }
    for phantom in made.values():
        for label, (low, high) in ranges_ml.items():
            assert low < volume_ml(phantom, label) < high, LABELS[label]


def test_organs_lie_on_their_side_in_ras_arrays(made: dict[int, Phantom]) -> None:
    for phantom in made.values():
        x, y, z = 0, 1, 2
        liver, spleen, lungs = (centre(phantom, label) for label in (LIVER, SPLEEN, LUNGS))
        right, left = centre(phantom, RIGHT_KIDNEY), centre(phantom, LEFT_KIDNEY)
        assert liver[x] > spleen[x] and right[x] > left[x]
        assert lungs[z] > liver[z] > right[z]
        assert centre(phantom, AORTA)[y] > centre(phantom, BONES)[y] > spleen[y] - SIZE[1] / 4
        assert liver[y] > right[y]


def test_tissues_have_plausible_hounsfield_units(made: dict[int, Phantom]) -> None:
    ranges_hu = {
        LIVER: (5, 150),
        SPLEEN: (10, 170),
        RIGHT_KIDNEY: (10, 230),
        AORTA: (20, 400),
        LUNGS: (-920, -700),
        BONES: (100, 900),
    }
    for phantom in made.values():
        for label, (low, high) in ranges_hu.items():
            assert low < np.median(phantom.image[phantom.label == label]) < high, LABELS[label]
        assert np.median(phantom.image[0]) < -950


def test_labels_fit_the_image_to_the_voxel() -> None:
    phantom = make_phantom(7, (112, 96, 80))
    inside = ndimage.binary_erosion(phantom.label == LUNGS)
    assert (phantom.image[inside] < -500).mean() > 0.97
    around = ndimage.binary_dilation(phantom.label == LUNGS, iterations=2) & (phantom.label == 0)
    assert np.median(phantom.image[around]) > -200


def test_lesions_lie_in_liver_or_kidneys(made: dict[int, Phantom]) -> None:
    for phantom in made.values():
        lesions, count = ndimage.label(phantom.label == LESION)
        hosts = np.isin(phantom.label, (LIVER, RIGHT_KIDNEY, LEFT_KIDNEY))
        for number in range(1, count + 1):
            rim = ndimage.binary_dilation(lesions == number) & (lesions != number)
            assert hosts[rim].any()


def test_noise_is_correlated_between_neighbours_but_not_far_away() -> None:
    phantom = make_phantom(3, (96, 80, 64))
    core = ndimage.binary_erosion(phantom.label == LIVER, iterations=3)
    values = np.where(core, phantom.image - np.median(phantom.image[core]), np.nan)
    values[np.abs(values) > 60] = np.nan

    def correlation(step: int) -> float:
        a, b = values[:-step].ravel(), values[step:].ravel()
        both = np.isfinite(a) & np.isfinite(b)
        return float(np.corrcoef(a[both], b[both])[0, 1])

    assert correlation(1) > 0.2
    assert abs(correlation(6)) < 0.15


def test_a_table_lies_behind_the_patient(made: dict[int, Phantom]) -> None:
    for phantom in made.values():
        middle = phantom.image[SIZE[0] // 3 : 2 * SIZE[0] // 3]
        back = np.flatnonzero(np.median(middle, axis=(0, 2)) > -200).min()
        covered = (middle[:, :back] > -900).mean(axis=(0, 2))
        assert covered.max() > 0.9 and covered[0] < 0.5


def test_parts_never_reach_out_of_the_box_they_are_painted_in() -> None:
    size = (32, 30, 26)
    grid_rng, body_rng, _ = map(np.random.default_rng, np.random.SeedSequence(11).spawn(3))
    pose, tissues, trunk = draw_pose(body_rng), draw_tissues(body_rng), draw_trunk(body_rng)
    parts = phantoms._draw_parts(body_rng, trunk, tissues)
    placement = phantoms._place(pose, trunk, grid_rng, size)
    places = placement.body_mm(0, size[2])
    for part in parts:
        level = part.solid.level(*places)
        assert level.dtype == np.float32
        inside = level < 0
        box = placement.box(part.solid.low, part.solid.high, 0, size[2])
        if box is not None:
            inside[box] = False
        assert not inside.any()


def test_the_bend_stays_within_its_bound_and_never_folds() -> None:
    rng = np.random.default_rng(5)
    pose, trunk = draw_pose(rng), draw_trunk(rng)
    size = (40, 40, 40)
    placement = phantoms._place(pose, trunk, rng, size)
    straight = np.stack(np.meshgrid(*(placement.scan_mm(axis) for axis in range(3)), indexing="ij"))
    linear = np.einsum("ij,jxyz->ixyz", pose.linear, straight)
    bend = np.stack(placement.body_mm(0, 40)) - linear - np.array(pose.centre_mm)[:, None, None, None]
    assert np.abs(bend).max() <= MAX_BEND_MM
    assert np.abs(bend).max() > 2
    x, y, z = placement.body_mm(0, 40)
    assert (np.diff(x, axis=0) > 0).all() and (np.diff(y, axis=1) > 0).all() and (np.diff(z, axis=2) > 0).all()


def test_poses_differ() -> None:
    poses = [draw_pose(np.random.default_rng(seed)) for seed in range(3)]
    assert len({pose.centre_mm for pose in poses}) == 3


@pytest.mark.parametrize("size", [(15, 64, 64), (64, 64, 0)])
def test_a_size_too_small_for_anatomy_is_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="at least 16 voxels"):
        make_phantom(0, size)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="-3"):
        make_phantom(-3, SIZE)


def test_the_smallest_size_is_made() -> None:
    assert make_phantom(0, (16, 16, 16)).image.shape == (16, 16, 16)
