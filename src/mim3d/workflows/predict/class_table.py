"""The folder that classification fills: a table of probabilities, one of failures, and where both come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import write_csv, write_json
from mim3d.datasets.cases import Case
from mim3d.datasets.dataset_json import read_json

TABLE_NAME = "predictions.csv"
FAILED_NAME = "failed.csv"
LIST_NAME = "classification.json"

#: What must be the same for probabilities to stand in one table.
IDENTITY = ("weights_digests", "classes")


@dataclass
class ClassTable:
    """Class probabilities in the making; what is finished survives a stop.

    Attributes:
        folder: where the files are written.
        identity: the networks that they come from.
        classes: names of the columns.
        rows: finished scans by id.
        failures: reasons of the scans that could not be classified, by id.
    """

    folder: Path
    identity: Mapping[str, Any]
    classes: tuple[str, ...]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, out: str | Path, identity: Mapping[str, Any], *, overwrite: bool) -> "ClassTable":
        """Make the folder, or go on with one that was filled by the same networks.

        Raises:
            ConfigError: a place that cannot be written to, or predictions of other networks.
        """
        folder = Path(out)
        table = cls(folder, identity, tuple(identity["classes"]))
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; choose a folder as --out.")
        if not overwrite and (folder / LIST_NAME).is_file():
            table._take_up()
        elif not overwrite and (folder / TABLE_NAME).exists():
            raise ConfigError(f"{folder / TABLE_NAME} exists and is no table of mim3d; choose another --out.")
        try:
            table.write()
        except (DataError, OSError) as error:
            raise ConfigError(f"{folder} cannot be written to ({error}); choose another --out.") from error
        return table

    def is_finished(self, case: Case) -> bool:
        """Whether the probabilities of exactly these images are there."""
        row = self.rows.get(case.id)
        return row is not None and row["images"] == list(case.images)

    def add(self, case: Case, probabilities: Sequence[float]) -> None:
        """Record the probabilities of a scan, in the order of the classes."""
        self.failures.pop(case.id, None)
        self.rows[case.id] = {
            "id": case.id,
            "patient": case.patient,
            "images": list(case.images),
            "probabilities": [float(value) for value in probabilities],
        }

    def add_failure(self, case: Case, reason: str) -> None:
        """Record why a scan could not be classified."""
        self.rows.pop(case.id, None)
        self.failures[case.id] = reason

    def write(self) -> None:
        """Write all files; each appears whole or not at all.

        Raises:
            DataError: the disk is full, or the folder cannot be written to.
        """
        header = ["id", "patient", "predicted", *(f"probability_{name}" for name in self.classes)]
        write_csv(self.folder / TABLE_NAME, header, [self._cells(row) for row in self.rows.values()])
        write_csv(self.folder / FAILED_NAME, ["id", "reason"], [list(item) for item in self.failures.items()])
        failed = [{"id": name, "reason": reason} for name, reason in self.failures.items()]
        content = {**self.identity, "cases": list(self.rows.values()), "failed": failed}
        write_json(self.folder / LIST_NAME, content, indent=1)

    def _cells(self, row: Mapping[str, Any]) -> list[Any]:
        probabilities: list[float] = row["probabilities"]
        predicted = self.classes[probabilities.index(max(probabilities))]
        return [row["id"], row["patient"], predicted, *(f"{value:.6f}" for value in probabilities)]

    def _take_up(self) -> None:
        path = self.folder / LIST_NAME
        content = read_json(str(path))
        try:
            known = {name: content[name] for name in IDENTITY}
            rows = {str(row["id"]): row for row in content["cases"] if len(row["probabilities"]) == len(self.classes)}
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no list of class probabilities that mim3d wrote ({error!r}); choose another --out."
            ) from error
        if any(value != self.identity[name] for name, value in known.items()):
            raise ConfigError(
                f"{self.folder} holds predictions of other networks; choose another --out, or replace them by "
                "--overwrite true."
            )
        self.rows = rows
