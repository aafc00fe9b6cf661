"""The segmentation task: settings that fit, a network of any depth, losses that fall, Dice that is right."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from mim3d.backbones import Hybrid
from mim3d.backbones.base import Backbone, Encoder
from mim3d.data.transforms import Intensity
from mim3d.errors import ConfigError
from mim3d.tasks import create_task
from mim3d.tasks.segmentation import Segmentation, class_values
from mim3d.tasks.segmentation_objective import SegmentationObjective
from mim3d.tasks.validation import dice_of_scans, dice_per_label
from tests.labelled import LABELS, ball_scan
from tests.scans import ArrayScan

BACKBONE = Hybrid(widths=(8, 16), depths=(1, 1), num_heads=2)


@dataclass(frozen=True, kw_only=True)
class Pools(Backbone):
    """Feature maps without learning: the decoder must take any strides and widths."""

    strides: tuple[int, ...] = (2, 4)
    widths: tuple[int, ...] = (4, 6)

    @property
    def patch_size(self) -> int:
        return self.strides[-1]

    def build(self) -> Encoder:
        return PoolEncoder(self)


class PoolEncoder(Encoder):
    def __init__(self, recipe: Pools) -> None:
        super().__init__()
        self.recipe, self.strides, self.widths = recipe, recipe.strides, recipe.widths
        self.patch_size, self.embed_dim = recipe.patch_size, recipe.widths[-1]
        self.layers = nn.ModuleList(
            nn.Conv3d(recipe.in_channels, width, stride, stride)
            for stride, width in zip(recipe.strides, recipe.widths, strict=True)
        )

    def encode_visible(self, volume_BCXYZ: torch.Tensor, visible_BV: torch.Tensor) -> torch.Tensor:
        raise AssertionError("segmentation hides nothing")

    def feature_maps(self, volume_BCXYZ: torch.Tensor) -> list[torch.Tensor]:
        return [layer(volume_BCXYZ) for layer in self.layers]


@dataclass
class PlannedScan:
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)


def labelled_scan(seed: int = 0) -> ArrayScan:
    image, label = ball_scan(seed)
    places = {int(value): np.argwhere(label == value) for value in np.unique(label) if value}
    return ArrayScan(image[None], label, class_locations=places)


@pytest.mark.parametrize(
    "backbone",
    [
        Pools(),
        Pools(strides=(2, 4, 8, 16), widths=(4, 4, 6, 8)),
        Pools(strides=(4, 16), widths=(6, 8)),
        Pools(strides=(8,), widths=(5,)),
        Pools(in_channels=3),
        BACKBONE,
    ],
)
def test_logits_have_the_size_of_the_input_for_any_stages_and_non_cubic_patches(backbone):
    objective = Segmentation(feature_dim=4).build(backbone, LABELS)
    size = (2 * backbone.patch_size, 3 * backbone.patch_size, backbone.patch_size)
    logits = objective.logits(torch.randn(2, backbone.in_channels, *size))
    assert logits.shape == (2, 3, *size)


def test_every_parameter_of_encoder_stages_and_decoder_gets_a_gradient():
    objective = Segmentation(feature_dim=4).build(Pools(), LABELS)
    batch = {"image": torch.randn(2, 1, 1, 8, 12, 8), "label": torch.randint(0, 2, (2, 1, 8, 12, 8)) * 2}
    objective(batch, 0.0).loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_a_perfect_prediction_has_almost_no_loss_and_terms_are_logged_by_name():
    objective = Segmentation(feature_dim=4).build(Pools(), LABELS)
    label = torch.tensor([0, 2, 5])[torch.randint(0, 3, (2, 1, 8, 8, 8))]
    classes = torch.searchsorted(torch.tensor([0, 2, 5]), label[:, 0])
    objective.logits = lambda _: 100.0 * nn.functional.one_hot(classes, 3).movedim(-1, 1).float()
    output = objective({"image": torch.zeros(2, 1, 1, 8, 8, 8), "label": label}, 0.0)
    assert output.loss < 1e-3
    assert set(output.logs) == {"loss/dice", "loss/cross_entropy"}


def test_loss_weights_and_the_background_setting_are_kept():
    batch = {"image": torch.randn(1, 1, 1, 8, 8, 8), "label": torch.randint(0, 2, (1, 1, 8, 8, 8)) * 5}
    losses = {}
    for name, settings in {
        "both": {},
        "dice": {"cross_entropy_weight": 0.0},
        "entropy": {"dice_weight": 0.0},
        "background": {"background_in_dice": True, "cross_entropy_weight": 0.0},
    }.items():
        torch.manual_seed(0)
        losses[name] = Segmentation(feature_dim=4, **settings).build(Pools(), LABELS)(batch, 0.0).loss.item()
    assert math.isclose(losses["both"], losses["dice"] + losses["entropy"], rel_tol=1e-5)
    assert not math.isclose(losses["dice"], losses["background"], rel_tol=1e-3)


def test_pictures_show_image_reference_and_prediction_in_label_values():
    objective = Segmentation(feature_dim=4).build(Pools(), LABELS).eval()
    batch = {"image": torch.randn(2, 1, 1, 8, 12, 8), "label": torch.full((2, 1, 8, 12, 8), 5)}
    pictures = objective.pictures(batch)
    assert set(pictures) == {"segmentation/image", "segmentation/reference", "segmentation/prediction"}
    assert all(picture.shape == (8, 12, 8) for picture in pictures.values())
    assert set(pictures["segmentation/prediction"].unique().tolist()) <= {0, 2, 5}


@pytest.mark.parametrize(
    ("patch_size", "message"),
    [
        ((10, 16, 16), r"patch_size axis X \(10\) is not a multiple of stride 4; use 8 or 12"),
        ((16, 16, 2), r"patch_size axis Z \(2\) is not a multiple of stride 4; use 4\."),
        ((4, 4, 4), "single token"),
    ],
)
def test_a_patch_that_does_not_fit_the_tokens_is_refused_with_sizes_that_do(patch_size, message):
    with pytest.raises(ConfigError, match=message):
        Segmentation(patch_size=patch_size).checked(BACKBONE)


def test_a_planned_patch_holds_the_median_scan_in_whole_tokens_up_to_a_limit():
    scans = [PlannedScan((35, 50, 300)), PlannedScan((33, 51, 200)), PlannedScan((90, 52, 250))]
    planned = Segmentation().planned(BACKBONE, scans, LABELS)
    assert planned.patch_size == (36, 52, 96)
    assert Segmentation().planned(BACKBONE, [PlannedScan((3, 3, 3))], LABELS).patch_size == (8, 8, 8)


def test_windows_may_only_be_mirrored_as_crops_were():
    labels = {0: "background", 1: "left kidney"}
    with pytest.raises(ConfigError, match="left kidney"):
        Segmentation(mirror_axes=(0,)).planned(BACKBONE, [PlannedScan((16, 16, 16))], labels)
    assert Segmentation(mirror_axes=(1, 2)).planned(BACKBONE, [PlannedScan((16, 16, 16))], labels).mirror_axes == (1, 2)


def test_a_task_comes_by_name_with_nested_settings_and_unknown_ones_are_refused():
    task = create_task({"name": "segmentation", "patch_size": [8, 8, 8], "augmentation": {"flip_axes": [0]}})
    assert task == Segmentation(patch_size=(8, 8, 8), augmentation=task.augmentation)
    assert task.augmentation.flip_axes == (0,)
    with pytest.raises(ConfigError, match="segmentation"):
        create_task("segmentatoin")
    with pytest.raises(ConfigError, match="positive_ratio"):
        create_task({"name": "segmentation", "positive_ration": 0.1})


@pytest.mark.parametrize(
    "settings",
    [{"positive_ratio": 2}, {"feature_dim": 0}, {"overlap": 1.0}, {"dice_weight": 0, "cross_entropy_weight": 0}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError):
        Segmentation(**settings)


def test_classes_are_background_first_whatever_is_declared():
    assert class_values({5: "b", 0: "background", 2: "a"}) == (0, 2, 5)
    assert class_values({1: "a"}) == (0, 1)


def test_dice_counts_overlap_over_both_sizes_and_leaves_out_what_is_absent():
    predicted = np.array([0, 2, 2, 5])
    reference = np.array([2, 2, 0, 0])
    dice = dice_per_label(predicted, reference, [2, 5, 7])
    assert dice[2] == 0.5 and dice[5] == 0.0 and math.isnan(dice[7])


def test_validation_gives_the_dice_of_every_label_that_is_seen_by_its_name():
    objective = Segmentation(feature_dim=4).build(Pools(), LABELS).eval()
    assert isinstance(objective, SegmentationObjective)
    scan = labelled_scan()
    # Two thresholds on the intensity solve these scans exactly, up to noise.
    objective.logits = lambda x: torch.cat([-(x - 0.10).abs(), -(x - 0.18).abs(), -(x - 0.26).abs()], 1) * 1e3
    windows = Segmentation(patch_size=(16, 16, 16)).windows()
    scores = dice_of_scans(objective, [scan], Intensity(window=(0.0, 1000.0)), windows, LABELS)
    assert set(scores) == {"dice", "dice/ball", "dice/core"}
    assert scores["dice"] == pytest.approx((scores["dice/ball"] + scores["dice/core"]) / 2)
    assert scores["dice"] > 0.95


def test_the_same_few_scans_are_validated_every_time():
    task = Segmentation(patch_size=(8, 8, 8), feature_dim=4, num_validation_cases=1)
    objective = task.build(Pools(), LABELS).eval()
    scans = [labelled_scan(seed) for seed in range(3)]
    few = task.validate(objective, scans, Intensity(), LABELS)
    assert few == task.validate(objective, scans[:1], Intensity(), LABELS)
