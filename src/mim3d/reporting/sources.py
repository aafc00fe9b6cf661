"""What a report is made of: runs and files of scores, each with a short name and a colour of its own."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import ConfigError
from mim3d.core.files import load_json
from mim3d.core.run_folder import RunRecord, read_run
from mim3d.reporting.rendering import run_colour


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

    def series(self, key: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Steps and finite values of a metric, two arrays of one length."""
        points = [(line["step"], line[key]) for line in self.record.metrics if is_number(line.get(key))]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return steps, values


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
        return self.content.get("kind") == "classification"

    @property
    def labels(self) -> dict[int, str]:
        """Names of the labels by value."""
        return {int(value): str(name) for value, name in self.content["labels"].items()}

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

    def total(self, key: str) -> int:
        """Sum of a count over labels, such as ``num_missed``."""
        return sum(row.get(key, 0) for row in self.content["per_label"].values())


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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: these scores cannot be read ({error}).") from error
    if not isinstance(content, dict) or not _can_be_shown(content):
        raise ConfigError(f"{path} is no file of scores; give the .json that `mim3d evaluate` wrote.")
    return content


def _can_be_shown(content: Mapping[str, Any]) -> bool:
    """Whether scores of either kind hold what a report reads of them."""
    kinds = {"mean": dict, "mean_ci95": dict, "confusion": list, "reliability": list, "per_class": dict, "cases": list}
    is_of_classes = content.get("kind") == "classification"
    if not is_of_classes:
        kinds = {"labels": dict, "mean": dict, "per_label": dict, "cases": list}
    if any(not isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return False
    if is_of_classes:
        rows = content["reliability"]
        if not all(isinstance(row, dict) and {"mean_probability", "frequency"} <= row.keys() for row in rows):
            return False
        cells = [cell for row in content["confusion"] if isinstance(row, list) for cell in row]
        values = [*content["mean"].values(), *cells]
    else:
        cases = content["cases"]
        if not all(isinstance(case, dict) and "id" in case and isinstance(case.get("labels"), dict) for case in cases):
            return False
        of_cases = [row for case in cases for row in case["labels"].values()]
        rows = [content["mean"], *content["per_label"].values(), *of_cases]
        if not all(isinstance(row, dict) for row in rows) or not all(value.isdigit() for value in content["labels"]):
            return False
        values = [row.get(key) for row in rows for key in ("dice", "hd95_mm", "nsd")]
    return all(isinstance(value, int | float | None) for value in values)
