"""The segmentation task: settings that fit, a network of any depth, losses that fall, Dice that is right."""

import math
from dataclasses import dataclass, field, replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

from mim3d.backbones import BACKBONES, Hybrid
from mim3d.backbones.contract import Backbone, Encoder
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.settings import to_mapping, to_named
from mim3d.core.types import Triple
from mim3d.datasets.cases import Case
from mim3d.scans.intensity import Intensity
from mim3d.tasks import TASKS, create_task
from mim3d.tasks.segmentation.decoders import DECODERS, ResidualBlock, UNetDecoder
from mim3d.tasks.segmentation.network import SegmentationObjective, shrunk
from mim3d.tasks.segmentation.targets import dice_by_name
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.tasks.trained import load_trained
from mim3d.weights import save_network
from tests.array_scans import ArrayScan
from tests.labelled import LABELS, ball_scan

BACKBONE = Hybrid(widths=(8, 16), depths=(1, 1), num_heads=2)


@dataclass(frozen=True, kw_only=True)
class Pools(Backbone):
    """Feature maps without learning: the decoder must take any strides and widths."""

    strides: tuple[int, ...] = (2, 4)
    widths: tuple[int, ...] = (4, 6)

    @property
    def encoder_class(self) -> type[Encoder]:
        return PoolEncoder

    @property
    def input_multiple(self) -> Triple:
        return (self.strides[-1],) * 3


class PoolEncoder(Encoder):
    def __init__(self, recipe: Pools) -> None:
        super().__init__()
        self.recipe, self.strides, self.widths = recipe, recipe.strides, recipe.widths
        self.layers = nn.ModuleList(
            nn.Conv3d(recipe.in_channels, width, stride, stride)
            for stride, width in zip(recipe.strides, recipe.widths, strict=True)
        )

    def feature_maps(self, volume_BCXYZ: torch.Tensor) -> list[torch.Tensor]:
        return [layer(volume_BCXYZ) for layer in self.layers]


@dataclass
class PlannedScan:
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    case: Case = field(default_factory=lambda: Case(id="scan", images=("scan.nii",), patient="scan"))


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
        Pools(strides=(1, 2, 4), widths=(3, 4, 6)),
        Pools(strides=(1,), widths=(3,)),
        Pools(in_channels=3),
        BACKBONE,
    ],
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_have_the_size_of_the_input_for_any_stages_and_non_cubic_patches(backbone, decoder):
    objective = Segmentation(feature_dim=4, decoder=decoder).build(backbone, LABELS)
    x, y, z = backbone.input_multiple
    size = (2 * x, 3 * y, z)
    logits = objective.logits(torch.randn(2, backbone.in_channels, *size))
    assert logits.shape == (2, 3, *size)


@pytest.mark.parametrize(
    ("stride", "strides", "widths"),
    [(16, (2, 4, 8, 16), (3, 5, 10, 20)), (8, (2, 4, 8), (5, 10, 20)), (6, (3, 6), (10, 20)), (2, (2,), (20,))],
)
def test_an_encoder_of_one_map_gets_a_pyramid(stride, strides, widths):
    decoder = Segmentation(feature_dim=4).build(Pools(strides=(stride,), widths=(20,)), LABELS).decoder
    assert (decoder.pyramid.strides, decoder.pyramid.widths) == (strides, widths)
    maps = decoder.pyramid(torch.randn(2, 20, 2, 3, 1))
    assert [tuple(each.shape) for each in maps] == [
        (2, width, 2 * stride // s, 3 * stride // s, stride // s) for s, width in zip(strides, widths, strict=True)
    ]
    assert Segmentation(feature_dim=4).build(Pools(), LABELS).decoder.pyramid is None


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("backbone", [Pools(), Pools(strides=(4,), widths=(6,))])
def test_every_parameter_of_encoder_stages_and_decoder_gets_a_gradient(backbone, decoder):
    objective = Segmentation(feature_dim=4, decoder=decoder).build(backbone, LABELS)
    batch = {"image": torch.randn(2, 1, 1, 8, 12, 8), "label": torch.randint(0, 2, (2, 1, 8, 12, 8)) * 2}
    objective(batch, 0.0).loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("backbone", [Pools(), Pools(strides=(4,), widths=(6,)), Pools(strides=(1, 2), widths=(3, 4))])
def test_a_crop_of_a_single_token_trains_in_a_batch_of_one(backbone, decoder):
    objective = Segmentation(feature_dim=4, decoder=decoder).build(backbone, LABELS)
    size = backbone.input_multiple
    batch = {"image": torch.randn(1, 1, 1, *size), "label": torch.randint(0, 2, (1, 1, *size)) * 2}
    loss = objective(batch, 0.0).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in objective.parameters())


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


