"""Prediction with classifiers: probabilities of every class for every scan, in one table."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mim3d.caching.preprocessing import Prepared
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.types import Named
from mim3d.datasets.cases import Case
from mim3d.tasks.classification.classifier import Classifier, load_classifier
from mim3d.weights import full_path
from mim3d.workflows.predict.class_table import FAILED_NAME, ClassTable
from mim3d.workflows.predict.predictions import input_cases
from mim3d.workflows.shared.devices import choose_device
from mim3d.workflows.shared.held_out import held_out_by_all
from mim3d.workflows.shared.scan_progress import ScanProgress, close_scans

#: What one classifier sees of one scan.
Box = npt.NDArray[np.float32]


def predict_classes(
    weights: list[str],
    out: str,
    input: str | list[str] | None,
    batch_size: int,
    backbone: Named | None,
    accelerator: str,
    overwrite: bool,
) -> str:
    """Classify scans; several classifiers are averaged by their probabilities.

    OUT/predictions.csv has a row per scan: id, patient, the predicted class and the probability of each. May be stopped
    and run again: what is finished is kept. A scan that cannot be used is listed in OUT/failed.csv with its reason and
    does not stop the others.

    Args:
        weights: runs of fine-tuning, or folders with exported classifiers.
        out: folder for the table.
        input: scans, with labels where boxes lie around them; the held-out cases of the runs if None.
        batch_size: scans per call of a network.
        backbone: encoder, where a card names a class that is not mim3d's own.
        accelerator: auto, cpu, cuda or mps.
        overwrite: do scans again that are finished, and replace predictions of other networks.
    Returns:
        The folder of the table.
    Raises:
        ConfigError: settings that cannot work, classifiers that do not belong together, or a folder with other
            predictions, before any work begins.
        CheckpointError: weights that are no classifier.
        DataError: no scan to classify; or, once all others are done, scans that could not be.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
    device = choose_device(accelerator)
    classifiers = [load_classifier(path, device=device, backbone=backbone) for path in weights]
    _require_same_classes(classifiers, weights)
    cases = held_out_by_all(weights) if input is None else input_cases(input, with_labels=True)
    table = ClassTable.open(out, _identity(classifiers, weights), overwrite=overwrite)
    remaining = [case for case in cases if not table.is_finished(case)]
    with ScanProgress(len(remaining)) as progress:
        for start in range(0, len(remaining), batch_size):
            _classify(classifiers, remaining[start : start + batch_size], table, progress)
            table.write()
    num_before = len(cases) - len(remaining)
    return close_scans(cases, table.failures, "classified", table.folder, FAILED_NAME, num_before=num_before)


def _classify(
    classifiers: Sequence[Classifier], cases: Sequence[Case], table: ClassTable, progress: ScanProgress
) -> None:
    """Record the probabilities of some scans, or why there are none."""
    read: list[tuple[Case, list[Box]]] = []
    for case in cases:
        progress.begin(case.id)
        try:
            read.append((case, _boxes(classifiers, case)))
        except (DataError, OSError, MemoryError) as error:
            _fail(case, error, table, progress)
        progress.end()
    if not read:
        return
    try:
        every = [
            classifier.probabilities([boxes[index] for _, boxes in read])
            for index, classifier in enumerate(classifiers)
        ]
    except (MemoryError, torch.OutOfMemoryError) as error:
        for case, _ in read:
            _fail(case, error, table, progress)
        return
    for (case, _), probabilities in zip(read, np.mean(every, axis=0), strict=True):
        table.add(case, probabilities.tolist())


def _fail(case: Case, error: BaseException, table: ClassTable, progress: ScanProgress) -> None:
    short = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    reason = f"{case.images[0]}: not enough memory; use a smaller --batch_size." if short else str(error)
    table.add_failure(case, reason)
    progress.say(f"not classified: {reason}")


def _boxes(classifiers: Sequence[Classifier], case: Case) -> list[Box]:
    """What each classifier sees of a scan, which is read once for all that prepare it alike."""
    prepared: dict[Any, Prepared] = {}
    boxes = []
    for classifier in classifiers:
        key = classifier.preprocessing, classifier.needs_label
        if key not in prepared:
            prepared[key] = classifier.prepare(case)
        boxes.append(classifier.box(prepared[key]))
    return boxes


def _require_same_classes(classifiers: Sequence[Classifier], weights: Sequence[str]) -> None:
    if not classifiers:
        raise ConfigError("weights is empty; give a run of fine-tuning.")
    first = classifiers[0]
    for classifier, path in zip(classifiers, weights, strict=True):
        for what, one, other in (
            ("classes", ", ".join(first.classes), ", ".join(classifier.classes)),
            ("channels", str(first.num_channels), str(classifier.num_channels)),
        ):
            if one != other:
                raise ConfigError(
                    f"{path} has {what} {other}, but {weights[0]} has {one}; only classifiers of the same data "
                    "can be averaged."
                )


def _identity(classifiers: Sequence[Classifier], weights: Sequence[str]) -> dict[str, Any]:
    return {
        "task": "classification",
        "weights": [full_path(path) for path in weights],
        "weights_digests": [classifier.digest for classifier in classifiers],
        "classes": list(classifiers[0].classes),
        "mirror_axes": [list(classifier.settings.mirror_axes) for classifier in classifiers],
    }
