"""What a report is made of: runs and files of scores, each with a short name and a colour of its own."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import ConfigError
from mim3d.core.files import load_json
from mim3d.core.names import cut
from mim3d.core.run_folder import MANIFEST_NAME, RunRecord, read_run
from mim3d.core.settings import coerce
from mim3d.core.warned import WarningRow, checked_rows
from mim3d.datasets.mistaken import not_run
from mim3d.reporting.rendering import run_colour

#: Name of the folder of one fold, in that of all folds of a fine-tuning.
FOLD_NAME = re.compile(r"fold_(\d{1,6})")

#: A score, which may not be defined, and its interval.
Score = float | None
Interval = tuple[Score, Score] | None

#: What a report reads of scores of label maps and of classes: entry -> type, of the whole and of its parts.
_SCORES: Mapping[str, Any] = dict.fromkeys(("dice", "hd95_mm", "nsd"), Score)
_COUNTS: Mapping[str, Any] = dict.fromkeys(("num_cases", "num_missed", "num_invented"), int | None)
_ROW: Mapping[str, Any] = {**_SCORES, **_COUNTS, "std": dict[str, Score] | None, "ci95": dict[str, Interval] | None}
_CASE: Mapping[str, Any] = {
    "id": str | int,
    "labels": dict[str, Any],
    "prediction": str | None,
    "images": list[str] | None,
}
_LABEL_MAPS: Mapping[str, Any] = {
    "labels": dict[str, Any],
    "settings": dict[str, Any],
    "not_scored": dict[str, Any],
    "mean": dict[str, Any],
    "mean_ci95": dict[str, Interval] | None,
    "per_label": dict[str, Any],
    "cases": list[dict[str, Any]],
}
_BIN: Mapping[str, Any] = {"mean_probability": Score, "frequency": Score}
_BASELINE: Mapping[str, Any] = {"auc": Score, "ci95": Interval}
_CLASSES: Mapping[str, Any] = {
    "settings": dict[str, Any],
    "mean": dict[str, Score],
    "mean_ci95": dict[str, Interval],
    "confusion": list[list[int]],
    "per_class": dict[str, Any],
    "reliability": list[dict[str, Any]],
    "cases": list[dict[str, Any]],
    "baseline": dict[str, Any] | None,
}
_CLASS_CASE: Mapping[str, Any] = {
    "id": str | int,
    "patient": str | int | None,
    "true_class": str | int | None,
    "probabilities": list[float] | None,
}

#: Digits of the largest label value.
_LABEL_DIGITS = 9

#: Beyond it a value is no number that can be drawn.
_LARGEST_NUMBER = 1e300


@dataclass(frozen=True)
class NamedRun:
    """A run, with the name and colour that stand for it.

    Attributes:
        name: Fewest last parts of its path that tell it from the other sources.
        colour: Colour of its curves, ``#rrggbb``.
        record: Settings, metrics and manifest of the run folder.
    """

    name: str
    colour: str
    record: RunRecord

    @property
    def command(self) -> str:
        """The command that made the run."""
        return str(self.record.manifest.get("command") or self.record.config.get("command") or "run")

    @property
    def subject(self) -> str:
        """Name of the method or task in its settings, empty where they have neither."""
        for key in ("method", "task"):
            value = self.record.config.get(key)
            if value:
                return str(value.get("name", "")) if isinstance(value, Mapping) else str(value)
        return ""

    @property
    def data(self) -> str:
        """Path of what it learned from, else the digest of that; runs on one data set have the same."""
        data = self.record.config.get("data")
        return (
            os.path.abspath(data)
            if isinstance(data, str)
            else str((self.record.manifest.get("inputs") or {}).get("data"))
        )

    @property
    def warnings(self) -> list[WarningRow]:
        """What was warned of in the run."""
        return checked_rows(self.record.manifest.get("warnings"))

    def series(self, key: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Steps and finite values of a metric, two arrays of one length."""
        points = [(line["step"], line[key]) for line in self.record.metrics if is_number(line.get(key))]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return steps, values