def test_validation_gives_the_dice_of_every_label_that_is_seen_by_its_name():
    objective = Segmentation(feature_dim=4).build(Pools(), LABELS).eval()
    assert isinstance(objective, SegmentationObjective)
    scan = labelled_scan()
    # Two thresholds on the intensity solve these scans exactly, up to noise.
    objective.logits = lambda x: torch.cat([-(x - 0.10).abs(), -(x - 0.18).abs(), -(x - 0.26).abs()], 1) * 1e3
    task = Segmentation(patch_size=(16, 16, 16))
    scores = task.validate(objective, [scan], Intensity(window=(0.0, 1000.0)), LABELS)
    assert set(scores) == {"dice", "dice/ball", "dice/core"}
    assert scores["dice"] == pytest.approx((scores["dice/ball"] + scores["dice/core"]) / 2)
    assert scores["dice"] > 0.95


def test_the_same_few_scans_are_validated_every_time():
    task = Segmentation(patch_size=(8, 8, 8), feature_dim=4, num_validation_cases=1)
    objective = task.build(Pools(), LABELS).eval()
    scans = [labelled_scan(seed) for seed in range(3)]
    few = task.validate(objective, scans, Intensity(), LABELS)
    assert few == task.validate(objective, scans[:1], Intensity(), LABELS)


REGIONS = {"ball and core": (2, 5), "core": (5,)}


def test_regions_are_scored_by_name_and_pictures_show_label_values():
    objective = Segmentation(feature_dim=4, regions=REGIONS).build(Pools(), LABELS).eval()
    # Everything above each threshold is the region: the smaller one lies in the larger one.
    objective.logits = lambda x: torch.cat([x - 0.14, x - 0.22], 1) * 1e3
    task = Segmentation(patch_size=(16, 16, 16))
    scores = task.validate(objective, [labelled_scan()], Intensity(window=(0.0, 1000.0)), LABELS)
    assert set(scores) == {"dice", "dice/ball and core", "dice/core"}
    assert scores["dice"] > 0.95
    batch = {"image": torch.full((1, 1, 1, 8, 8, 8), 0.3), "label": torch.zeros(1, 1, 8, 8, 8).long()}
    assert objective.pictures(batch)["segmentation/prediction"].unique().tolist() == [5]


def test_dice_by_name_counts_overlap_over_both_sizes_and_leaves_out_what_is_absent_or_ignored():
    predicted = np.array([0, 2, 2, 5, 850])
    reference = np.array([2, 2, 0, 0, 9])
    structures = {"a": (2,), "b": (5,), "c": (7,), "d": (850,), "any": (2, 5)}
    dice = dice_by_name(predicted, reference, structures, ignore_label=9)
    assert dice["a"] == 0.5 and dice["b"] == 0.0 and dice["any"] == pytest.approx(2 * 1 / (2 + 3))
    assert math.isnan(dice["c"]) and math.isnan(dice["d"])
    assert dice_by_name(predicted, reference, structures)["d"] == 0.0


