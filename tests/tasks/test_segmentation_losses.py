"""Terms of the loss are what their papers say, and count nothing where nothing is known."""

import pytest
import torch
from monai.losses.dice import DiceLoss
from torch.nn import functional as F

from mim3d.tasks.segmentation.network import SegmentationLoss, head_weights
from mim3d.tasks.segmentation.task import Segmentation
from tests.tasks.test_targets import BRATS, REGIONS

LABEL = torch.randint(0, 4, (2, 4, 4, 4), generator=torch.Generator().manual_seed(0))
LOGITS = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(1))
EXCLUSIVE = Segmentation().targets(BRATS)
NESTED = Segmentation(regions=REGIONS).targets(BRATS)


def terms(targets, logits=LOGITS, label=LABEL, annotated=None, **settings):
    return SegmentationLoss(targets, Segmentation(**settings))(logits, label, annotated)


def test_dice_and_cross_entropy_are_those_of_the_libraries():
    found = terms(EXCLUSIVE, batch_dice=False)
    dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True)
    assert torch.isclose(found["dice"], dice(LOGITS, LABEL[:, None]))
    assert torch.isclose(found["cross_entropy"], F.cross_entropy(LOGITS, LABEL))


def test_regions_have_a_dice_and_a_binary_cross_entropy_of_their_own():
    truth = torch.stack([LABEL >= 1, LABEL >= 2, LABEL >= 3], dim=1).float()
    found = terms(NESTED, LOGITS[:, :3])
    assert torch.isclose(found["dice"], DiceLoss(sigmoid=True, batch=True)(LOGITS[:, :3], truth))
    assert torch.isclose(found["cross_entropy"], F.binary_cross_entropy_with_logits(LOGITS[:, :3], truth))


def test_class_weights_weigh_the_cross_entropy_by_name():
    found = terms(EXCLUSIVE, class_weights={"enhancing": 4.0, "background": 0.5})
    weight = torch.tensor([0.5, 1, 1, 4])
    assert torch.isclose(found["cross_entropy"], F.cross_entropy(LOGITS, LABEL, weight=weight))


def test_top_k_counts_the_worst_voxels_alone():
    entropy = F.cross_entropy(LOGITS, LABEL, reduction="none").flatten()
    found = terms(EXCLUSIVE, top_k_ratio=0.1)
    assert torch.isclose(found["cross_entropy"], entropy.topk(12).values.mean())


@pytest.mark.parametrize(("targets", "number"), [(EXCLUSIVE, 4), (NESTED, 3)])
def test_focal_loss_without_its_exponent_is_cross_entropy_and_falls_with_it(targets, number):
    found = terms(targets, LOGITS[:, :number], focal_weight=1.0, focal_gamma=0.0)
    assert torch.isclose(found["focal"], found["cross_entropy"])
    assert terms(targets, LOGITS[:, :number], focal_weight=1.0)["focal"] < found["focal"]


@pytest.mark.parametrize("regions", [None, REGIONS])
@pytest.mark.parametrize("top_k_ratio", [1.0, 0.2])
def test_what_is_predicted_at_ignored_voxels_changes_no_term_and_gets_no_gradient(regions, top_k_ratio):
    labels = {**BRATS, 9: "unsure"}
    targets = Segmentation(regions=regions, ignore_label=9).targets(labels)
    label = LABEL.clone()
    label[:, :2] = 9
    logits = LOGITS[:, : len(targets.names)].clone().requires_grad_()
    other = logits.detach().clone()
    other[:, :, :2] = torch.randn(other[:, :, :2].shape) * 10
    weights = {"focal_weight": 1.0, "top_k_ratio": top_k_ratio, "background_in_dice": True}
    found, again = terms(targets, logits, label, **weights), terms(targets, other, label, **weights)
    assert all(torch.isclose(found[name], again[name]) for name in ("dice", "cross_entropy", "focal"))
    torch.stack(list(found.values())).sum().backward()
    assert logits.grad[:, :, :2].abs().max() == 0 and logits.grad[:, :, 2:].abs().max() > 0


def test_nothing_known_at_all_is_no_loss_instead_of_no_number():
    targets = Segmentation(ignore_label=3).targets(BRATS)
    found = terms(targets, LOGITS[:, :3], torch.full_like(LABEL, 3), focal_weight=1.0)
    assert all(torch.isfinite(term) for term in found.values())
    assert found["cross_entropy"] == 0


def test_labels_without_annotations_count_as_background_in_the_marginal_loss():
    annotated = torch.tensor([[True, True, False, False], [True, True, True, True]])
    label = LABEL.clone()
    label[0][label[0] > 1] = 0
    found = terms(EXCLUSIVE, label=label, annotated=annotated, dice_weight=0.0)
    probabilities = LOGITS.softmax(1)
    first = torch.where(label[0] == 1, probabilities[0, 1], 1 - probabilities[0, 1]).log()
    second = -F.cross_entropy(LOGITS[1:], label[1:], reduction="none")[0]
    assert torch.isclose(found["cross_entropy"], -torch.cat([first.flatten(), second.flatten()]).mean(), atol=1e-6)


def test_a_prediction_of_what_was_not_annotated_is_no_mistake():
    annotated = torch.tensor([[True, True, False, False]])
    label = torch.zeros((1, 4, 4, 4), dtype=torch.long)
    label[:, :2] = 1
    sure = 40.0 * F.one_hot(torch.where(label == 1, 1, 2), 4).movedim(-1, 1).float()
    found = terms(EXCLUSIVE, sure, label, annotated)
    assert found["dice"] < 1e-4 and found["cross_entropy"] < 1e-4
    assert terms(EXCLUSIVE, sure, label)["cross_entropy"] > 1
    logits = LOGITS[:1].clone().requires_grad_()
    torch.stack(list(terms(EXCLUSIVE, logits, label, annotated).values())).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_regions_that_a_case_has_no_annotations_of_are_left_out():
    annotated = torch.tensor([[True, False, True], [True, True, True]])
    logits = LOGITS[:, :3].clone().requires_grad_()
    torch.stack(list(terms(NESTED, logits, annotated=annotated).values())).sum().backward()
    assert logits.grad[0, 1].abs().max() == 0
    assert logits.grad[0, 0].abs().max() > 0 and logits.grad[1, 1].abs().max() > 0


def test_heads_weigh_half_as_much_at_each_coarser_level_and_one_together():
    assert head_weights(3) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
