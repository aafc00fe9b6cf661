"""Prediction of classes: probabilities of every class for every scan, with one classifier or an ensemble."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mim3d.caching.foreground import class_counts_of, class_locations_of
from mim3d.caching.preprocessing import Prepared, Preprocessing, prepare
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import write_csv
from mim3d.datasets.cases import Case
from mim3d.datasets.references import CLASS_LIST_NAME, TABLE_NAME
from mim3d.inference import padding_values
from mim3d.tasks.classification.cubes import centre_of_label, centre_of_scan, cut_from
from mim3d.tasks.contract import PredictionSettings, Predictor, TrainedNetwork
from mim3d.tasks.trained import require_alike
from mim3d.weights import full_path

#: What one network sees of one scan, ``(C, *size)``.
Box = npt.NDArray[np.float32]


class ClassificationPredictor(Predictor):
    """An ensemble of classifiers of the same classes; the mean of their probabilities decides.

    OUT/predictions.csv has a row per scan: id, patient, the predicted class and the probability of each. OUT/failed.csv
    has the reasons of scans that cannot be used.

    Args:
        networks: The classifiers, one at least.
        settings: How many scans go through a network at a time.

    Raises:
        ConfigError: Networks of other classes or channels than the first, or a batch of no scan.
    """

    done = "classified"
    list_name = CLASS_LIST_NAME
    failures_name = "failed.csv"
    table_name = TABLE_NAME
    must_match = ("weights_digests", "classes")
    reads_labels = True

    def __init__(self, networks: Sequence[TrainedNetwork], settings: PredictionSettings) -> None:
        if settings.batch_size < 1:
            raise ConfigError(f"batch_size is {settings.batch_size}; it must be at least 1.")
        super().__init__(networks, settings)
        require_alike(
            networks, lambda network: {"classes": ", ".join(classes_of(network)), "channels": network.num_channels}
        )
        self.classes = classes_of(networks[0])
        self._said: dict[str, list[str]] = {}

    @property
    def scans_per_call(self) -> int:
        return self.settings.batch_size

    @property
    def identity(self) -> Mapping[str, Any]:
        return {
            "task": "classification",
            "weights": [full_path(network.path) for network in self.networks],
            "weights_digests": [network.digest for network in self.networks],
            "classes": list(self.classes),
            "mirror_axes": [list(network.task.mirror_axes) for network in self.networks],
        }

    def read(self, case: Case) -> list[Box]:
        """Return what each network sees of a scan, which is read once for all that prepare it alike.

        Raises:
            DataError: The scan cannot be used, or has no labelled structure although one is needed.
        """
        prepared: dict[tuple[Preprocessing, bool], Prepared] = {}
        boxes = []
        for network in self.networks:
            key = network.preprocessing, network.task.centre == "label"
            if key not in prepared:
                prepared[key] = prepare_scan(network, case)
            boxes.append(box_of_scan(network, prepared[key]))
        self._said[case.id] = self.networks[0].warnings_on(next(iter(prepared.values())))
        return boxes

    def predict(
        self, cases: Sequence[Case], inputs: Sequence[Any], folder: Path, on_windows: Callable[[int, int], None]
    ) -> list[dict[str, Any]]:
        """Return patient and probabilities of scans, averaged over mirrored boxes where the task says so."""
        every = []
        for index, network in enumerate(self.networks):
            images = torch.from_numpy(np.stack([boxes[index] for boxes in inputs])).to(network.device)
            probabilities = network.module.probabilities(images, network.task.mirror_axes)
            every.append(probabilities.cpu().double().numpy())
        answers = []
        for case, row in zip(cases, np.mean(every, axis=0), strict=True):
            answer = {"patient": case.patient, "probabilities": [float(value) for value in row]}
            answers.append(answer | ({"warnings": said} if (said := self._said.get(case.id)) else {}))
        return answers

    def write_tables(self, folder: Path, rows: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str]) -> None:
        """Write the table of probabilities, and that of failures."""
        head = ["id", "patient", "predicted", *(f"probability_{name}" for name in self.classes)]
        cells = []
        for row in rows.values():
            probabilities = row["probabilities"]
            predicted = self.classes[probabilities.index(max(probabilities))]
            cells.append([row["id"], row["patient"], predicted, *(f"{value:.10g}" for value in probabilities)])
        write_csv(folder / TABLE_NAME, head, cells)
        write_csv(folder / self.failures_name, ["id", "reason"], list(failures.items()))


def classes_of(network: TrainedNetwork) -> tuple[str, ...]:
    """Return the names of a classifier's classes, in the order of its outputs."""
    return tuple(name for _, name in sorted(network.labels.items()))


def prepare_scan(network: TrainedNetwork, case: Case) -> Prepared:
    """Read a scan as in training.

    Raises:
        DataError: The scan cannot be used, has another number of channels, or comes without the label that is needed.
    """
    network.check_channels(case)
    needs_label = network.task.centre == "label"
    if needs_label and case.label is None:
        raise DataError(
            f"{case.images[0]}: no label, but the network looks at boxes around labelled structures; give a list "
            "with the columns image and label."
        )
    return prepare(case, network.preprocessing, with_label=needs_label, set_in_hu=network.in_hu)


def box_of_scan(network: TrainedNetwork, prepared: Prepared) -> Box:
    """Cut what a classifier sees of a scan, ``(C, *size)``.

    Raises:
        DataError: The label holds no structure, where one is needed.
    """
    x, y, z = prepared.image.shape[1:]
    if prepared.label is None:
        centre = centre_of_scan((x, y, z))
    else:
        rows = class_locations_of(prepared.label, class_counts_of(prepared.label))
        found = centre_of_label({0: rows[:, 1:]})
        if found is None:
            raise DataError(
                f"{prepared.grid.path}: its label holds no structure, but the network looks at boxes around one; "
                "correct the label."
            )
        centre = found
    cube = network.task.cube()
    cut = cube.cut(centre, cube.step((x, y, z), prepared.spacing_mm))
    image = network.intensity.apply(prepared.image, prepared.statistics)
    return cut_from(image, cut, padding_values(network.intensity, prepared.statistics))