def test_validation_leaves_out_structures_that_a_scan_has_no_annotations_of():
    objective = Segmentation(feature_dim=4).build(Pools(), LABELS).eval()
    objective.logits = lambda x: torch.cat([-(x - 0.10).abs(), -(x - 0.18).abs(), -(x - 0.26).abs()], 1) * 1e3
    task = Segmentation(patch_size=(16, 16, 16))
    scan = PartialScan(labelled_scan().image, labelled_scan().label)
    scores = task.validate(objective, [scan], Intensity(window=(0.0, 1000.0)), LABELS)
    assert set(scores) == {"dice", "dice/core"}


@dataclass
class PartialScan(ArrayScan):
    """A scan of whose labels the core alone was annotated."""

    @property
    def case(self) -> Case:
        return Case(id="part", images=("part.nii",), patient="part", labelled=("core",))


def test_a_case_annotated_in_part_says_so_in_its_samples():
    scans = [labelled_scan(), PartialScan(labelled_scan().image, labelled_scan().label)]
    task = Segmentation(patch_size=(8, 8, 8)).planned(BACKBONE, scans, LABELS)
    assert any("annotated in part" in line for line in task.summary())
    drawn = [task.sampler().draw(scan, np.random.default_rng(0)) for scan in scans]
    assert [sample.arrays["annotated"].tolist() for sample in drawn] == [[True, True, True], [True, False, True]]
    whole = Segmentation(patch_size=(8, 8, 8)).planned(BACKBONE, scans[:1], LABELS)
    assert whole.sampler().draw(scans[0], np.random.default_rng(0)).arrays == {}
    batch = {"image": torch.randn(2, 1, 1, 8, 8, 8), "label": torch.full((2, 1, 8, 8, 8), 5)}
    batch["annotated"] = torch.tensor([sample.arrays["annotated"].tolist() for sample in drawn])
    assert torch.isfinite(task.build(BACKBONE, LABELS)(batch, 0.0).loss)


def test_an_annotated_label_that_the_data_set_lacks_is_named():
    scan = PlannedScan((16, 16, 16), case=Case(id="odd", images=("o",), patient="o", labelled=("cores",)))
    with pytest.raises(DataError, match=r"case odd is said to have annotations of 'cores'. Did you mean 'core'"):
        Segmentation().planned(BACKBONE, [scan], LABELS)


@pytest.mark.parametrize("settings", [{}, {"regions": REGIONS}, {"ignore_label": 5}])
def test_deep_supervision_gives_every_level_of_the_decoder_a_head_that_learns(settings):
    backbone = Pools(strides=(2, 4, 8), widths=(4, 4, 6))
    objective = Segmentation(feature_dim=4, deep_supervision=True, **settings).build(backbone, LABELS)
    assert len(objective.decoder.deep_heads) == 2
    batch = {"image": torch.randn(2, 1, 1, 16, 16, 16), "label": torch.randint(0, 2, (2, 1, 16, 16, 16)) * 2}
    output = objective(batch, 0.0)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert output.loss.item() == pytest.approx(sum(term.item() for term in output.logs.values()), rel=1e-5)
    assert objective.logits(batch["image"].flatten(0, 1)).shape[2:] == (16, 16, 16)


def test_targets_of_coarser_heads_are_the_voxels_in_the_middle():
    label = torch.arange(8).reshape(1, 8, 1, 1).expand(1, 8, 8, 8)
    assert shrunk(label, 4)[0, :, 0, 0].tolist() == [2, 6]
    assert shrunk(label, 1) is label


def test_a_frozen_encoder_stays_as_it_is_while_the_decoder_learns():
    objective = Segmentation(feature_dim=4, freeze_encoder=True).build(Pools(), LABELS).train()
    assert not objective.encoder.training and objective.decoder.training
    batch = {"image": torch.randn(1, 1, 1, 8, 8, 8), "label": torch.randint(0, 2, (1, 1, 8, 8, 8)) * 2}
    objective(batch, 0.0).loss.backward()
    assert all(parameter.grad is None for parameter in objective.encoder.parameters())
    assert all(parameter.grad is not None for parameter in objective.decoder.parameters())


