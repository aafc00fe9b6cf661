"""Augmentation keeps image and label together, fits names and spacing, and depends on its seed alone."""

import pickle
from dataclasses import replace

import pytest
import torch

from mim3d.core.errors import ConfigError
from mim3d.tasks.augmentation import Augmentation, sided_labels
from mim3d.tasks.transforms import Augmenter, square_planes

PATCH = (12, 16, 12)
INTENSITY_PROBS = [
    "scale_prob",
    "shift_prob",
    "noise_prob",
    "gamma_prob",
    "blur_prob",
    "low_resolution_prob",
]
STILL = Augmentation(
    flip_prob=0, rotate90_prob=0, affine_prob=0, scale_prob=0, shift_prob=0, noise_prob=0, gamma_prob=0
).planned({}, (1, 1, 1))


def sample(size: tuple[int, int, int] = PATCH, num_channels: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 4, (1, *size), generator=generator)
    return {"image": label[:, None].float().expand(1, num_channels, *size).clone(), "label": label}


def test_nothing_changes_when_every_probability_is_zero():
    before = sample()
    after = Augmenter(STILL, PATCH, (1, 1, 1))(sample(), 1)
    assert torch.equal(after["image"], before["image"]) and torch.equal(after["label"], before["label"])


def test_flips_and_quarter_turns_move_image_and_label_together():
    augment = Augmenter(replace(STILL, flip_prob=0.5, rotate90_prob=0.5), PATCH, (1, 1, 1))
    moved = [augment(sample(), seed) for seed in range(20)]
    for after in moved:
        assert torch.equal(after["image"][0, 0], after["label"][0].float())
        assert after["label"].shape == (1, *PATCH)
    assert len({tuple(after["label"].flatten().tolist()) for after in moved}) > 5


def test_a_larger_crop_comes_back_in_the_patch_size_with_whole_labels():
    augment = Augmenter(replace(STILL, affine_prob=1.0), PATCH, (1, 1, 1))
    after = augment(sample((20, 24, 20)), 5)
    assert after["image"].shape == (1, 2, *PATCH) and after["label"].shape == (1, *PATCH)
    assert after["label"].dtype == torch.int64
    assert set(after["label"].unique().tolist()) <= {0, 1, 2, 3}


def test_an_affine_change_keeps_image_and_label_in_register():
    size = (28, 28, 28)
    label = torch.zeros((1, *size), dtype=torch.long)
    label[:, 10:18, 8:20, 12:16] = 1
    augment = Augmenter(replace(STILL, affine_prob=1.0), (20, 20, 20), (1, 1, 1))
    after = augment({"image": label[:, None].float(), "label": label}, 3)
    overlap = ((after["image"][0, 0] > 0.5).long() == after["label"][0]).float().mean()
    assert overlap > 0.99 and after["label"].sum() > 50


def test_intensity_changes_leave_the_label_alone():
    settings = replace(STILL, **dict.fromkeys(INTENSITY_PROBS, 1.0))
    after = Augmenter(settings, PATCH, (1, 1, 1))(sample(), 2)
    assert torch.equal(after["label"], sample()["label"])
    assert not torch.allclose(after["image"], sample()["image"], atol=1e-3)
    assert torch.isfinite(after["image"]).all()


@pytest.mark.parametrize("name", INTENSITY_PROBS)
def test_each_intensity_change_has_a_probability_of_its_own(name):
    augment = Augmenter(replace(STILL, **{name: 0.5}), PATCH, (1, 1, 1))
    changed = [not torch.equal(augment(sample(), seed)["image"], sample()["image"]) for seed in range(12)]
    assert any(changed) and not all(changed)


@pytest.mark.parametrize("name", ["blur_prob", "low_resolution_prob"])
def test_blur_and_lost_resolution_even_out_what_lies_side_by_side(name):
    settings = replace(STILL, **{name: 1.0}, blur_sigma=(1.0, 1.0), low_resolution_zoom=(0.5, 0.5))
    before, after = sample()["image"], Augmenter(settings, PATCH, (1, 1, 1))(sample(), 0)["image"]
    assert after.shape == before.shape
    assert after.diff(dim=-1).abs().mean() < 0.7 * before.diff(dim=-1).abs().mean()
    assert abs(after.mean() - before.mean()) < 0.1


def test_a_blur_leaves_an_even_image_even_up_to_its_borders():
    even = {"image": torch.full((1, 1, *PATCH), 0.7), "label": torch.zeros((1, *PATCH), dtype=torch.long)}
    after = Augmenter(replace(STILL, blur_prob=1.0), PATCH, (1, 1, 1))(even, 0)["image"]
    assert torch.allclose(after, torch.full_like(after, 0.7), atol=1e-5)


def test_a_sample_is_a_pure_function_of_its_seed_also_in_another_process():
    augment = Augmenter(Augmentation().planned({}, (1, 1, 1)), PATCH, (1, 1, 1))
    copy = pickle.loads(pickle.dumps(augment))
    copy(sample(), 99)
    first, second = augment(sample(), 7), copy(sample(), 7)
    assert torch.equal(first["image"], second["image"])
    assert not torch.equal(first["image"], augment(sample(), 8)["image"])


@pytest.mark.parametrize(
    ("labels", "axes"),
    [
        ({0: "background", 1: "liver"}, (0, 1, 2)),
        ({1: "Anterior", 2: "Posterior"}, (0, 2)),
        ({1: "left kidney", 2: "right_kidney"}, (1, 2)),
        ({1: "lung_upper_lobe_left"}, (1,)),
        ({1: "vertebrae_L1"}, (0, 1)),
        ({0: "left over", 1: "spleen"}, (0, 1, 2)),
    ],
)
def test_axes_along_which_a_label_has_a_side_are_not_mirrored(labels, axes):
    planned = Augmentation().planned(labels, (1, 1, 1))
    assert planned.flip_axes == axes


def test_explicit_axes_and_angles_win_over_the_plan():
    planned = Augmentation(flip_axes=(0,), rotation_degrees=(1, 2, 3)).planned({1: "left lung"}, (1, 1, 9))
    assert planned.flip_axes == (0,) and planned.rotation_degrees == (1, 2, 3)
    assert sided_labels({1: "left lung"}, 0) == ["left lung"]


def test_anisotropic_voxels_are_turned_in_the_plane_of_their_fine_axes_only():
    assert Augmentation().planned({}, (0.8, 0.8, 5.0)).rotation_degrees == (0.0, 0.0, 15.0)
    assert Augmentation().planned({}, (1.0, 1.0, 1.5)).rotation_degrees == (15.0, 15.0, 15.0)


def test_quarter_turns_need_equal_size_and_spacing():
    assert square_planes((0, 1, 2), (16, 16, 8), (1, 1, 1)) == [(0, 1)]
    assert square_planes((0, 1, 2), (16, 16, 16), (1, 1, 3)) == [(0, 1)]
    assert square_planes((0, 2), (16, 16, 16), (1, 1, 1)) == [(0, 2)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"flip_prob": 1.5}, "flip_prob is 1.5"),
        ({"zoom_ratio": 1.0}, "zoom_ratio"),
        ({"noise_std": -1}, "noise_std"),
        ({"gamma": (0, 1)}, "gamma"),
        ({"flip_axes": (3,)}, "flip_axes"),
        ({"blur_prob": -0.1}, "blur_prob is -0.1"),
        ({"blur_sigma": (2, 1)}, "blur_sigma"),
        ({"low_resolution_zoom": (0.5, 2)}, "low_resolution_zoom .* must not exceed 1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, named):
    with pytest.raises(ConfigError, match=named):
        Augmentation(**settings)