def trained_s(run: RunRecord) -> float | None:
    """Seconds that the sessions of a run trained for; None where none logged any."""
    times = [float(line["time_s"]) for line in run.metrics if is_number(line.get("time_s"))]
    # The clock starts anew with every session: their last times add up.
    return sum((a for a, b in zip(times, [*times[1:], 0.0], strict=False) if b < a), 0.0) if times else None


@dataclass(frozen=True)
class ScoreSet:
    """A file of scores, with the name and colour that stand for it.

    Attributes:
        name: Fewest last parts of its path, or of its run's, that tell it from the other sources.
        colour: Colour of its points, ``#rrggbb``.
        content: What `mim3d evaluate` wrote.
    """

    name: str
    colour: str
    content: Mapping[str, Any]

    @property
    def is_of_classes(self) -> bool:
        """Whether these are scores of a classifier and not of label maps."""
        return _is_of_classes(self.content)

    @property
    def labels(self) -> dict[int, str]:
        """Names of the labels by value."""
        return {int(value): str(name) for value, name in self.content["labels"].items()}

    @property
    def names(self) -> set[str]:
        """Names of the labels or classes that have scores."""
        return set(self.content["per_class" if self.is_of_classes else "per_label"])

    @property
    def cases(self) -> dict[str, Mapping[str, Any]]:
        """Cases by id."""
        return {str(case["id"]): case for case in self.content["cases"]}

    @property
    def unusable(self) -> list[Mapping[str, Any]]:
        """Cases that could not be scored, each with its ``id`` and ``reason``."""
        not_scored = self.content.get("not_scored")
        rows = not_scored.get("unusable") if isinstance(not_scored, Mapping) else None
        return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []

    @property
    def warnings(self) -> list[WarningRow]:
        """What was warned of when these were scored, and of the networks that made the predictions."""
        return checked_rows(self.content.get("warnings"))

    def total(self, key: str) -> int:
        """Sum of a count over labels, such as ``num_missed``."""
        return sum(row.get(key) or 0 for row in self.content["per_label"].values())


def with_folds(path: str) -> list[str]:
    """The runs that a folder of all folds holds, in their order; else the folder alone."""
    folds = {
        int(found[1]): str(each) for each in Path(path).glob("fold_*") if (found := FOLD_NAME.fullmatch(each.name))
    }
    is_run = os.path.isfile(os.path.join(path, MANIFEST_NAME))
    return [path] if is_run or not folds else [folds[number] for number in sorted(folds)]


def read_sources(runs: Sequence[str], scores: Sequence[str]) -> tuple[list[NamedRun], list[ScoreSet]]:
    """Read runs, their own `scores.json`, and further files of scores.

    Args:
        runs: Run folders.
        scores: Further files of scores.

    Returns:
        The runs in the order they were given, and the files of scores, those of the runs first.

    Raises:
        ConfigError: A path is no run, or no file of scores.
    """
    run_paths = list(dict.fromkeys(os.path.abspath(path) for path in runs))
    for path in run_paths:
        if not os.path.isfile(os.path.join(path, MANIFEST_NAME)) and (said := not_run(path)):
            raise ConfigError(said)
    records = [read_run(path) for path in run_paths]
    own = [os.path.join(path, "scores.json") for path in run_paths]
    score_paths = [path for path in own if os.path.isfile(path)]
    score_paths = list(dict.fromkeys([*score_paths, *(os.path.abspath(path) for path in scores)]))
    home = {path: os.path.dirname(path) for path in score_paths if os.path.dirname(path) in run_paths}
    # A lone file of scores in a run folder is called after the run; all others after themselves.
    home = {path: run for path, run in home.items() if list(home.values()).count(run) == 1}
    names = short_names([*run_paths, *(path for path in score_paths if path not in home)])
    colours = {path: run_colour(position) for position, path in enumerate(names)}
    named = [NamedRun(names[path], colours[path], record) for path, record in zip(run_paths, records, strict=True)]
    owners = [(path, home.get(path, path)) for path in score_paths]
    return named, [ScoreSet(names[owner], colours[owner], _read_scores(Path(path))) for path, owner in owners]


