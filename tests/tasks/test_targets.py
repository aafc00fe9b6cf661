"""What channels stand for: labels that exclude each other, and regions that lie in one another."""

import pytest
import torch

from mim3d.core.errors import ConfigError
from mim3d.tasks.segmentation.targets import channels_of, derived_values
from mim3d.tasks.segmentation.task import Segmentation

BRATS = {0: "background", 1: "oedema", 2: "non-enhancing", 3: "enhancing"}
REGIONS = {"whole tumour": (1, 2, 3), "tumour core": (2, 3), "enhancing tumour": (3,)}


def test_labels_are_channels_background_first_whatever_is_declared():
    targets = Segmentation().targets({5: "b", 0: "background", 2: "a"})
    assert targets.label_values == (0, 2, 5) and targets.names == ("background", "a", "b")
    assert targets.activation == "softmax" and targets.structures == {"a": (2,), "b": (5,)}
    assert Segmentation().targets({1: "a"}).names == ("background", "a")


def test_an_ignored_label_has_no_channel():
    targets = Segmentation(ignore_label=7).targets({0: "background", 1: "liver", 7: "unsure"})
    assert targets.label_values == (0, 1)
    assert targets.known(torch.tensor([0, 1, 7])).tolist() == [True, True, False]


def test_nested_regions_give_the_label_value_that_no_later_one_covers():
    assert derived_values(REGIONS) == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"'all' could give any of the label values \[1, 2\].*set region_values"):
        derived_values({"all": (1, 2)})
    with pytest.raises(ConfigError, match=r"'core' could give .*none that no later region covers"):
        derived_values({"core": (3,), "whole": (1, 3)})


def test_regions_of_label_values_come_back_from_their_channels():
    targets = Segmentation(regions=REGIONS).targets(BRATS)
    label = torch.tensor([0, 1, 2, 3]).reshape(1, 4, 1, 1)
    channels = channels_of(label, targets.table())
    assert channels[0, :, :, 0, 0].tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert torch.equal(targets.labels_of(channels[0]), label[0])
    assert torch.equal(targets.labels_of(targets.probabilities(20 * channels[0] - 10)), label[0])


def test_a_later_region_paints_over_an_earlier_one_also_with_values_of_its_own():
    targets = Segmentation(regions=REGIONS, region_values=(10, 20, 40)).targets(BRATS)
    assert targets.labels_of(torch.tensor([0.9, 0.4, 0.6])).item() == 40
    assert targets.labels_of(torch.tensor([0.9, 0.4, 0.4])).item() == 10
    assert targets.labels_of(torch.tensor([0.5, 0.5, 0.5])).item() == 0


@pytest.mark.parametrize("settings", [{}, {"regions": REGIONS}])
def test_probabilities_are_of_the_axis_that_is_named(settings):
    targets = Segmentation(**settings).targets(BRATS)
    logits = torch.randn(2, len(targets.names), 3, 3, 3)
    both = targets.probabilities(logits, dim=1)
    assert torch.allclose(both[1], targets.probabilities(logits[1]))
    assert torch.allclose(both.sum(1), torch.ones(2, 3, 3, 3)) == (not settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regions": {"whole": (1, 4)}, "region_values": (1,)}, "region 'whole' names label value 4.*one of 1, 2, 3"),
        ({"regions": {"whole": (0,)}, "region_values": (1,)}, "label value 0"),
        ({"ignore_label": 9}, "ignore_label is 9, which is none of the label values 0, 1, 2, 3"),
    ],
)
def test_labels_that_the_data_set_lacks_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Segmentation(**settings).targets(BRATS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"region_values": (1,)}, "there are no regions"),
        ({"regions": {}}, "one region or more"),
        ({"regions": {"whole": ()}}, "one region or more"),
        ({"regions": REGIONS, "region_values": (1, 2)}, "must be 3 label values"),
        ({"ignore_label": 0}, "ignore_label is 0"),
        ({"focal_weight": -1}, "focal_weight"),
        ({"focal_gamma": -1}, "focal_gamma"),
        ({"top_k_ratio": 0}, "top_k_ratio"),
        ({"class_weights": {"liver": -1}}, "class_weights of 'liver' is -1"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Segmentation(**settings)
