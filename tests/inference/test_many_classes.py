"""Many classes: features blended in the place of logits, and classes left out of the interpolation, change no label."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mim3d.backbones import create_recipe
from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.datasets.cases import Case
from mim3d.inference import HeadedNetwork, Windows, classes_readout, outputs, predict_prepared, prediction
from mim3d.inference.outputs import possible_winners
from mim3d.inference.readout import most_probable
from mim3d.scans.intensity import Intensity
from mim3d.tasks.segmentation.network import SegmentationObjective
from mim3d.tasks.segmentation.task import Segmentation
from tests.labelled import ball_scan, write_scan

NUM_CLASSES, NUM_FEATURES = 24, 6
READOUT = classes_readout(NUM_CLASSES)


@pytest.fixture(scope="module")
def network() -> HeadedNetwork:
    """Random features of a voxel's neighbours, and a linear last layer whose logits are sharp."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn((NUM_FEATURES, 1, 5, 5, 5), generator=generator)
    weight = 0.4 * torch.randn((NUM_CLASSES, NUM_FEATURES), generator=generator)
    bias = torch.randn(NUM_CLASSES, generator=generator)

    def features(window):
        return nn.functional.conv3d(window, kernel, padding=2)

    def logits(window):
        return torch.einsum("kf,bfxyz->bkxyz", weight, features(window)) + bias.view(1, -1, 1, 1, 1)

    return HeadedNetwork(logits=logits, features=features, weight_KF=weight, bias_K=bias)


def prepared_scan(tmp_path, shape=(40, 28, 26), spacing_mm=None):
    write_scan(tmp_path / "scan.nii.gz", ball_scan(0, shape)[0])
    case = Case(id="scan", images=(str(tmp_path / "scan.nii.gz"),), patient="scan")
    return prepare(case, Preprocessing(spacing_mm=spacing_mm), with_label=False)


def predicted(prepared, network, *, readout=READOUT, with_probabilities=False, **settings):
    """Labels, and probabilities where they are asked for."""
    filled = np.full((*prepared.grid.ras_shape, NUM_CLASSES), np.nan, dtype=np.float32)
    labels = predict_prepared(
        [network],
        prepared,
        readout=readout,
        intensity=Intensity(window=(0.0, 400.0)),
        windows=Windows(patch_size=(12, 16, 12), batch_size=2, **settings),
        device=torch.device("cpu"),
        probability_target=(lambda grid, channels: filled) if with_probabilities else None,
    )
    return labels, filled


@pytest.mark.parametrize("spacing_mm", [None, (1.6, 1.5, 1.7), (0.8, 1.0, 2.0)])
@pytest.mark.parametrize("settings", [{"mirror_axes": (0, 2), "body_only": False}, {"body_only": True}])
def test_blended_features_give_the_labels_and_probabilities_of_blended_logits(
    network, tmp_path, monkeypatch, spacing_mm, settings
):
    prepared = prepared_scan(tmp_path, spacing_mm=spacing_mm)
    labels, probabilities = predicted(prepared, network, with_probabilities=True, **settings)
    monkeypatch.setattr(prediction, "MOST_SCORE_BYTES", 0)
    monkeypatch.setattr(outputs, "_HEAD_VOXELS", 100)
    others, alike = predicted(prepared, network, with_probabilities=True, **settings)
    assert np.abs(alike - probabilities).max() < 1e-5
    without, _ = predicted(prepared, network, **settings)
    first, second = np.sort(probabilities, axis=-1)[..., :-3:-1].transpose(3, 0, 1, 2)
    is_clear = first - second > 1e-5
    assert is_clear.mean() > 0.999 and len(np.unique(labels)) > 1
    for found in (others, without):
        assert found.dtype == labels.dtype and np.array_equal(found[is_clear], labels[is_clear])