def related_sets(sets: Sequence[ScoreSet]) -> list[list[ScoreSet]]:
    """Sets in groups that one table compares: they share a label or class, and cases or the place of references."""
    groups: list[list[ScoreSet]] = []
    for each in sets:
        near = [group for group in groups if any(_is_related(each, other) for other in group)]
        joined = [other for group in near for other in group] + [each]
        groups = [group for group in groups if group not in near] + [joined]
    return sorted(groups, key=lambda group: sets.index(group[0]))


def _is_related(one: ScoreSet, other: ScoreSet) -> bool:
    places = [str(each.content["settings"].get("references")) for each in (one, other)]
    return bool(one.names & other.names) and (places[0] == places[1] or bool(one.cases.keys() & other.cases.keys()))


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """For each absolute path the fewest last parts that tell it from the others, without `.json`."""
    parts = {path: Path(path).with_suffix("").parts if path.endswith(".json") else Path(path).parts for path in paths}
    names = {}
    for path, own in parts.items():
        others = [other for key, other in parts.items() if key != path]
        length = 1
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        names[path] = "/".join(own[-length:])
    return names


def is_number(value: object) -> bool:
    """Whether a value of a metrics line or a score is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: these scores cannot be read ({error}).") from error
    try:
        return _typed_classes(content) if _is_of_classes(content) else _typed_label_maps(content)
    except ConfigError as error:
        said = f"{path} is no file of scores ({error}); give the .json that `mim3d evaluate` wrote."
        raise ConfigError(said) from error


def _is_of_classes(content: Any) -> bool:
    return isinstance(content, dict) and content.get("kind") == "classification"


def _typed(content: Any, entries: Mapping[str, Any], where: str = "it") -> dict[str, Any]:
    """A mapping with those of its entries typed that a report reads; somebody else may have written it.

    Raises:
        ConfigError: An entry is of another type. It and its value are named.
    """
    found: dict[str, Any] = coerce(content, dict[str, Any], where)
    return found | {name: coerce(found.get(name), hint, f"{where}.{name}") for name, hint in entries.items()}


def _typed_label_maps(content: Any) -> dict[str, Any]:
    found = _typed({"settings": {}, "not_scored": {}, **content} if isinstance(content, dict) else content, _LABEL_MAPS)
    found |= {
        "settings": _typed(found["settings"], {"nsd_tolerance_mm": Score}, "settings"),
        "not_scored": _typed({"failed": [], **found["not_scored"]}, {"failed": list[Any]}, "not_scored"),
        "mean": _typed(found["mean"], _SCORES, "mean"),
        "per_label": {name: _typed(row, _ROW, f"per_label.{cut(name)}") for name, row in found["per_label"].items()},
        "cases": [_typed(case, _CASE, f"cases[{number}]") for number, case in enumerate(found["cases"])],
    }
    for number, case in enumerate(found["cases"]):
        if case["prediction"] is not None:
            coerce(case.get("reference"), str, f"cases[{number}].reference")
        case["labels"] = {
            name: _typed(row, _SCORES, f"cases[{number}].{cut(name)}") for name, row in case["labels"].items()
        }
    for value in found["labels"]:
        if not (value.isascii() and value.isdigit() and len(value) <= _LABEL_DIGITS):
            raise ConfigError(f"labels has {cut(value)!r}, but label values are whole numbers")
    return found


def _typed_classes(content: Any) -> dict[str, Any]:
    found = _typed({"settings": {}, **content}, _CLASSES)
    found["cases"] = [_typed(case, _CLASS_CASE, f"cases[{number}]") for number, case in enumerate(found["cases"])]
    found["reliability"] = [_typed(row, _BIN, "reliability") for row in found["reliability"]]
    if found["baseline"] is not None:
        parts = _typed(found["baseline"], {"baseline": dict[str, Any], "difference": dict[str, Any]}, "baseline")
        found["baseline"] = {name: _typed(part, _BASELINE, f"baseline.{name}") for name, part in parts.items()}
    if len(found["confusion"]) != len(found["per_class"]):
        raise ConfigError(f"confusion has {len(found['confusion'])} rows for {len(found['per_class'])} classes")
    return found