def test_class_weights_of_a_label_that_there_is_not_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"class_weights names 'bal'. Did you mean 'ball'"):
        Segmentation(class_weights={"bal": 2.0}).planned(BACKBONE, [PlannedScan((16, 16, 16))], LABELS)


def test_crops_are_not_centred_on_ignored_voxels():
    task = Segmentation(patch_size=(4, 4, 4), positive_ratio=1.0, ignore_label=2)
    sampler = replace(task, augmentation=replace(task.augmentation, affine_prob=0.0)).sampler()
    scan = ArrayScan(np.zeros((1, 40, 40, 40)), class_locations={2: np.array([[9, 9, 9]]), 5: np.array([[30, 30, 30]])})
    for seed in range(5):
        (read,) = sampler.draw(scan, np.random.default_rng(seed)).images["image"]
        assert read.origin == (28, 28, 28)


def test_regions_and_weights_by_name_come_from_yaml_and_go_back_in_their_order():
    values = {"name": "segmentation", "regions": {"b": [1, 2], "a": [2]}, "class_weights": {"a": "2"}}
    task = create_task(values)
    assert list(task.regions) == ["b", "a"] and task.regions["b"] == (1, 2) and task.class_weights == {"a": 2.0}
    assert create_task({"name": "segmentation", **to_mapping(task)}) == task


def test_a_region_that_names_a_side_is_not_mirrored_though_no_label_does():
    task = Segmentation(regions={"both lungs": (2, 5), "left lung": (5,)})
    assert task.planned(BACKBONE, [PlannedScan((16, 16, 16))], LABELS).augmentation.flip_axes == (1, 2)


def test_the_setting_names_every_decoder_there_is():
    named, _ = get_args(get_type_hints(Segmentation)["decoder"])
    assert set(get_args(named)) == set(DECODERS)


def test_a_network_from_before_decoders_had_names_has_the_unet(tmp_path):
    settings = Segmentation(feature_dim=4, patch_size=(16, 16, 16), decoder="unet")
    card = {
        "backbone": to_named(BACKBONE, BACKBONES),
        "task": to_named(settings, TASKS),
        "labels": {"0": "background", "2": "liver"},
    }
    card |= {"spacing_mm": None, "intensity": {"kind": "zscore", "window": None}}
    del card["task"]["decoder"]
    save_network(tmp_path / "segmenter", settings.build(BACKBONE, {0: "background", 2: "liver"}), card)
    assert isinstance(load_trained(tmp_path).module.decoder, UNetDecoder)


def test_the_adapter_adds_a_path_of_convolutions_to_the_maps_of_the_encoder():
    decoder = Segmentation(feature_dim=4, decoder="adapter").build(Pools(), LABELS).decoder.eval()
    plain = Segmentation(feature_dim=4, decoder="additive").build(Pools(), LABELS).decoder.eval()
    plain.load_state_dict({name: value for name, value in decoder.state_dict().items() if not name.startswith("downs")})
    volume = torch.randn(1, 1, 8, 8, 8)
    maps = Pools().build()(volume)
    skips, without = decoder._skips(volume, maps), plain._skips(volume, maps)
    assert torch.equal(skips[0], without[0])
    path = skips[0]
    for down, skip, alone in zip(decoder.downs, skips[1:], without[1:], strict=True):
        path = down(path)
        assert path.shape == alone.shape and torch.equal(skip, alone + path)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_residual_block_is_two_normed_convolutions_around_which_the_input_goes(stride):
    block = ResidualBlock(3, 5, stride)
    volume = torch.randn(2, 3, 4, 8, 6)
    inner = nn.functional.leaky_relu(instance_norm(block.conv1(volume)), 0.01)
    expected = instance_norm(block.conv2(inner)) + instance_norm(block.residual(volume))
    assert torch.allclose(block(volume), nn.functional.leaky_relu(expected, 0.01), atol=1e-4)


def instance_norm(features: torch.Tensor) -> torch.Tensor:
    spread, middle = torch.std_mean(features, (2, 3, 4), correction=0, keepdim=True)
    return (features - middle) / (spread**2 + 1e-5).sqrt()
