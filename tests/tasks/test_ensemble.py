"""Segmenters in use: what their channels mean on a whole scan, one label each or regions in one another."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mim3d.backbones import create_recipe
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import DataError
from mim3d.datasets.cases import Case
from mim3d.inference import padding_values, sliding_logits
from mim3d.scans.intensity import Intensity
from mim3d.tasks.contract import PredictionSettings, TrainedNetwork
from mim3d.tasks.segmentation.prediction import SegmentationPredictor
from mim3d.tasks.segmentation.task import Segmentation
from tests.labelled import ball_scan, write_scan

LABELS = {0: "background", 1: "oedema", 2: "core", 4: "enhancing"}
REGIONS = {"whole": (1, 2, 4), "core": (2, 4), "enhancing": (4,)}
INTENSITY = Intensity(window=(0.0, 400.0))


def segmenter_of(settings: Segmentation, seed: int = 0) -> TrainedNetwork:
    """A segmenter that learned nothing."""
    torch.manual_seed(seed)
    recipe = create_recipe({"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2})
    return TrainedNetwork(
        path=f"run_{seed}",
        card={},
        module=settings.build(recipe, LABELS).eval(),
        task=settings,
        labels=LABELS,
        num_channels=1,
        preprocessing=Preprocessing(),
        intensity=INTENSITY,
        digest=str(seed),
        device=torch.device("cpu"),
    )


def predictor_of(*networks: TrainedNetwork) -> SegmentationPredictor:
    return SegmentationPredictor(networks, PredictionSettings())


def scan_of(folder: Path) -> Case:
    write_scan(folder / "scan.nii.gz", ball_scan(0)[0])
    return Case(id="scan", images=(str(folder / "scan.nii.gz"),), patient="scan")


@pytest.mark.parametrize("regions", [None, REGIONS])
def test_label_values_and_probabilities_are_those_of_the_networks_targets(tmp_path, regions):
    segmenter = segmenter_of(Segmentation(patch_size=(16, 16, 16), regions=regions))
    predictor, case = predictor_of(segmenter), scan_of(tmp_path)
    filled = np.empty((22, 20, 18, len(predictor.targets.names)), dtype=np.float32)
    prepared = predictor.read(case)
    labels = predictor.segment(prepared, probability_target=lambda grid, channels: filled)
    with torch.no_grad():
        logits = sliding_logits(
            segmenter.module.logits,
            torch.from_numpy(INTENSITY.apply(prepared.image, prepared.statistics)),
            segmenter.task.windows(),
            padding=padding_values(INTENSITY, prepared.statistics),
            device=torch.device("cpu"),
        )
    whole = predictor.targets.probabilities(logits)
    assert np.abs(filled - whole.movedim(0, -1).numpy()).max() < 1e-5
    agree = labels == predictor.targets.labels_of(whole).numpy()
    assert agree.mean() > 0.999 and labels.dtype == np.uint8
    assert set(np.unique(labels)) <= set(LABELS) and labels.any()
    assert predictor.targets.names == (tuple(REGIONS) if regions else tuple(LABELS.values()))


def test_an_ensemble_of_regions_averages_their_probabilities(tmp_path):
    settings = Segmentation(patch_size=(32, 32, 32), regions=REGIONS)
    members = [segmenter_of(settings, seed) for seed in (0, 1)]
    case, found = scan_of(tmp_path), []
    for chosen in ([members[0]], [members[1]], members):
        filled = np.empty((22, 20, 18, 3), dtype=np.float32)
        predictor_of(*chosen).segment(
            predictor_of(*chosen).read(case), probability_target=lambda grid, k, to=filled: to
        )
        found.append(filled)
    assert np.abs(found[0] - found[1]).max() > 0.01
    # One window covers the scan, so that it does not matter what is blended.
    assert np.abs(found[2] - (found[0] + found[1]) / 2).max() < 1e-5


def test_channels_that_do_not_match_are_refused(tmp_path):
    case = scan_of(tmp_path)
    two = Case(id="two", images=case.images * 2, patient="two")
    segmenter = segmenter_of(Segmentation(patch_size=(16, 16, 16)))
    with pytest.raises(DataError, match=r"2 images where the network was trained on 1"):
        predictor_of(segmenter).read(two)
