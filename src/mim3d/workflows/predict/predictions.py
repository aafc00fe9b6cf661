"""The folder that prediction fills: one label map per scan, and the list that says which is which."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import write_json
from mim3d.datasets.cases import Case, read_cases
from mim3d.datasets.dataset_json import read_json
from mim3d.scans.grids import split_channel

LIST_NAME = "predictions.json"

#: What must be the same for label maps to stand in one folder.
IDENTITY = ("weights_digest", "overlap", "mirror_axes", "body_only", "largest_component", "min_component_ml")

#: Formats that label maps are written in; ``auto`` is that of the source.
Format = Literal["auto", "nii.gz", "nrrd", "mha", "dicom_seg"]

#: Suffix of a scan -> suffix of its label map; all others (NIfTI, DICOM) give compressed NIfTI.
SUFFIXES = {".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha"}


def is_dicom(case: Case) -> bool:
    """Whether a scan is a DICOM series: named by a folder, not by a file."""
    return not os.path.isfile(split_channel(case.images[0])[0])


@dataclass
class Predictions:
    """A folder of label maps in the making.

    Attributes:
        folder: where they are written.
        identity: the network and the settings they come from.
        format: of the label maps.
        with_probabilities: whether the probabilities of every scan lie beside its label map.
        rows: finished scans by id.
        failures: reasons of the scans that could not be segmented, by id.
    """

    folder: Path
    identity: Mapping[str, Any]
    format: Format = "auto"
    with_probabilities: bool = False
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        out: str | Path,
        identity: Mapping[str, Any],
        cases: Sequence[Case],
        *,
        overwrite: bool,
        format: Format = "auto",
        with_probabilities: bool = False,
    ) -> "Predictions":
        """Make the folder, or go on with one that holds label maps of the same network and settings.

        Raises:
            ConfigError: a place that cannot be written to, label maps of another network, or files of other origin
                under the names that are to be written.
        """
        folder = Path(out)
        predictions = cls(folder, identity, format, with_probabilities)
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; choose a folder as --out.")
        predictions._spare_sources(cases)
        if (folder / LIST_NAME).is_file() and not overwrite:
            predictions._take_up()
        elif not overwrite:
            taken = [path for case in cases for path in predictions._paths_of(case) if path.exists()]
            if taken:
                raise ConfigError(f"{taken[0]} exists and is no prediction of mim3d; choose another --out.")
        try:
            predictions._write()
        except DataError as error:
            raise ConfigError(f"{folder} cannot be written to ({error}); choose another --out.") from error
        return predictions

    def path_of(self, case: Case) -> Path:
        """Where the label map of a scan is written: by default in the format family of the scan."""
        if self.format == "dicom_seg":
            return self.folder / f"{case.id}.dcm"
        if self.format != "auto":
            return self.folder / f"{case.id}.{self.format}"
        suffix = "" if is_dicom(case) else os.path.splitext(split_channel(case.images[0])[0])[1].lower()
        return self.folder / f"{case.id}{SUFFIXES.get(suffix, '.nii.gz')}"

    def probabilities_of(self, case: Case) -> Path:
        """Where the probabilities of a scan are written."""
        return self.folder / f"{case.id}_probabilities.nii.gz"

    def is_finished(self, case: Case) -> bool:
        """Whether all that is asked for of exactly these images is there."""
        row = self.rows.get(case.id)
        return (
            row is not None
            and row["images"] == list(case.images)
            and row.get("prediction") == self.path_of(case).name
            and all(path.is_file() for path in self._paths_of(case))
        )

    def _paths_of(self, case: Case) -> list[Path]:
        return [self.path_of(case), *([self.probabilities_of(case)] if self.with_probabilities else [])]

    def add(self, case: Case) -> None:
        """Record a label map that was written."""
        self.failures.pop(case.id, None)
        row = {"id": case.id, "images": list(case.images), "prediction": self.path_of(case).name}
        if self.with_probabilities:
            row["probabilities"] = self.probabilities_of(case).name
        self.rows[case.id] = row
        self._write()

    def add_failure(self, case: Case, reason: str) -> None:
        """Record why a scan could not be segmented."""
        self.rows.pop(case.id, None)
        self.failures[case.id] = reason
        self._write()

    def _spare_sources(self, cases: Sequence[Case]) -> None:
        named = [path for case in cases for path in (*case.images, case.label) if path]
        sources = {os.path.realpath(split_channel(path)[0]) for path in named}
        for path in (path for case in cases for path in self._paths_of(case)):
            if os.path.realpath(path) in sources:
                raise ConfigError(
                    f"{path} is one of the scans or labels themselves and would be replaced by a "
                    "prediction; choose another --out."
                )

    def _take_up(self) -> None:
        path = self.folder / LIST_NAME
        content = read_json(str(path))
        try:
            known = {name: content[name] for name in IDENTITY}
            rows = {str(row["id"]): row for row in content["cases"] if isinstance(row["images"], list)}
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no list that mim3d wrote ({error!r}); choose another --out.") from error
        for name, value in known.items():
            if value != self.identity[name]:
                what = "another network" if name == "weights_digest" else f"{name} {value}"
                raise ConfigError(
                    f"{self.folder} holds label maps of {what}; choose another --out, or replace them by "
                    "--overwrite true."
                )
        self.rows = rows

    def _write(self) -> None:
        failed = [{"id": name, "reason": reason} for name, reason in self.failures.items()]
        content = {**self.identity, "cases": list(self.rows.values()), "failed": failed}
        write_json(self.folder / LIST_NAME, content, indent=1)


def input_cases(inputs: str | Sequence[str], *, with_labels: bool = False) -> list[Case]:
    """The scans behind files, folders, DICOM trees and lists; labels are left out unless asked for.

    Scans of several inputs that share an id get the name of their input in front.

    Raises:
        DataError: an input that does not exist or holds no scan, or the same scan named twice.
    """
    names = [inputs] if isinstance(inputs, str) else list(inputs)
    if not names:
        raise DataError("--input is empty; name files, folders or lists of scans.")
    found = [(name, case) for name in names for case in read_cases(name, recursive_images_only=not with_labels).cases]
    counts = Counter(case.id for _, case in found)
    cases = [
        case if counts[case.id] == 1 else replace(case, id=f"{Path(name).resolve().name.partition('.')[0]}_{case.id}")
        for name, case in found
    ]
    twice = [name for name, count in Counter(case.id for case in cases).items() if count > 1]
    if twice:
        paths = [case.images[0] for case in cases if case.id == twice[0]]
        raise DataError(f"{paths[0]} and {paths[1]} would both be written as {twice[0]}; give them in separate calls.")
    return cases
