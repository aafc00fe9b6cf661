"""The classification task: what it plans, what it refuses, a network that learns, and scores that are right."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from mim3d.backbones import Hybrid
from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import Case
from mim3d.datasets.splits import Split
from mim3d.loading.samples import SampleDataset
from mim3d.scans.intensity import Intensity
from mim3d.tasks import create_task
from mim3d.tasks.augmentation import Augmentation
from mim3d.tasks.classification.network import AttentionPool, ClassificationObjective
from mim3d.tasks.classification.task import Classification, class_scores
from tests.array_scans import ArrayScan

BACKBONE = Hybrid(widths=(8, 16), depths=(1, 1), num_heads=2)
LABELS = {0: "large", 1: "small"}
WINDOW = Intensity(window=(0.0, 1.0))
STILL = Augmentation(flip_axes=(), affine_prob=0, scale_prob=0, shift_prob=0, noise_prob=0, gamma_prob=0)


def scan_of(name: str, seed: int = 0, spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> ArrayScan:
    """A ball of 9 or 3 mm in radius in noise, with its label."""
    rng = np.random.default_rng(seed)
    shape = tuple(round(24 / edge) for edge in spacing_mm)
    places = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1) * spacing_mm
    distance = np.linalg.norm(places - 12 - rng.uniform(-2, 2, 3), axis=-1)
    label = (distance < (9 if name == "large" else 3)).astype(np.uint8)
    image = (0.2 + 0.6 * label + rng.normal(0, 0.05, shape))[None].astype(np.float32)
    places_of_label = {1: np.argwhere(label).astype(np.int32)}
    return ArrayScan(image, label, f"{name}_{seed}", places_of_label, spacing_mm, class_name=name)


def scans_of(number: int) -> list[ArrayScan]:
    spacings = [(1.0, 1.0, 1.0), (0.8, 0.8, 2.0)]
    return [scan_of(("large", "small")[index % 2], index, spacings[index // 2 % 2]) for index in range(number)]


def case_of(name: str | None, number: int) -> Case:
    return Case(id=f"case_{number}", images=(f"{number}.nii",), patient=str(number), class_name=name)


def test_box_size_and_centre_are_planned_from_scans_of_mixed_voxel_sizes():
    scans = [scan_of("large", 0), scan_of("small", 1, (0.8, 0.8, 2.0))]
    planned = Classification(centre="scan").planned(BACKBONE, scans, LABELS)
    assert planned.cube_mm == pytest.approx((24.0, 24.0, 24.0), abs=0.1)
    assert planned.size == (28, 28, 16)
    assert planned.covered == 1.0
    around = Classification().planned(BACKBONE, scans, LABELS)
    assert around.centre == "label"
    assert around.cube_mm == pytest.approx((26.0, 26.0, 26.0), abs=1.0)
    scans[0].class_locations = {}
    assert Classification().planned(BACKBONE, scans, LABELS).centre == "scan"
    with pytest.raises(ConfigError, match="not every training scan has a label"):
        Classification(centre="label").planned(BACKBONE, scans, LABELS)


def test_the_summary_tells_the_box_the_share_it_holds_and_the_counts_with_their_weights():
    scans = [scan_of("large", 0), scan_of("small", 1), scan_of("small", 2), scan_of("small", 3)]
    planned = Classification(cube_mm=12, size=8).planned(BACKBONE, scans, LABELS)
    text = " ".join(planned.summary())
    assert "boxes of 12 x 12 x 12 mm around the label's centre of mass, seen as 8 x 8 x 8 voxels of 1.5" in text
    assert "75% of the labelled structures" in text
    assert "large 1 scan (weight 2), small 3 scans (weight 0.667)" in text
    assert planned.class_weights == pytest.approx((2.0, 2 / 3))
    given = Classification(cube_mm=12, size=8, class_weights=(1.0, 5.0)).planned(BACKBONE, scans, LABELS)
    assert given.class_weights == (1.0, 5.0)


def test_whole_scans_are_stretched_where_voxels_have_no_known_size():
    planned = Classification(fit="scan").planned(BACKBONE, [scan_of("large"), scan_of("small", 1)], LABELS)
    assert planned.size == (24, 24, 24)
    assert planned.cube().voxel_mm is None
    assert "whole scans" in planned.summary()[0]
    with pytest.raises(ConfigError, match="fit scan"):
        Classification(fit="scan", cube_mm=40)


def test_a_size_that_does_not_fit_the_tokens_is_refused_with_sizes_that_do():
    with pytest.raises(ConfigError, match=r"size axis X \(30\) is not a multiple of stride 4; use 28 or 32"):
        Classification(size=30).checked(BACKBONE)


def test_boxes_may_only_be_mirrored_as_they_were_in_training_the_first_class_included():
    labels = {0: "left", 1: "other"}
    scans = [scan_of("large"), scan_of("small", 1)]
    with pytest.raises(ConfigError, match="the class 'left'"):
        Classification(mirror_axes=(0,)).planned(BACKBONE, scans, labels)
    assert Classification(mirror_axes=(0,)).planned(BACKBONE, scans, LABELS).augmentation.flip_axes == (0, 1, 2)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (["a", None], [], "no class for case_1"),
        (["a", "a"], [], "all training cases are of class 'a'"),
        (["a", "b"], ["c"], "class c is among the held-out cases"),
    ],
)
def test_cases_that_cannot_be_learned_from_are_refused(train, val, message):
    split = Split(
        train=tuple(case_of(name, index) for index, name in enumerate(train)),
        val=tuple(case_of(name, index + 10) for index, name in enumerate(val)),
    )
    with pytest.raises(DataError, match=message):
        Classification().check_split(split)


def test_boxes_around_labels_need_a_label_of_every_case():
    split = Split(train=(case_of("a", 0), case_of("b", 1)), val=())
    with pytest.raises(DataError, match="no label for case_0, case_1"):
        Classification(centre="label").check_split(split)


def test_weights_of_another_number_of_classes_are_refused():
    split = Split(train=(case_of("a", 0), case_of("b", 1)), val=())
    Classification(class_weights=(1.0, 2.0)).check_split(split)
    with pytest.raises(ConfigError, match=r"class_weights has 3 values, but the data have 2 classes: a, b"):
        Classification(class_weights=(1.0, 2.0, 3.0)).check_split(split)


@pytest.mark.parametrize(
    "settings",
    [{"dropout": 1.0}, {"cube_mm": 0}, {"mirror_axes": (3,)}, {"class_weights": (0.0, 0.0)}, {"label_smoothing": -0.1}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError):
        Classification(**settings)


def test_a_task_comes_by_name_with_a_number_or_three_for_its_box():
    task = create_task({"name": "classification", "cube_mm": 48, "size": [32, 32, 16], "class_weights": [1, 2]})
    assert task == Classification(cube_mm=48.0, size=(32, 32, 16), class_weights=(1.0, 2.0))
    assert create_task({"name": "classification", "size": 32}).size == 32
    with pytest.raises(ConfigError, match="pooling"):
        create_task({"name": "classification", "pooling": "max"})


def test_attention_pooling_is_a_mean_whose_weights_follow_the_tokens():
    pool = AttentionPool(6)
    tokens = torch.randn(2, 5, 6)
    same = tokens[:, :1].expand(-1, 5, -1)
    assert torch.allclose(pool(same), same[:, 0], atol=1e-6)
    assert not torch.allclose(pool(tokens), tokens.mean(1), atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_every_parameter_gets_a_gradient_and_terms_are_logged_by_name(pooling):
    objective = Classification(pooling=pooling).build(BACKBONE, LABELS)
    batch = {"image": torch.randn(3, 1, 1, 8, 8, 12), "class": torch.tensor([[0], [1], [1]])}
    output = objective(batch, 0.0)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert set(output.logs) == {"loss/cross_entropy", "accuracy"}
    assert objective.pictures(batch)["classification/image"].shape == (8, 8, 12)


def test_a_frozen_encoder_stays_as_it_is_and_computes_without_gradients():
    objective = Classification(freeze_encoder=True).build(BACKBONE, LABELS).train()
    assert not objective.encoder.training and objective.pool.training
    objective({"image": torch.randn(2, 1, 1, 8, 8, 8), "class": torch.tensor([[0], [1]])}, 0.0).loss.backward()
    assert all(parameter.grad is None for parameter in objective.encoder.parameters())
    assert objective.head.weight.grad is not None


def test_the_loss_weighs_classes_and_smooths_labels():
    batch = {"image": torch.randn(2, 1, 1, 8, 8, 8), "class": torch.tensor([[0], [1]])}
    losses = {}
    for name, settings in {
        "plain": {},
        "weighed": {"class_weights": (1.0, 9.0)},
        "smooth": {"label_smoothing": 0.5},
    }.items():
        torch.manual_seed(0)
        objective = Classification(dropout=0.0, **settings).build(BACKBONE, LABELS)
        torch.nn.init.normal_(objective.head.weight, std=2.0)
        losses[name] = objective(batch, 0.0).loss.item()
    logits = objective.logits(batch["image"][:, 0]).log_softmax(1)
    one, other = -logits[0, 0].item(), -logits[1, 1].item()
    assert losses["plain"] == pytest.approx((one + other) / 2, rel=1e-5)
    assert losses["weighed"] == pytest.approx((one + 9 * other) / 10, rel=1e-5)
    assert losses["smooth"] == pytest.approx(losses["plain"] / 2 - logits.mean().item() / 2, rel=1e-5)


def test_probabilities_are_averaged_over_every_combination_of_mirrored_axes():
    objective = Classification().build(BACKBONE, LABELS).eval()
    volume = torch.randn(1, 1, 8, 8, 8)
    turned = [objective.probabilities(volume.flip(axes) if axes else volume) for axes in ([], [2], [4], [2, 4])]
    assert torch.allclose(objective.probabilities(volume, (0, 2)), torch.stack(turned).mean(0), atol=1e-6)
    assert math.isclose(objective.probabilities(volume, (0, 2)).sum().item(), 1.0, rel_tol=1e-5)


def test_validation_computes_in_float32_whatever_the_precision_of_the_run(monkeypatch):
    task = Classification(cube_mm=24, size=16)
    objective = task.build(BACKBONE, LABELS).eval()
    found = []
    compute = objective.probabilities
    monkeypatch.setattr(objective, "probabilities", lambda *given: found.append(compute(*given)) or found[-1])
    for is_mixed in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            task.validate(objective, scans_of(4), WINDOW, LABELS)
    assert torch.equal(found[0], found[1])


def test_a_network_learns_to_tell_sizes_apart_that_differ_in_millimetres_not_in_voxels():
    torch.manual_seed(0)
    scans = scans_of(16)
    task = Classification(cube_mm=24, size=16, augmentation=STILL, dropout=0.0).planned(BACKBONE, scans, LABELS)
    objective = task.build(BACKBONE, LABELS)
    assert isinstance(objective, ClassificationObjective)
    dataset = SampleDataset(scans, task.sampler(), WINDOW, 0, task.augment())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    for step in range(60):
        batch = default_collate([dataset[8 * step + index] for index in range(8)])
        optimizer.zero_grad()
        objective(batch, 0.0).loss.backward()
        optimizer.step()
    scores = task.validate(objective.eval(), scans_of(24)[16:], WINDOW, LABELS)
    assert set(scores) == {"auc", "accuracy", "balanced_accuracy", "f1_macro"}
    assert scores["auc"] > 0.9


def test_patients_are_scored_by_the_mean_of_their_scans_where_each_has_one_class():
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7], [0.4, 0.6], [0.45, 0.55]])
    scores = class_scores(probabilities, np.array([0, 0, 1, 1]), ["p", "p", "q", "r"])
    assert scores["auc"] == 0.5 and scores["accuracy"] == 0.75
    assert scores["auc_patient"] == 1.0 and scores["accuracy_patient"] == 1.0


def test_patients_with_scans_of_several_classes_or_one_each_are_not_scored():
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7], [0.4, 0.6]])
    for patients in (["p", "p", "q"], ["p", "q", "r"]):
        assert "auc_patient" not in class_scores(probabilities, np.array([0, 1, 1]), patients)
    assert np.isnan(class_scores(probabilities[:1], np.array([0]), ["p"])["auc"])
