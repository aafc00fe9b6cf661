"""Scripts that run the cells of a comparison as arrays of jobs under SLURM, one command for each cell."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from mim3d.core.files import write_text
from mim3d.core.progress import say
from mim3d.workflows.compare.cells import Cell, left_of
from mim3d.workflows.compare.plan import ComparisonPlan

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=mim3d-{name}
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={logs}/cells/%x_%A_%a.log

set -euo pipefail
commands=(
{commands}
)
eval "srun ${{commands[$SLURM_ARRAY_TASK_ID]}}"
"""


def write_scripts(plan: ComparisonPlan, command: Sequence[str]) -> None:
    """Write and print the scripts: all pre-trainings first, then what begins with them.

    Args:
        plan: The plan.
        command: Words that go on with the comparison.
    """
    left = left_of(plan.out, plan.cells)
    stages = {
        "pretraining": [cell for cell in left if cell.kind == "pretrain"],
        "cells": [cell for cell in left if cell.kind != "pretrain"],
    }
    (plan.out / "cells").mkdir(parents=True, exist_ok=True)
    submits: list[str] = []
    for name, cells in stages.items():
        if not cells:
            continue
        path = Path(os.path.abspath(plan.out)) / f"{name}.sbatch"
        write_text(path, script(name, cells, command, os.path.abspath(plan.out)))
        after = "--dependency=afterany:$first " if submits else ""
        submit = f"sbatch --parsable {after}{shlex.quote(str(path))}"
        submits.append(submit if after or name == "cells" else f"first=$({submit})")
        for line in path.read_text(encoding="utf-8").splitlines():
            say(line)
    if not submits:
        say("every cell is done; write the tables with --table_only true")
        return
    say("set partition, time and memory in the scripts, then:")
    for submit in submits:
        say(f"  {submit}")
    say(f"and at the end: mim3d compare --out {shlex.quote(str(plan.out))} --table_only true")


def script(name: str, cells: Sequence[Cell], command: Sequence[str], out: str) -> str:
    """One script.

    Args:
        name: Name of the job.
        cells: The cells, a task of the array each.
        command: Words that go on with the comparison.
        out: Absolute folder of the comparison.
    """
    lines = [f"  {shlex.quote(shlex.join(['mim3d', *command, '--cell', cell.id]))}" for cell in cells]
    # Of paths sbatch reads a percent sign as a pattern, and a space as the end.
    logs = re.sub(r"([\\\s\"'])", r"\\\1", out).replace("%", "%%")
    return _SCRIPT.format(name=name, last=len(cells) - 1, logs=logs, commands="\n".join(lines))
