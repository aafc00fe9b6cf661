"""A comparison from its settings to its tables: planned, run cell by cell, stopped and gone on with at any moment."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mim3d.core.errors import (
    INTERRUPTED,
    TERMINATED,
    TO_BE_CONTINUED,
    ConfigError,
    note_exit_code,
    take_exit_code,
)
from mim3d.core.left_out import take_noted
from mim3d.core.names import number_of
from mim3d.core.own_code import own_code_in
from mim3d.core.progress import say
from mim3d.core.resources import num_cores
from mim3d.core.settings import CONFIG_NAME, nearest, write_yaml
from mim3d.core.signals import STOP_SIGNALS
from mim3d.workflows.compare.arm_cells import with_cells
from mim3d.workflows.compare.budget import in_time, say_cells, steps_of
from mim3d.workflows.compare.cells import Cell, is_done, left_of, read_result, write_result
from mim3d.workflows.compare.checks import check_arms
from mim3d.workflows.compare.plan import ComparisonPlan, cells_of, read_plan, settle
from mim3d.workflows.compare.run_cell import Outcome, locked_of, run_cell
from mim3d.workflows.compare.settings import CompareSettings
from mim3d.workflows.compare.slurm import write_scripts
from mim3d.workflows.compare.table import write_tables

#: Seconds between two looks at the processes that work on cells.
_LOOK_S = 0.2

#: Exit codes of a command that was asked to stop.
_STOPPED = (TO_BE_CONTINUED, INTERRUPTED, TERMINATED)

#: Exit code of a command for one cell that failed; its result says why.
CELL_FAILED = 2


def run_comparison(settings: CompareSettings) -> str:
    """Compare arms, and return the folder of the comparison.

    Raises:
        ConfigError: Settings that cannot work, before any work begins.
        CheckpointError: Weights that cannot be read or do not fit.
        DataError: Data that cannot be used.
    """
    out = Path(settings.out)
    if settings.cell is not None:
        return _run_one(settings.cell, settings)
    if settings.table_only:
        write_tables(out, settings)
        return settings.out
    settings = settings.with_recipes()
    plan = planned(settings)
    if settings.dry_run:
        say_cells(plan)
    elif settings.slurm:
        write_scripts(plan, command_of(settings))
    else:
        _run_all(plan)
    return settings.out


def planned(settings: CompareSettings) -> ComparisonPlan:
    """The plan with all its cells, saved in its folder.

    Raises:
        ConfigError: It leaves out cells of the plan before, and another process works by that one.
    """
    plan = settle(settings)
    check_arms(plan)
    plan = with_cells(plan, steps_of(plan))
    before = [name for name, _ in plan.earlier.values()]
    if set(before) - {cell.id for cell in plan.cells} and (worked_on := locked_of(plan.out, before)):
        raise ConfigError(
            f"Another process works on cell {worked_on[0]} of {plan.out}, by a plan with cells that this call leaves "
            "out; wait until it has ended, or ask for at least the same arms, labels, folds, seeds and settings."
        )
    plan.save()
    write_yaml(plan.out / CONFIG_NAME, settings.to_config())
    return plan


def command_of(settings: CompareSettings) -> list[str]:
    """The words of a command that goes on with the comparison, to be followed by ``--cell ID``."""
    # Code of the user's own was named by the user, who started this.
    allowed = ["--allow_code", "true"] if own_code_in(settings.to_config()) else []
    return ["compare", "--out", os.path.abspath(settings.out), *allowed]


def _run_one(name: str, settings: CompareSettings) -> str:
    """Run one cell, as a job of a cluster does.

    Raises:
        ConfigError: There is no such cell, or its pre-training is not there yet.
    """
    out = Path(settings.out)
    cells = {cell.id: cell for cell in cells_of(read_plan(out), settings)}
    if name not in cells:
        raise ConfigError(f"{out} has no cell {name}.{nearest(name, cells)}")
    outcome = run_cell(cells[name], cells, out)
    take_noted()
    if outcome == "waiting":
        raise ConfigError(f"cell {name} needs the run of {cells[name].needs}, which is not there; run that one first.")
    if outcome == "failed":
        note_exit_code(CELL_FAILED)
        say(f"{name}: {_missed(out, cells[name])}")
    else:
        say(f"{name}: {outcome}")
    return str(out)


def _run_all(plan: ComparisonPlan) -> None:
    """Run all cells that are not done, and write the tables."""
    cells = {cell.id: cell for cell in plan.cells}
    left = left_of(plan.out, plan.cells)
    done = len(cells) - len(left)
    say(f"{number_of(len(cells), 'cell')}, {done} of them done before; results: {plan.out / 'cells'}")
    outcomes = _in_turn(plan, left, cells) if plan.settings.jobs == 1 else _side_by_side(plan, left)
    # By now another process may have finished what it worked on.
    outcomes |= {cell.id: "done" for cell in left if outcomes.get(cell.id) == "busy" and is_done(plan.out, cell)}
    counts = Counter(outcomes.values())
    write_tables(plan.out, plan.settings)
    take_noted()
    unfinished = len(left) - counts["done"] - counts["failed"]
    misses = f", {counts['failed']} missed (the report says why; run again to try them again)" * bool(counts["failed"])
    say(f"{len(cells) - unfinished - counts['failed']} of {number_of(len(cells), 'cell')} done{misses}")
    if unfinished:
        say(f"{number_of(unfinished, 'cell')} left; go on with: mim3d compare --out {shlex.quote(str(plan.out))}")
    elif counts["failed"]:
        take_exit_code()
        note_exit_code(CELL_FAILED)


def _in_turn(plan: ComparisonPlan, left: Sequence[Cell], cells: Mapping[str, Cell]) -> dict[str, Outcome]:
    """Run cells one after another in this process; a request to stop stops all of them."""
    outcomes: dict[str, Outcome] = {}
    since = time.monotonic()
    for number, cell in enumerate(left, start=1):
        passed = time.monotonic() - since
        rest = f", about {in_time(passed / (number - 1) * (len(left) - number + 1))} left" if number > 2 else ""
        say(f"cell {number} of {len(left)}{rest}: {cell.id}")
        outcomes[cell.id] = outcome = run_cell(cell, cells, plan.out)
        _say_outcome(plan.out, cell, outcome)
        if outcome == "stopped":
            break
    return outcomes


def _say_outcome(out: Path, cell: Cell, outcome: Outcome) -> None:
    if outcome == "failed":
        say(f"  {_missed(out, cell)}")
    elif outcome == "busy":
        say("  another process works on it")


def _missed(out: Path, cell: Cell) -> str:
    result = read_result(out, cell)
    return f"missed: {'' if result is None else result['reason']}"


def _side_by_side(plan: ComparisonPlan, left: Sequence[Cell]) -> dict[str, Outcome]:
    """Run cells in several processes; when this one is stopped, they stop with a checkpoint."""
    waiting, working = list(left), dict[str, subprocess.Popen[bytes]]()
    outcomes: dict[str, Outcome] = {}
    ids = {cell.id for cell in left}
    words = [sys.executable, "-m", "mim3d", *command_of(plan.settings)]
    (plan.out / "cells").mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores() // plan.settings.jobs))}
    try:
        while waiting or working:
            for name, process in list(working.items()):
                if process.poll() is not None:
                    del working[name]
                    cell = next(cell for cell in left if cell.id == name)
                    outcomes[name] = _outcome_of(plan.out, cell, process.returncode)
                    say(f"{outcomes[name]} ({len(outcomes)} of {len(left)}): {name}")
            ready = [c for c in waiting if c.needs not in ids or outcomes.get(str(c.needs)) in ("done", "failed")]
            for cell in ready[: plan.settings.jobs - len(working)]:
                waiting.remove(cell)
                with open(plan.out / "cells" / f"{cell.id}.log", "ab") as log:
                    environment = {**threads, **os.environ}
                    working[cell.id] = subprocess.Popen(
                        [*words, "--cell", cell.id], stdout=log, stderr=log, env=environment
                    )
            if not working and waiting and not ready:
                break
            time.sleep(_LOOK_S)
    finally:
        for process in working.values():
            process.terminate()
        for process in working.values():
            process.wait()
    return outcomes


def _outcome_of(out: Path, cell: Cell, code: int) -> Outcome:
    """What became of a cell of another process, which may have ended without a word."""
    if is_done(out, cell):
        return "done"
    if code == 0:
        # Another process works on it, and writes its result.
        return "busy"
    if code in _STOPPED or -code in STOP_SIGNALS:
        return "stopped"
    if code != CELL_FAILED or read_result(out, cell) is None:
        how = f"was ended by {signal.Signals(-code).name}; memory may have run out" if code < 0 else "ended early"
        write_result(out, cell, {"status": "failed", "reason": f"its process {how} (cells/{cell.id}.log)."})
    return "failed"
