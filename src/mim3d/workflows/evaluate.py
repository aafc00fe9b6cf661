"""Evaluation of predictions: the task scores them; here lie the checks before and the files after."""

import math
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.files import load_json, read_json, write_csv, write_json, write_text
from mim3d.core.left_out import note_left_out, write_tracebacks
from mim3d.core.names import number_of, printable
from mim3d.core.progress import say
from mim3d.core.warned import LeakWarning, UnlikeTrainingWarning, WarningRow, checked_rows, record_said, recording
from mim3d.datasets.mistaken import is_prediction_folder, run_command
from mim3d.datasets.references import CLASS_LIST_NAME, LIST_NAME, TABLE_NAME, is_class_table
from mim3d.tasks import find_task
from mim3d.tasks.evaluation import EvaluationSettings, Scores, print_tables


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
    with recording() as warned:
        scores = _scores(settings)
        for row in _prediction_warnings(settings.predictions):
            record_said(row["kind"], row["text"])
        for row in _prediction_warnings(settings.compare) if settings.compare else ():
            record_said(row["kind"], f"Of the compared predictions: {row['text']}")
    content = {**scores.content, "warnings": warned.rows} if warned.rows else scores.content
    path = os.path.abspath(settings.out)
    stem = os.path.splitext(path)[0]
    write_json(path, content, indent=1, allow_nan=False)
    for ending, (head, rows) in scores.csv_tables.items():
        write_csv(f"{stem}{ending}", head, rows)
    print_tables(scores.printed)
    if settings.tables and scores.paper_tables:
        from mim3d.reporting.paper_tables import latex, markdown

        leaks = " ".join(row["text"] for row in warned.rows if row["kind"] == LeakWarning.kind)
        tables = [replace(table, caption=f"{table.caption} {leaks}".rstrip()) for table in scores.paper_tables]
        write_text(f"{stem}.md", markdown(tables))
        write_text(f"{stem}.tex", latex(tables))
        say(f"Tables: {stem}.md, {stem}.tex")
    traced = {name: text for name, failure in scores.failures.items() if (text := failure.traceback)}
    write_tracebacks(Path(f"{stem}.tracebacks.txt"), traced)
    note_left_out(len(scores.failures), scores.num_cases + len(scores.failures), path)
    say(f"Scores of {number_of(scores.num_cases, 'case')}: {path}")
    return path


def _prediction_warnings(predictions: str) -> list[WarningRow]:
    """What the list beside predictions says of the networks that made them, and of scans unlike those of training."""
    folder = predictions if os.path.isdir(predictions) else os.path.dirname(predictions)
    found: list[WarningRow] = []
    for name in (LIST_NAME, CLASS_LIST_NAME):
        with suppress(OSError, ValueError, AttributeError, LookupError, TypeError):
            content = load_json(path := os.path.join(folder, name))
            found += checked_rows(content.get("network_warnings"))
            unlike = [printable(str(case["id"])) for case in content["cases"] if case.get("warnings")]
            if unlike:
                scans = number_of(len(unlike), "predicted scan", "are", of=len(content["cases"]))
                text = f"{scans} unlike those that the network learned from: {listed(unlike)}; {path} says how."
                found.append({"kind": UnlikeTrainingWarning.kind, "text": text})
    return found


def _check_outputs(settings: EvaluationSettings) -> None:
    """Refuse to replace what is scored, and, unless asked to, scores of other predictions or files of other origin."""
    stem = os.path.splitext(settings.out)[0]
    files = [settings.out, *(f"{stem}{ending}" for ending in (".csv", ".reliability.csv", ".md", ".tex"))]
    references = [settings.references] if isinstance(settings.references, str) else settings.references
    inputs = {os.path.realpath(path) for path in (settings.predictions, *references, settings.compare) if path}
    lists = {os.path.realpath(os.path.join(settings.predictions, name)) for name in (TABLE_NAME, LIST_NAME)}
    there = [file for file in files if os.path.exists(file)]
    own = next((file for file in there if os.path.realpath(file) in inputs | lists), None)
    if own is not None:
        raise ConfigError(f"out is {settings.out}, but {own} is an input and would be replaced; choose another --out.")
    if settings.overwrite or not there:
        return
    if there[0] != settings.out:
        raise ConfigError(f"{there[0]} exists and would be replaced; choose another --out, or use --overwrite true.")
    try:
        content = read_json(settings.out)
        predictions = str(content["settings"]["predictions"])
    except (DataError, KeyError, TypeError) as error:
        # A task of one's own decides what it writes.
        if settings.task is not None:
            return
        raise ConfigError(f"{settings.out} exists and is no file of scores; choose another --out.") from error
    # A table may be named by its folder.
    theirs, ours = (os.path.realpath(each).removesuffix(TABLE_NAME) for each in (predictions, settings.predictions))
    if os.path.join(theirs, "") != os.path.join(ours, ""):
        raise ConfigError(
            f"{settings.out} holds the scores of {predictions}; choose another --out, or use --overwrite true."
        )


def _scores(settings: EvaluationSettings) -> Scores:
    """Score predictions by a task that is named, or by the form that predictions of any tool have."""
    if settings.task is not None:
        return find_task(settings.task).score(settings)
    if is_class_table(settings.predictions):
        from mim3d.tasks.classification.evaluation import ClassEvaluation

        return ClassEvaluation(settings).scores()
    from mim3d.tasks.segmentation.evaluation import LabelEvaluation

    return LabelEvaluation(settings).scores()


def _check_folders(settings: EvaluationSettings) -> None:
    """Refuse natural mistakes: both sides are the same, or in each other's place, or a run stands for predictions."""
    ours, theirs = settings.predictions, settings.references
    command = run_command(ours)
    if command is not None and not is_prediction_folder(ours):
        raise ConfigError(
            f"predictions names {ours}, a run of mim3d {command}; give the folder that mim3d predict --weights {ours} "
            "--out PREDICTIONS writes."
        )
    if not isinstance(theirs, str):
        return
    if os.path.realpath(ours) == os.path.realpath(theirs):
        raise ConfigError(f"predictions and references both name {ours}, so nothing would be compared; give two.")
    if is_prediction_folder(theirs) and not is_prediction_folder(ours):
        raise ConfigError(
            f"references names {theirs}, which mim3d predict wrote, and predictions names {ours}, which it did not; "
            f"the two are the wrong way round: --predictions {theirs} --references {ours}."
        )


def _check_settings(settings: EvaluationSettings) -> None:
    _check_folders(settings)
    out = settings.out
    if not out.lower().endswith(".json"):
        raise ConfigError(f"out is {out}, but a file of scores ends in .json; use {out.rstrip('/')}.json.")
    if os.path.isdir(out):
        raise ConfigError(f"out is {out}, which is a folder; give the name of a file.")
    _check_outputs(settings)
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
