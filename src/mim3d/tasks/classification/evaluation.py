"""Evaluation of tables of classes: rows with their references, and the file of scores."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.left_out import Failure
from mim3d.core.settings import nearest
from mim3d.datasets.references import ClassRow, ClassTable, is_class_table, read_class_tables
from mim3d.metrics import ClassifiedCases, classification, compare_classes, score_classes
from mim3d.reporting.paper_tables import class_tables
from mim3d.tasks.evaluation import (
    ClassTableSettings,
    CsvTable,
    EvaluationSettings,
    LabelMapSettings,
    Scores,
    interval_cell,
    number_cell,
    printed_table,
)

if TYPE_CHECKING:
    from rich.table import Table


class ClassEvaluation:
    """The scoring of a table of classes.

    Args:
        settings: What is scored against what, and how.

    Raises:
        ConfigError: Settings that mean nothing to classes, or references or a comparison that are no table.
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        settings.refuse_given(LabelMapSettings, "label maps", "a table of classes")
        self.settings = settings
        references = settings.references
        names = [references] if isinstance(references, str) else references
        if len(names) != 1 or not names[0].lower().endswith(".csv"):
            raise ConfigError(
                f"references is {references!r}, but classes are compared with one table; name a .csv with a class "
                "column."
            )
        self.references = names[0]
        if settings.num_bins < 1:
            raise ConfigError(f"num_bins is {settings.num_bins}, but a calibration error takes one bin or more.")
        if settings.compare is not None and not is_class_table(settings.compare):
            raise ConfigError(f"compare is {settings.compare}, but a table of classes is compared with another (.csv).")

    def scores(self) -> Scores:
        """Score all cases, and compare them with those of another classifier where one is named.

        Raises:
            ConfigError: The positive class is unknown.
            DataError: There is nothing to match, or a table is unreadable.
        """
        settings, bootstrap = self.settings, self.settings.bootstrap
        found = self._read(settings.predictions)
        cases = self._cases(found.rows, found.class_names)
        content: dict[str, Any] = {
            "kind": "classification",
            "classes": list(found.class_names),
            "positive": found.class_names[cases.positive],
            "settings": {
                "predictions": os.path.abspath(settings.predictions),
                "references": os.path.abspath(self.references),
                "compare": settings.compare and os.path.abspath(settings.compare),
                **settings.group(ClassTableSettings),
                **asdict(bootstrap),
            },
            "conventions": classification.CONVENTIONS,
            "not_scored": {
                "without_reference": found.without_reference,
                "without_prediction": found.without_prediction,
            },
            **score_classes(cases, self.settings.num_bins, bootstrap),
            "cases": [asdict(row) for row in found.rows],
        }
        if found.unusable:
            unusable = [{"id": name, "reason": reason} for name, reason in found.unusable.items()]
            content["not_scored"]["unusable"] = unusable
        if settings.compare is not None:
            content["comparison"] = self._comparison(found, settings.compare)
        bins = content["reliability"]
        return Scores(
            content=content,
            num_cases=content["num_cases"],
            csv_tables={
                ".csv": self._rows(found),
                ".reliability.csv": (list(bins[0]), [list(row.values()) for row in bins]),
            },
            printed=[_printed(content)],
            paper_tables=class_tables(content),
            failures={name: Failure(reason) for name, reason in found.unusable.items()},
        )

    def _read(self, predictions: str) -> ClassTable:
        return read_class_tables(
            predictions,
            self.references,
            class_column=self.settings.class_column,
            baseline_column=self.settings.baseline_column,
            strict=self.settings.strict,
        )

    def _cases(self, rows: Sequence[ClassRow], class_names: tuple[str, ...]) -> ClassifiedCases:
        """Return rows as arrays, of patients where asked for."""
        has_baseline, positive = self.settings.baseline_column is not None, self.settings.positive
        if positive is None:
            positive = max(class_names)
            if self.settings.baseline_column and len(class_names) > 2:
                raise ConfigError(
                    "baseline_column speaks for one class against the rest; name it with --positive, one of "
                    f"{', '.join(class_names)}."
                )
        if positive not in class_names:
            raise ConfigError(f"positive is {positive!r}, which is no class.{nearest(positive, class_names)}")
        cases = ClassifiedCases(
            probabilities_NK=np.array([row.probabilities for row in rows], dtype=np.float64),
            classes_N=np.array([class_names.index(row.true_class) for row in rows]),
            class_names=class_names,
            patients=tuple(row.patient for row in rows),
            predicted_N=np.array([class_names.index(row.predicted) for row in rows]),
            positive=class_names.index(positive),
            baseline_N=np.array([row.baseline for row in rows], dtype=np.float64) if has_baseline else None,
        )
        return cases.of_patients() if self.settings.by_patient else cases

    def _comparison(self, found: ClassTable, compare: str) -> dict[str, Any]:
        """Compare both classifiers on the cases that both have."""
        predictions, others = self.settings.predictions, self._read(compare)
        if set(others.class_names) != set(found.class_names):
            raise DataError(
                f"{compare}: has the classes {', '.join(others.class_names)}, but {predictions} has "
                f"{', '.join(found.class_names)}; compare tables of the same classes."
            )
        mine = {row.id: row for row in found.rows}
        shared = [row for row in others.rows if row.id in mine]
        if not shared:
            raise DataError(f"{compare}: has no prediction of a case that {predictions} has; compare others.")
        ours = self._cases([mine[row.id] for row in shared], found.class_names)
        order = [others.class_names.index(name) for name in found.class_names]
        reordered = [replace(row, probabilities=tuple(row.probabilities[place] for place in order)) for row in shared]
        theirs = self._cases(reordered, found.class_names)
        # A case belongs to one patient in both tables, so that the bootstrap draws it in both at once.
        if ours.patients != theirs.patients:
            raise DataError(f"{compare}: names other patients than {predictions}; correct one of the two.")
        return {
            "predictions": os.path.abspath(compare),
            "num_cases": len(ours.patients),
            "paired": compare_classes(ours, theirs, self.settings.num_bins, self.settings.bootstrap),
        }

    def _rows(self, found: ClassTable) -> CsvTable:
        """Return the table of cases."""
        baseline = [self.settings.baseline_column] if self.settings.baseline_column else []
        head = ["id", "patient", "class", "predicted", *(f"probability_{name}" for name in found.class_names)]
        rows = [
            [row.id, row.patient, row.true_class, row.predicted, *row.probabilities]
            + ([row.baseline] if baseline else [])
            for row in found.rows
        ]
        return [*head, *baseline], rows


def _printed(content: Mapping[str, Any]) -> "Table":
    """Return the scores of a classifier, the baseline's, and the comparison, for the terminal."""
    table = printed_table(None, "Score", ("Value", "95 % interval"))
    for key, value in content["mean"].items():
        table.add_row(key, number_cell(value, "dice"), interval_cell(content["mean_ci95"][key], "dice"))
    for name, row in content.get("baseline", {}).items():
        label = Text(f"baseline: auc of {name}")
        table.add_row(label, number_cell(row["auc"], "dice"), interval_cell(row["ci95"], "dice"))
    for key, row in content.get("comparison", {}).get("paired", {}).items():
        interval = interval_cell(row["ci95"], "dice")
        table.add_row(Text(f"difference of {key}"), number_cell(row["difference"], "dice"), interval)
    return table
