"""One cell, from its settings to its result: the commands that it is made of are called, never written anew."""

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import load_json, lock_file, try_lock
from mim3d.core.left_out import Failure
from mim3d.core.run_folder import Run, read_run, warnings_of
from mim3d.core.warned import UnfinishedWarning, recording
from mim3d.reporting.sources import trained_s
from mim3d.tasks import create_task
from mim3d.tasks.evaluation import EvaluationSettings
from mim3d.workflows.compare.cells import (
    Cell,
    is_done,
    is_usable,
    read_result,
    result_path,
    samples_per_step,
    write_result,
)
from mim3d.workflows.evaluate import evaluate_predictions
from mim3d.workflows.finetune.run import finetune_once
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.predict import PredictSettings, predict_scans
from mim3d.workflows.pretrain import PretrainSettings, run_pretraining
from mim3d.workflows.probe.run import ProbeSettings, run_probe

Outcome = Literal["done", "failed", "busy", "stopped", "waiting"]

#: Scores of a case and label that a result keeps.
KEPT_SCORES = ("dice", "nsd", "hd95_mm")


class _StoppedError(Exception):
    """Training was asked to stop before its last step."""


def run_cell(cell: Cell, cells: Mapping[str, Cell], out: Path) -> Outcome:
    """Run a cell, unless it is done, and write its result; a failure is a result too.

    Args:
        cell: The cell.
        cells: All cells by id.
        out: Folder of the comparison.
    Returns:
        What became of it. ``busy``: another process works on it; ``waiting``: its pre-training is not there yet.
    """
    (out / "cells").mkdir(parents=True, exist_ok=True)
    with lock_file(out / "cells" / f"{cell.id}.lock") as descriptor:
        if not try_lock(descriptor):
            return "busy"
        # A pre-training is asked for by the cells that begin with its weights, which may be gone.
        if is_usable(out, cell) if cell.kind == "pretrain" else is_done(out, cell):
            return "done"
        if cell.needs is not None and not is_usable(out, cells[cell.needs]):
            before = read_result(out, cells[cell.needs])
            if before is None or before["status"] == "done":
                return "waiting"
            reason = f"its pre-training {cell.needs} failed: {before['reason']}"
            write_result(out, cell, {"status": "failed", "reason": reason})
            return "failed"
        # What a run of before wrote must not vouch for one that begins anew.
        result_path(out, cell).unlink(missing_ok=True)
        started = time.monotonic()
        resumed = (out / "runs" / cell.id).exists()
        try:
            with _logged(out / "cells" / f"{cell.id}.log"), recording() as warned:
                found = _WORK[cell.kind](cell, out / "runs" / cell.id)
        except _StoppedError:
            return "stopped"
        except Exception as error:  # Whatever goes wrong in a cell, it must not stop the others.
            failure = Failure.of(error, cell.id)
            trace = {} if failure.traceback is None else {"traceback": failure.traceback}
            write_result(out, cell, {"status": "failed", "reason": failure.reason, **trace})
            return "failed"
        total_s = {} if resumed else {"total_s": round(time.monotonic() - started, 1)}
        write_result(out, cell, {"status": "done", **found, **total_s, "warnings": warned.rows})
        # Nothing goes on from them any more, and they are four fifths of what a run takes on the disk.
        shutil.rmtree(Run(out / "runs" / cell.id, command="", writes=False).checkpoints_dir, ignore_errors=True)
        return "done"