@pytest.mark.parametrize("spacing_mm", [(1.6, 1.5, 1.7), (0.7, 1.0, 2.1), (2.5, 0.9, 0.8)])
@pytest.mark.parametrize("sharpness", [0.02, 1.0, 10.0])
def test_classes_that_are_left_out_of_a_tile_and_the_size_of_tiles_change_no_label(
    network, tmp_path, monkeypatch, spacing_mm, sharpness
):
    prepared = prepared_scan(tmp_path, (36, 30, 24), spacing_mm)
    sharp = HeadedNetwork(
        logits=lambda window: sharpness * network.logits(window),
        features=network.features,
        weight_KF=sharpness * network.weight_KF,
        bias_K=sharpness * network.bias_K,
    )
    labels, _ = predicted(prepared, sharp)
    monkeypatch.setattr(outputs, "_TILE", (1000, 1000, 1000))
    every, _ = predicted(prepared, sharp, readout=replace(READOUT, values=None))
    assert np.array_equal(labels, every) and len(np.unique(labels)) > 4
    monkeypatch.setattr(outputs, "_TILE", (5, 11, 9))
    monkeypatch.setattr(outputs, "_HELD_SCORES", 1)
    assert np.array_equal(predicted(prepared, sharp)[0], every)


def test_no_weighted_mean_of_voxels_is_won_by_a_channel_that_was_left_out():
    generator = torch.Generator().manual_seed(1)
    num_left = []
    for trial in range(60):
        probabilities = torch.softmax((0.5 + trial / 6) * torch.randn((2, 3, 3, 20), generator=generator), -1)
        left = set(possible_winners(probabilities).tolist())
        num_left.append(len(left))
        weights = torch.rand((400, 18), generator=generator) ** 8
        means = (weights / weights.sum(1, keepdim=True)) @ probabilities.flatten(0, 2)
        assert set(means.argmax(1).tolist()) <= left
    assert min(num_left) < 18 and max(num_left) == 20
    inside = torch.zeros((2, 4, 4, 20))
    inside[..., 7] = 1
    assert possible_winners(inside).tolist() == [7]


@pytest.mark.parametrize("is_side_by_side", [True, False])
def test_of_equally_probable_classes_the_lower_one_wins_however_they_lie_in_memory(is_side_by_side):
    scores = torch.randint(0, 3, (9, 5, 40), generator=torch.Generator().manual_seed(2)).float()
    expected = scores.max(0).values.eq(scores).int().argmax(0)
    if is_side_by_side:
        scores = scores.movedim(0, -1).contiguous().movedim(-1, 0)
    assert torch.equal(most_probable(scores), expected)


@pytest.mark.parametrize("decoder", ["unet", "additive"])
def test_the_last_layer_of_every_decoder_is_known_and_makes_its_logits(decoder):
    torch.manual_seed(0)
    recipe = create_recipe({"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2})
    task = Segmentation(patch_size=(16, 16, 16), decoder=decoder)
    objective = task.build(recipe, dict.fromkeys(range(5), "x")).eval()
    volume = torch.rand(1, 1, 16, 16, 16)
    assert objective.linear_head is not None
    weight, bias = objective.linear_head
    with torch.no_grad():
        features, logits = objective.finest_features(volume)[0], objective.logits(volume)[0]
    again = torch.einsum("kf,fxyz->kxyz", weight, features) + bias.view(-1, 1, 1, 1)
    assert torch.allclose(again, logits, atol=1e-5)

    class Own(SegmentationObjective):
        def logits(self, volume_BCXYZ):
            return 2 * super().logits(volume_BCXYZ)

    # What somebody makes of the logits is no linear layer that is known.
    objective.__class__ = Own
    assert objective.linear_head is None


def test_features_are_blended_where_scores_are_large_alone(network, tmp_path, monkeypatch):
    prepared, seen = prepared_scan(tmp_path), []

    def watched(compute, name):
        return lambda window: (seen.append(name), compute(window))[1]

    watching = replace(
        network, logits=watched(network.logits, "logits"), features=watched(network.features, "features")
    )
    predicted(prepared, watching)
    assert set(seen) == {"logits"}
    seen.clear()
    monkeypatch.setattr(prediction, "MOST_SCORE_BYTES", 4 * 12 * math.prod((28, 26)) * (NUM_CLASSES + 1) - 1)
    predicted(prepared, watching, body_only=False)
    assert set(seen) == {"features"}
