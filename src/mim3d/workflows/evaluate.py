"""Evaluation of predictions: the task scores them; here lie the checks before and the files after."""

import math
import os
from pathlib import Path

from mim3d.core.errors import ConfigError
from mim3d.core.files import write_csv, write_json, write_text
from mim3d.core.left_out import note_left_out, write_tracebacks
from mim3d.core.progress import say
from mim3d.datasets.references import is_class_table
from mim3d.tasks import find_task
from mim3d.tasks.evaluation import EvaluationSettings, Scores


def evaluate_predictions(settings: EvaluationSettings) -> str:
    """Score predictions, write the file of scores with its tables, and print them.

    Returns:
        Absolute path of the file of scores.

    Raises:
        ConfigError: ``out`` cannot be written, a setting cannot work, or a preset, label or class is unknown.
        DataError: Nothing to match, or no case can be scored: unreadable files (a DICOM-SEG for one), grids that
            disagree, undeclared label values; with ``strict``, one case cannot be.
    """
    _check_settings(settings)
    scores = _scores(settings)
    path = os.path.abspath(settings.out)
    stem = os.path.splitext(path)[0]
    write_json(path, scores.content, indent=1, allow_nan=False)
    for ending, (head, rows) in scores.csv_tables.items():
        write_csv(f"{stem}{ending}", head, rows)
    if scores.printed:
        from rich.console import Console

        Console().print(*scores.printed, sep="\n")
    if settings.tables and scores.paper_tables:
        from mim3d.reporting.paper_tables import latex, markdown

        write_text(f"{stem}.md", markdown(scores.paper_tables))
        write_text(f"{stem}.tex", latex(scores.paper_tables))
        say(f"Tables: {stem}.md, {stem}.tex")
    traced = {name: text for name, failure in scores.failures.items() if (text := failure.traceback)}
    write_tracebacks(Path(f"{stem}.tracebacks.txt"), traced)
    note_left_out(len(scores.failures), scores.num_cases + len(scores.failures), path)
    say(f"Scores of {scores.num_cases} case{'' if scores.num_cases == 1 else 's'}: {path}")
    return path


def _scores(settings: EvaluationSettings) -> Scores:
    """Score predictions by a task that is named, or by the form that predictions of any tool have."""
    if settings.task is not None:
        return find_task(settings.task).score(settings)
    if is_class_table(settings.predictions):
        from mim3d.tasks.classification.evaluation import ClassEvaluation

        return ClassEvaluation(settings).scores()
    from mim3d.tasks.segmentation.evaluation import LabelEvaluation

    return LabelEvaluation(settings).scores()


def _check_settings(settings: EvaluationSettings) -> None:
    out = settings.out
    if not out.lower().endswith(".json"):
        raise ConfigError(f"out is {out}, but a file of scores ends in .json; use {out.rstrip('/')}.json.")
    if os.path.isdir(out):
        raise ConfigError(f"out is {out}, which is a folder; give the name of a file.")
    folder = os.path.dirname(os.path.abspath(out))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out is {out}, but {folder} cannot be made ({error.strerror}).") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"out is {out}, but {folder} cannot be written to; choose another.")
    tolerance_mm, num_workers = settings.nsd_tolerance_mm, settings.num_workers
    if tolerance_mm is not None and (not math.isfinite(tolerance_mm) or tolerance_mm < 0):
        raise ConfigError(f"nsd_tolerance_mm is {tolerance_mm}, but it takes a length in mm from 0.")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}, but it takes a number from 0, or nothing for one per core.")