def locked_of(out: Path, names: Sequence[str]) -> list[str]:
    """Those of the cells with these ids that a process works on."""
    locked = []
    for name in names:
        path = out / "cells" / f"{name}.lock"
        if path.is_file():
            with lock_file(path) as descriptor:
                if not try_lock(descriptor):
                    locked.append(name)
    return locked


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Let what the commands print and warn of go into a file, behind what is there; a bar stays on the terminal."""

    def show(message: Warning | str, *_about: Any, **_named: Any) -> None:
        file.write(f"warning: {message}\n")

    with open(path, "a", encoding="utf-8") as file, warnings.catch_warnings(), redirect_stdout(file):
        warnings.showwarning = show
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(file):
            yield


def _pretrain(cell: Cell, folder: Path) -> dict[str, Any]:
    assert isinstance(cell.settings, PretrainSettings)
    run_pretraining(cell.settings)
    _require_finished(folder)
    return _facts(folder)


def _finetune(cell: Cell, folder: Path) -> dict[str, Any]:
    settings = cell.settings
    assert isinstance(settings, FinetuneSettings)
    trained = finetune_once(settings)
    if not trained.finished:
        raise _StoppedError
    task = create_task(settings.task)
    since = time.monotonic()
    predictions, scores = folder / "predictions", folder / "scores.json"
    not_predicted = ""
    try:
        # In the precision of training, which was settled once for all cells.
        precision: Any = settings.precision
        predict_scans(
            PredictSettings(
                str(folder), str(predictions), cell.test, accelerator=settings.accelerator, precision=precision
            )
        )
    except DataError as error:
        # Those that could be are scored; the others count as empty predictions.
        not_predicted = str(error)
    predict_s = round(time.monotonic() - since, 1)
    evaluate_predictions(
        EvaluationSettings(
            str(predictions),
            cell.test,
            str(scores),
            num_bootstrap=0,
            tables=False,
            num_workers=0,
            missing="worst" if task.needs == "label" else "leave_out",
            overwrite=True,
        )
    )
    content = load_json(scores)
    run = read_run(folder)
    lines, best_by = run.metrics, f"val/{task.best_by}"
    return {
        **_facts(folder),
        # Where arms may differ in more than weights and backbone: the table says so.
        "schedule": run.manifest["settings"].get("schedule"),
        "decoder": run.manifest["settings"]["task"].get("decoder"),
        "predict_s": predict_s,
        "step": trained.step,
        "best_by": task.best_by,
        "validation": [[line["step"], line[best_by]] for line in lines if line.get(best_by) is not None],
        **({"not_predicted": not_predicted} if not_predicted else {}),
        **_scores(content),
    }


def _probe(cell: Cell, folder: Path) -> dict[str, Any]:
    assert isinstance(cell.settings, ProbeSettings)
    folder.mkdir(parents=True, exist_ok=True)
    content = run_probe(cell.settings)
    rows = {row["kind"]: row for row in reversed(content["features"])}
    return {
        name: {kind: rows[row][kind]["balanced_accuracy"] for kind in ("linear", "neighbours")}
        for name, row in (("features", "encoder"), ("random", "random"))
        if row in rows
    }


_WORK: dict[str, Callable[[Cell, Path], dict[str, Any]]] = {
    "pretrain": _pretrain,
    "probe": _probe,
    "finetune": _finetune,
}


def _require_finished(folder: Path) -> None:
    if any(row["kind"] == UnfinishedWarning.kind for row in warnings_of(folder)):
        raise _StoppedError


def _facts(folder: Path) -> dict[str, Any]:
    """What a run says of its steps, time and memory."""
    run = read_run(folder)
    derived, lines = run.manifest.get("derived", {}), run.metrics
    need = derived.get("memory_need_bytes")
    rates = sorted(line["samples_per_s"] for line in lines if line.get("samples_per_s"))
    return {
        "steps": lines[-1]["step"] if lines else None,
        "train_s": round(trained_s(run) or 0, 1),
        "step_s": round(samples_per_step(run) / rates[len(rates) // 2], 4) if rates else None,
        "memory_bytes": sum(need.values()) if isinstance(need, dict) else derived.get("peak_memory_bytes"),
        "run": os.path.join("runs", folder.name),
    }


def _scores(content: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of every tested case, as far as the tables need them."""
    if content.get("kind") == "classification":
        keys = ("id", "patient", "true_class", "probabilities")
        rows = [{key: case.get(key) for key in keys} for case in content["cases"]]
        return {"task": "classification", "classes": content["classes"], "positive": content["positive"], "cases": rows}
    if not content.get("cases"):
        raise ConfigError("no case was scored; see the log of the cell.")
    rows = [
        {
            "id": case["id"],
            "labels": {
                name: {key: row.get(key) for key in KEPT_SCORES if key in row} for name, row in case["labels"].items()
            },
        }
        for case in content["cases"]
    ]
    return {"task": "segmentation", "cases": rows}
