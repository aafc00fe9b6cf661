"""Quick validation of a classifier: its scores on scans of the cache, which choose the best weights."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mim3d.caching.scan import CachedScan
from mim3d.core.types import Triple
from mim3d.loading.samples import SampleDataset
from mim3d.metrics import Bootstrap, classification_scores
from mim3d.scans.intensity import Intensity
from mim3d.tasks.classification.cubes import CubeFinisher, CubeSampler

#: Voxels of all boxes of one call of the network.
_BATCH_VOXELS = 2 * 96**3

#: Scores that are logged, by their names in :data:`mim3d.metrics.classification.CONVENTIONS`.
SCORES = ("auc", "accuracy", "balanced_accuracy", "f1_macro")


def batch_size_for(size: Triple) -> int:
    """Return how many boxes go through the network in one call."""
    return max(1, min(32, _BATCH_VOXELS // math.prod(size)))


def scores_of_scans(
    objective: Any, scans: Sequence[CachedScan], sampler: CubeSampler, intensity: Intensity
) -> dict[str, float]:
    """Return scores over scans, and over patients (``<score>_patient``) where those have a class of their own.

    Args:
        objective: A module with ``probabilities`` of boxes, in evaluation mode.
        scans: Scans of the cache, each with a class.
        sampler: Gives the same box of a scan each time.
        intensity: Mapping of stored intensities to network input.
    """
    device = next(objective.parameters()).device
    probabilities, classes = [], []
    step = batch_size_for(sampler.cube.size)
    for start in range(0, len(scans), step):
        # A data set of a scan alone, since one of several gives them in an order of its own.
        samples = [
            SampleDataset([scan], sampler, intensity, 0, CubeFinisher(), strict=True)[0]
            for scan in scans[start : start + step]
        ]
        images = torch.cat([sample["image"] for sample in samples]).to(device)
        probabilities.append(objective.probabilities(images).cpu().double().numpy())
        classes += [int(sample["class"]) for sample in samples]
    return class_scores(
        np.concatenate(probabilities), np.array(classes, dtype=np.int64), [scan.case.patient for scan in scans]
    )


def class_scores(
    probabilities_NK: npt.NDArray[np.float64], classes_N: npt.NDArray[np.int64], patients: Sequence[str]
) -> dict[str, float]:
    """Return scores over scans, and over patients (``<score>_patient``) by mean probabilities, where those differ.

    Patients are scored where some have several scans and none has scans of several classes, as then no class would be
    theirs. An AUC that is not defined, as one class alone is there, is 0.5.

    Args:
        probabilities_NK: Probabilities of K classes for each of N scans.
        classes_N: Number of the true class of each.
        patients: Patient whose scan each is.
    """
    found = {"": _mean_scores(probabilities_NK, classes_N, patients, by_patient=False)}
    classes_of: dict[str, set[int]] = {}
    for patient, value in zip(patients, classes_N.tolist(), strict=True):
        classes_of.setdefault(patient, set()).add(value)
    if len(classes_of) < len(patients) and all(len(values) == 1 for values in classes_of.values()):
        found["_patient"] = _mean_scores(probabilities_NK, classes_N, patients, by_patient=True)
    return {f"{name}{suffix}": value for suffix, scores in found.items() for name, value in scores.items()}


def _mean_scores(
    probabilities_NK: npt.NDArray[np.float64],
    classes_N: npt.NDArray[np.int64],
    patients: Sequence[str],
    *,
    by_patient: bool,
) -> dict[str, float]:
    scores = classification_scores(
        probabilities_NK,
        classes_N,
        patients=patients,
        by_patient=by_patient,
        bootstrap=Bootstrap(num_bootstrap=0),
    )["mean"]
    return {name: 0.5 if scores[name] is None else float(scores[name]) for name in SCORES}
