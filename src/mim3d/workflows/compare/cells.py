"""The cells of a comparison: each a run of a command with its settings, known by a digest of them, with one result."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mim3d.backbones import BACKBONES, create_recipe
from mim3d.core.errors import ConfigError
from mim3d.core.files import load_json, plain_text, write_json
from mim3d.core.names import cut, is_entry_name, joined_name
from mim3d.core.run_folder import FREE_ON_RESUME, RunRecord
from mim3d.core.settings import build_settings, coerce, to_mapping, to_named
from mim3d.methods import METHODS, create_method
from mim3d.tasks import TASKS, create_task
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.pretrain import PretrainSettings
from mim3d.workflows.probe.run import ProbeSettings

Kind = Literal["pretrain", "probe", "finetune"]

#: Settings class of each kind of cell, in the order in which those of one arm are run.
KINDS: dict[Kind, type] = {"pretrain": PretrainSettings, "probe": ProbeSettings, "finetune": FinetuneSettings}

#: Settings that say where and how fast, or whose content a digest holds in their place.
_NOT_COMPARED = FREE_ON_RESUME | {"data", "weights", "train_list", "held_out_list", "accelerator", "fold"}

#: Characters of the digest in an id.
_DIGITS = 10


@dataclass(frozen=True, kw_only=True)
class _Segmented:
    """Scores of a case: label -> score -> value."""

    id: str
    labels: dict[str, dict[str, float | None]]


@dataclass(frozen=True, kw_only=True)
class _Classified:
    """Probabilities of a case."""

    id: str
    patient: str
    true_class: str
    probabilities: list[float] | None


#: What is read of a result, which somebody else may have changed: entry -> type, by status.
_RESULTS: Mapping[str, Mapping[str, Any]] = {
    "failed": {"status": Literal["failed"], "reason": str},
    "done": {
        **dict.fromkeys(("steps", "train_s", "step_s", "memory_bytes", "total_s"), float | None),
        "warnings": list[dict[str, Any]] | None,
    },
}
_FINETUNED: Mapping[str, Any] = {"validation": list[tuple[int, float]], "not_predicted": str | None}
_SCORED: Mapping[str, Mapping[str, Any]] = {
    "segmentation": {"cases": list[_Segmented]},
    "classification": {"fold": int, "classes": list[str], "positive": str, "cases": list[_Classified]},
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        kind: The command that it is a run of; fine-tuning is followed by prediction and scores.
        arm: Name of its arm.
        fold: Number of its fold.
        labels: Amount of labels, as the user wrote it; empty for pre-training and probes.
        num_patients: Number of labelled patients; 0 for pre-training.
        seed: Its seed.
        settings: Settings of the command.
        needs: Id of the pre-training that comes before it; None where there is none.
        test: List of the cases that are tested; empty for pre-training.
        id: Name of its run, which ends in the digest of all that its result follows from.
    """

    kind: Kind
    arm: str
    fold: int
    labels: str = ""
    num_patients: int = 0
    seed: int
    settings: PretrainSettings | ProbeSettings | FinetuneSettings
    needs: str | None = None
    test: str = ""
    id: str = ""

    def with_id(self, identity: Mapping[str, Any]) -> "Cell":
        """The cell under its name.

        Args:
            identity: What its result follows from besides its settings: the arm, the data and the cases of each part.
        """
        content = {"kind": self.kind, "settings": self._compared(), "needs": self.needs, **identity}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:_DIGITS]
        parts = [self.kind, self.arm, f"fold{self.fold}", self.labels.replace("%", "pct"), f"seed{self.seed}", digest]
        return replace(self, id=joined_name([part for part in parts if part]))

    def under(self, out: Path) -> "Cell":
        """The cell with its paths in the folder of a comparison, which may have been moved or come from elsewhere."""
        place = Path("runs") / self.id / ("probe.json" if self.kind == "probe" else "")
        before = str(self.settings.out).removesuffix(str(place))

        def moved(path: str | None) -> str | None:
            if not path or before in ("", str(self.settings.out)) or not path.startswith(before):
                return path
            return str(out / path.removeprefix(before))

        names = ("data", "weights", "train_list", "held_out_list")
        paths: dict[str, Any] = {
            name: moved(getattr(self.settings, name)) for name in names if hasattr(self.settings, name)
        }
        return replace(
            self, settings=replace(self.settings, **paths, out=str(out / place)), test=moved(self.test) or ""
        )

    @property
    def key(self) -> tuple[str, str, int, str, int]:
        """What one cell of a plan is told from the others by."""
        return self.kind, self.arm, self.fold, self.labels, self.seed

    def content(self) -> dict[str, Any]:
        """All that it computes, as far as its plan tells: settings with the defaults of this version, and its lists."""
        values = self._compared()
        named: tuple[tuple[str, Callable[[Any], Any], Mapping[str, Any]], ...] = (
            ("task", create_task, TASKS),
            ("method", create_method, METHODS),
            ("backbone", create_recipe, BACKBONES),
        )
        for name, create, registry in named:
            if values.get(name) is not None:
                values[name] = to_named(create(values[name]), registry)
        paths = {name: getattr(self.settings, name, None) for name in ("train_list", "held_out_list")}
        for name, path in {**paths, "test": self.test or None}.items():
            values[name] = None if path is None else plain_text(path)
        return values | {"needs": self.needs, "weights": getattr(self.settings, "weights", None)}

    def _compared(self) -> dict[str, Any]:
        return {name: value for name, value in to_mapping(self.settings).items() if name not in _NOT_COMPARED}

    def to_row(self) -> dict[str, Any]:
        """The cell as the plan holds it."""
        row: dict[str, Any] = to_mapping(self)
        return row

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Cell":
        """A cell of a plan.

        Raises:
            ConfigError: It is none.
        """
        kind = KINDS.get(row.get("kind", ""))
        if kind is None or not is_entry_name(str(row.get("id"))):
            raise ConfigError(f"{cut(repr(row.get('kind')))} with the id {cut(repr(row.get('id')))} is no cell.")
        return build_settings(cls, {**row, "settings": build_settings(kind, row["settings"], "settings")}, "cell")


