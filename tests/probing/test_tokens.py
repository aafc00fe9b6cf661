"""Which tokens of a scan are items, and which class they have."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mim3d.backbones import create_model
from mim3d.core.errors import DataError
from mim3d.probing.items import TokenCrop, classes_of, label_set, planned_size, token_labels
from mim3d.probing.probe import features_of, token_features, without_encoder
from mim3d.probing.settings import Probing
from mim3d.scans.intensity import Intensity
from tests.array_scans import ArrayScan

NAMES = {0: "background", 2: "ball", 5: "core"}


def halves(seed: int, shape=(16, 16, 16)) -> ArrayScan:
    """Noise, with label 2 in one half and 5 in a corner of it."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, dtype=np.uint8)
    label[8:] = 2
    label[12:, :8, :8] = 5
    places = {value: np.argwhere(label == value).astype(np.int32) for value in (2, 5)}
    image = (rng.normal(0, 1, shape) + label)[None].astype(np.float32)
    return ArrayScan(image, label, name=f"scan_{seed}", class_locations=places)


def encoder():
    torch.manual_seed(0)
    return create_model("hybrid", widths=(8, 16), depths=(1, 1), num_heads=2).eval()


ZSCORE = Intensity(kind="zscore", window=None)


def test_a_token_has_the_label_of_most_of_its_voxels_and_the_share_of_all_of_them():
    label = np.zeros((4, 4, 8), dtype=np.int64)
    label[:3, :, 4:] = 5
    label[0, :, :4] = 7
    label[1, :, :4] = -1
    values, shares = token_labels(label, [0, 5], 4)
    assert values.tolist() == [0, 5]
    # Voxels of unknown labels and beyond the scan count for none.
    assert shares.tolist() == [0.5, 0.75]


def test_tokens_are_clear_balanced_and_where_their_label_is():
    net = encoder()
    items = label_set([halves(0), halves(1)], [halves(2)], NAMES, net, ZSCORE, Probing(tokens_per_label=5))
    assert items.names == ("background", "ball", "core") and items.size == (16, 16, 16)
    # The core fills four tokens of each scan, the others many.
    assert items.counts() == {"background": (10, 5), "ball": (10, 5), "core": (8, 4)}
    view = items.held_out[0]
    x, y, z = np.unravel_index(view.tokens_n, (4, 4, 4))
    expected = np.where(x < 2, 0, np.where((x == 3) & (y < 2) & (z < 2), 2, 1))
    assert view.classes_n.tolist() == expected.tolist()


def test_features_are_those_of_the_tokens():
    net = encoder()
    items = label_set([halves(0)], [halves(1)], NAMES, net, ZSCORE, Probing(tokens_per_label=3))
    view = items.training[0]
    found = features_of(net, items.training, "last", batch_size=2)
    with torch.no_grad():
        maps = net.feature_maps(view.load()[None])
    expected = maps[-1][0].flatten(1).T[torch.from_numpy(view.tokens_n)]
    torch.testing.assert_close(found[: len(expected)], expected.double(), atol=1e-5, rtol=1e-4)
    assert len(found) == len(classes_of(items.training))
    with torch.no_grad():
        every = token_features(net, view.load()[None], "all")
    assert every.shape == (1, 64, 8 + 16)
    torch.testing.assert_close(every[0, 0, :8], maps[0][0, :, :2, :2, :2].mean((1, 2, 3)))


def test_the_choice_is_the_same_again_and_another_with_another_seed():
    net = encoder()
    one, again, other = (
        [
            view.tokens_n.tolist()
            for view in label_set(
                [halves(0)], [halves(1)], NAMES, net, ZSCORE, Probing(tokens_per_label=4), seed=seed
            ).training
        ]
        for seed in (0, 0, 1)
    )
    assert one == again != other


def test_place_alone_tells_labels_that_always_lie_alike():
    items = label_set([halves(0), halves(1)], [halves(2)], NAMES, encoder(), ZSCORE, Probing(tokens_per_label=20))
    references = without_encoder(items, Probing(num_neighbours=1))
    assert references["place"].neighbours.values()["balanced_accuracy"] == 1


def test_air_is_no_item():
    scan = halves(0)
    scan.image[0, :8] = 0
    items = label_set([scan], [halves(1)], NAMES, encoder(), ZSCORE, Probing(tokens_per_label=100))
    assert items.names == ("ball", "core") and items.left_out == ("background",)


def test_what_lies_beyond_the_scan_carries_no_label():
    values, shares = TokenCrop(halves(0), (-4, 0, 0), (8, 16, 16), ZSCORE).label([0, 2, 5], 4)
    assert shares.reshape(2, 16).tolist() == [[0.0] * 16, [1.0] * 16]
    assert not values.any()


def test_a_case_annotated_in_part_gives_no_items_of_what_it_does_not_know():
    class Part(ArrayScan):
        @property
        def case(self):
            return replace(super().case, labelled=("ball",))

    known = halves(0)
    scan = Part(known.image, known.label, name="part", class_locations=known.class_locations)
    items = label_set([scan, halves(1)], [halves(2)], NAMES, encoder(), ZSCORE, Probing(tokens_per_label=4))
    assert items.counts() == {"background": (4, 4), "ball": (8, 4), "core": (4, 4)}


def test_labels_that_fill_no_token_are_refused_with_a_remedy():
    scans = [halves(0), halves(1)]
    for scan in scans:
        scan.label[:] = 0
    with pytest.raises(DataError, match=r"Fewer than two labels fill 60% .*none does for ball, core.*4 voxels wide"):
        label_set(scans[:1], scans[1:], NAMES, encoder(), ZSCORE, Probing())


def test_crops_are_as_large_as_scans_and_limits_let_them_be():
    scans = [halves(0, (10, 30, 200))]
    assert planned_size(scans, (4, 4, 4)) == (8, 28, 96)
    assert planned_size(scans, (16, 16, 16)) == (16, 16, 96)
    assert planned_size(scans, (4, 4, 4), (32, 16, 16)) == (8, 16, 16)


def test_encoders_of_other_tokens_are_not_scored_on_the_same_items():
    scans = [halves(0), halves(1)], [halves(2)]
    wide = create_model("hybrid", widths=(8, 8, 16), depths=(1, 1, 1), num_heads=2).eval()
    probing = Probing(tokens_per_label=1)
    one, same, other = (label_set(*scans, NAMES, net, ZSCORE, probing) for net in (encoder(), encoder(), wide))
    assert one.is_scored_as(same) and not one.is_scored_as(other)
    assert not one.is_scored_as(label_set(*scans, NAMES, encoder(), ZSCORE, probing, seed=1))
