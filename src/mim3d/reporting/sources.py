"""What a report is made of: runs and files of scores, each with a short name and a colour of its own."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mim3d.core.run_folder import RunRecord, read_run
from mim3d.reporting.curves import Curves
from mim3d.reporting.drawing import run_colour
from mim3d.reporting.score_tables import ScoreSet, read_scores


@dataclass(frozen=True)
class NamedRun:
    """A run, with the name and colour that stand for it."""

    name: str
    colour: str
    record: RunRecord

    @property
    def command(self) -> str:
        """The command that made it."""
        return str(self.record.manifest.get("command") or self.record.config.get("command") or "run")

    @property
    def subject(self) -> str:
        """The method or task of its settings, or nothing."""
        for key in ("method", "task"):
            value = self.record.config.get(key)
            if value:
                return str(value.get("name", "")) if isinstance(value, Mapping) else str(value)
        return ""

    @property
    def curves(self) -> Curves:
        """Its metrics, to be drawn."""
        return Curves(self.name, self.colour, self.record.metrics)


@dataclass(frozen=True)
class Sources:
    """All that a report shows."""

    runs: tuple[NamedRun, ...]
    scores: tuple[ScoreSet, ...]


def read_sources(runs: Sequence[str], scores: Sequence[str]) -> Sources:
    """Read runs, their own `scores.json`, and further files of scores.

    Raises:
        ConfigError: a path is no run, or no file of scores.
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
    return Sources(
        runs=tuple(
            NamedRun(names[path], colours[path], record) for path, record in zip(run_paths, records, strict=True)
        ),
        scores=tuple(
            ScoreSet(names[home.get(path, path)], colours[home.get(path, path)], read_scores(Path(path)))
            for path in score_paths
        ),
    )


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