def samples_per_step(run: RunRecord) -> int:
    """Samples that a process of a run takes to a step."""
    return math.prod(int(run.manifest["settings"].get(name) or 1) for name in ("batch_size", "accumulation"))


def result_path(out: Path, cell: Cell) -> Path:
    """File of the result of a cell in the folder of its comparison."""
    return out / "cells" / f"{cell.id}.json"


def read_result(out: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a cell, whether it was finished or missed; None where there is none, or one that cannot be read."""
    with suppress(OSError, ValueError, TypeError, LookupError, ConfigError):
        content = coerce(load_json(result_path(out, cell)), dict[str, Any], "it")
        # What is no number there would be none in the tables.
        json.dumps(content, allow_nan=False)
        known = _RESULTS["done" if content.get("status") == "done" else "failed"]
        if content.get("status") == "done" and cell.kind == "finetune":
            known = {**known, **_FINETUNED, **_SCORED[content["task"]]}
        for name, hint in known.items():
            coerce(content.get(name), hint, name)
        return content if content["cell"] == cell.id else None
    return None


def is_done(out: Path, cell: Cell) -> bool:
    """Whether a cell is finished; one that failed is not."""
    result = read_result(out, cell)
    return result is not None and result["status"] == "done"


def is_usable(out: Path, cell: Cell) -> bool:
    """Whether a cell is finished, and its run is still there for the cells that need it."""
    return is_done(out, cell) and (out / "runs" / cell.id).exists()


def left_of(out: Path, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that are still to be run: those that are not finished, and those of which such a one needs the run."""
    left = {cell.id: cell.needs for cell in cells if not is_done(out, cell)}
    needed = set(left.values())
    return [cell for cell in cells if cell.id in left or (cell.id in needed and not is_usable(out, cell))]


def write_result(out: Path, cell: Cell, content: Mapping[str, Any]) -> None:
    """Write the result of a cell, whole or not at all."""
    path = result_path(out, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"cell": cell.id, "kind": cell.kind, "arm": cell.arm, "fold": cell.fold, "labels": cell.labels}
    write_json(path, {**about, "num_patients": cell.num_patients, "seed": cell.seed, **content}, indent=1)
