"""Classes against their references, and the file of scores that comes of it."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import write_csv, write_json
from mim3d.core.settings import nearest
from mim3d.datasets.class_tables import ClassRow, ClassTable, is_class_table, read_class_tables
from mim3d.metrics import Bootstrap, ClassifiedCases, classification, compare_classes, score_classes
from mim3d.workflows.evaluate import score_files


@dataclass(frozen=True, kw_only=True)
class ClassEvaluation:
    """The settings of `mim3d evaluate` for tables of classes."""

    predictions: str
    references: str
    out: str
    compare: str | None
    bootstrap: Bootstrap
    tables: bool
    class_column: str
    positive: str | None
    by_patient: bool
    num_bins: int
    baseline_column: str | None

    def __post_init__(self) -> None:
        if self.num_bins < 1:
            raise ConfigError(f"num_bins is {self.num_bins}, but a calibration error takes one bin or more.")
        if self.compare is not None and not is_class_table(self.compare):
            raise ConfigError(f"compare is {self.compare}, but a table of classes is compared with another (.csv).")

    def run(self) -> str:
        """Score, write and show; the path of the file of scores."""
        found = self._read(self.predictions)
        cases = self._cases(found.rows, found.class_names)
        content = {
            "kind": "classification",
            "classes": list(found.class_names),
            "positive": found.class_names[cases.positive],
            "settings": self._settings(),
            "conventions": classification.CONVENTIONS,
            "not_scored": {
                "without_reference": found.without_reference,
                "without_prediction": found.without_prediction,
            },
            **score_classes(cases, self.num_bins, self.bootstrap),
            "cases": [asdict(row) for row in found.rows],
        }
        if self.compare is not None:
            content["comparison"] = self._comparison(found, self.compare)
        write_json(self.out, content, indent=1, allow_nan=False)
        self._write_rows(found, content)
        score_files.show_classes(content)
        if self.tables:
            score_files.write_tables(self.out, content)
        print(f"Scores of {content['num_cases']} cases: {self.out}")
        return self.out

    def _read(self, predictions: str) -> ClassTable:
        return read_class_tables(
            predictions, self.references, class_column=self.class_column, baseline_column=self.baseline_column
        )

    def _settings(self) -> dict[str, Any]:
        content = {**asdict(self), **asdict(self.bootstrap)}
        for name in ("bootstrap", "out", "tables"):
            del content[name]
        for name in ("predictions", "references", "compare"):
            content[name] = content[name] and os.path.abspath(content[name])
        return content

    def _cases(self, rows: Sequence[ClassRow], class_names: tuple[str, ...]) -> ClassifiedCases:
        """Rows as arrays, of patients where asked for."""
        baseline = np.array([row.baseline for row in rows], dtype=np.float64) if self.baseline_column else None
        cases = ClassifiedCases(
            probabilities_NK=np.array([row.probabilities for row in rows], dtype=np.float64),
            classes_N=np.array([class_names.index(row.true_class) for row in rows]),
            class_names=class_names,
            patients=tuple(row.patient for row in rows),
            predicted_N=np.array([class_names.index(row.predicted) for row in rows]),
            positive=self._positive(class_names),
            baseline_N=baseline,
        )
        return cases.of_patients() if self.by_patient else cases

    def _positive(self, class_names: tuple[str, ...]) -> int:
        if self.positive is None:
            if self.baseline_column and len(class_names) > 2:
                raise ConfigError(
                    "baseline_column speaks for one class against the rest; name it with --positive, one of "
                    f"{', '.join(class_names)}."
                )
            return class_names.index(max(class_names))
        if self.positive not in class_names:
            raise ConfigError(f"positive is {self.positive!r}, which is no class.{nearest(self.positive, class_names)}")
        return class_names.index(self.positive)

    def _comparison(self, found: ClassTable, compare: str) -> dict[str, Any]:
        """Both methods on the cases that both have."""
        others = self._read(compare)
        if set(others.class_names) != set(found.class_names):
            raise DataError(
                f"{compare}: has the classes {', '.join(others.class_names)}, but {self.predictions} has "
                f"{', '.join(found.class_names)}; compare tables of the same classes."
            )
        mine = {row.id: row for row in found.rows}
        shared = [row for row in others.rows if row.id in mine]
        if not shared:
            raise DataError(f"{compare}: has no prediction of a case that {self.predictions} has; compare others.")
        ours = self._cases([mine[row.id] for row in shared], found.class_names)
        theirs = self._cases(_reordered(shared, others.class_names, found.class_names), found.class_names)
        # One case is one patient's in both, so that both are drawn together.
        if ours.patients != theirs.patients:
            raise DataError(f"{compare}: names other patients than {self.predictions}; correct one of the two.")
        return {
            "predictions": os.path.abspath(compare),
            "num_cases": len(ours.patients),
            "paired": compare_classes(ours, theirs, self.num_bins, self.bootstrap),
        }

    def _write_rows(self, found: ClassTable, content: dict[str, Any]) -> None:
        """The cases, and the table of reliability, as CSV beside the file of scores."""
        heads = ["id", "patient", "class", "predicted", *(f"probability_{name}" for name in found.class_names)]
        if self.baseline_column:
            heads.append(self.baseline_column)
        rows = [
            [row.id, row.patient, row.true_class, row.predicted, *row.probabilities]
            + ([row.baseline] if self.baseline_column else [])
            for row in found.rows
        ]
        write_csv(score_files.beside(self.out, ".csv"), heads, rows)
        bins = content["reliability"]
        path = score_files.beside(self.out, ".reliability.csv")
        write_csv(path, list(bins[0]), [list(row.values()) for row in bins])


def _reordered(rows: Sequence[ClassRow], theirs: Sequence[str], ours: Sequence[str]) -> list[ClassRow]:
    """Rows with their probabilities in another order of classes."""
    places = [list(theirs).index(name) for name in ours]
    return [
        ClassRow(**{**asdict(row), "probabilities": tuple(row.probabilities[place] for place in places)})
        for row in rows
    ]
