"""``mim3d evaluate``: predictions against references, scored on the scan's own grid."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mim3d.config import nearest
from mim3d.data.case_records import listed
from mim3d.data.files import written_whole
from mim3d.data.grid_checks import require_same_grid
from mim3d.data.score_pairs import Pair, Pairs, find_pairs
from mim3d.data.volumes import Volume, read_grid, read_volume
from mim3d.errors import ConfigError, DataError
from mim3d.metrics import ABSENT, CONVENTIONS, SCORE_NAMES, LabelScore, score_labels, summarise, values_in
from mim3d.progress import counted


def evaluate(
    predictions: str,
    references: str | list[str],
    out: str,
    nsd_tolerance_mm: float = 1.0,
    labels: list[str] | None = None,
) -> str:
    """Score label maps against their references, per label and in the mean.

    Dice, 95 % Hausdorff distance, normalised surface distance and volume error, in millimetres and
    millilitres on the scan's own grid. Files are matched by name without suffix. The file of scores states
    its conventions.

    Args:
        predictions: folder that `mim3d predict` wrote, or a folder of label maps by any other tool.
        references: folder of label maps (labelsTr), label files, or any form of DATA with labels.
        out: file of scores to write, ending in .json; a table of the cases (.csv) comes beside it.
        nsd_tolerance_mm: distance in mm up to which two surfaces agree.
        labels: names or values of the labels to score; every declared one if left out.

    Returns:
        Path of the file of scores.

    Raises:
        ConfigError: `out` cannot be written, the tolerance is no length, or a label is unknown.
        DataError: nothing to match, an unreadable file, grids that disagree, or an undeclared label value.
    """
    _check_settings(out, nsd_tolerance_mm)
    found = find_pairs(predictions, references)
    declared = _distinct({value: name for value, name in found.labels.items() if value != 0})
    chosen = declared if labels is None else _chosen(labels, declared)
    for pair in found.pairs:
        require_same_grid(read_grid(pair.reference), read_grid(pair.prediction))
    scores = [
        _score(pair, list(chosen), nsd_tolerance_mm, strict=labels is None)
        for pair in counted(found.pairs, len(found.pairs), "scoring")
    ]
    names = chosen or {value: f"label_{value}" for value in sorted({v for case in scores for v in case})}
    if not names:
        raise DataError(f"{predictions}: neither the predictions nor the references hold a label to score.")
    settings = {
        "predictions": os.path.abspath(predictions),
        "references": os.path.abspath(references) if isinstance(references, str) else references,
        "nsd_tolerance_mm": nsd_tolerance_mm,
        "labels": labels,
    }
    content = _content(found, scores, names, settings)
    path = os.path.abspath(out)
    _write(path, content)
    _show(content)
    print(f"Scores of {len(scores)} cases: {path}")
    return path


def _check_settings(out: str, nsd_tolerance_mm: float) -> None:
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
    if not math.isfinite(nsd_tolerance_mm) or nsd_tolerance_mm < 0:
        raise ConfigError(f"nsd_tolerance_mm is {nsd_tolerance_mm}, but it takes a length in mm from 0.")


def _distinct(names: Mapping[int, str]) -> dict[int, str]:
    """The same names, followed by their value where two labels share one: a table needs one row each."""
    every = list(names.values())
    return {value: name if every.count(name) == 1 else f"{name}_{value}" for value, name in names.items()}


def _chosen(labels: Sequence[str], declared: Mapping[int, str]) -> dict[int, str]:
    """Value -> name of the labels asked for, by name or value; any value where nothing is declared."""
    chosen: dict[int, str] = {}
    for label in map(str, labels):
        value = int(label) if label.isdigit() else 0
        values = [known for known, name in declared.items() if name == label]
        if not values and (value in declared or (value > 0 and not declared)):
            values = [value]
        if not values:
            known_names = nearest(label, declared.values()) if declared else " None is: give values from 1."
            raise ConfigError(f"labels holds {label!r}, which is not declared.{known_names}")
        chosen[values[0]] = declared.get(values[0], f"label_{values[0]}")
    if not chosen:
        raise ConfigError("labels is empty; name the labels to score, or leave it out to score every one.")
    return chosen


def _score(pair: Pair, values: Sequence[int], nsd_tolerance_mm: float, *, strict: bool) -> dict[int, LabelScore]:
    """Scores of one case by label value: of `values`, or of those it holds where there are none.

    Raises:
        DataError: where `strict`, a map holds a value that is not among `values`.
    """
    prediction = read_volume(pair.prediction, label=True)
    reference = read_volume(pair.reference, label=True)
    held = _values(prediction) | _values(reference)
    if strict and values and not held <= set(values):
        volume = prediction if not _values(prediction) <= set(values) else reference
        strange = listed(sorted(_values(volume) - set(values)))
        raise DataError(
            f"{volume.grid.path}: holds label values that are not declared ({strange}; declared are "
            f"{listed(values)}); correct the map, or name the labels to score with --labels."
        )
    return score_labels(
        prediction.array,
        reference.array,
        reference.spacing_mm,
        values or sorted(held),
        nsd_tolerance_mm=nsd_tolerance_mm,
    )


def _values(volume: Volume) -> set[int]:
    lowest = int(volume.array.min())
    if lowest < 0:
        raise DataError(f"{volume.grid.path}: holds the label value {lowest}, but labels count from 0.")
    return set(values_in(volume.array))


def _content(
    found: Pairs,
    scores: Sequence[Mapping[int, LabelScore]],
    names: Mapping[int, str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """What the file of scores holds."""
    by_name = [{name: case.get(value, ABSENT) for value, name in names.items()} for case in scores]
    return {
        "labels": {str(value): name for value, name in names.items()},
        "settings": settings,
        "conventions": CONVENTIONS,
        "num_cases": len(scores),
        "not_scored": {
            "failed": found.failed,
            "without_reference": found.without_reference,
            "without_prediction": found.without_prediction,
        },
        **summarise(by_name, list(names.values())),
        "cases": [
            {
                "id": pair.id,
                "prediction": pair.prediction,
                "reference": pair.reference,
                "images": pair.images,
                "labels": {name: asdict(score) for name, score in case.items()},
            }
            for pair, case in zip(found.pairs, by_name, strict=True)
        ],
    }


def _write(path: str, content: Mapping[str, Any]) -> None:
    """The file of scores and beside it the table of cases, a row per case and label."""
    with written_whole(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
    with (
        written_whole(f"{os.path.splitext(path)[0]}.csv") as scratch,
        open(scratch, "w", encoding="utf-8", newline="") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(["id", "label", "status", *SCORE_NAMES])
        for case in content["cases"]:
            for name, score in case["labels"].items():
                rows.writerow([case["id"], name, score["status"], *(score[key] for key in SCORE_NAMES)])


def _show(content: Mapping[str, Any]) -> None:
    tolerance = content["settings"]["nsd_tolerance_mm"]
    table = Table()
    table.add_column("Label", no_wrap=True)
    for title in (
        "Cases",
        "Dice",
        "HD95 mm",
        f"NSD {tolerance:g} mm",
        "Volume error ml",
        "Missed",
        "Invented",
    ):
        table.add_column(title, justify="right")
    keys = ("dice", "hd95_mm", "nsd", "volume_error_ml")
    for name, row in content["per_label"].items():
        counts = [str(row[key]) for key in ("num_cases", "num_missed", "num_invented")]
        table.add_row(Text(name), counts[0], *(_number(row[key], key) for key in keys), *counts[1:])
    table.add_section()
    mean = content["mean"]
    table.add_row("mean", str(content["num_cases"]), *(_number(mean[key], key) for key in keys), "", "")
    Console().print(table)


def _number(value: float | None, key: str) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if key in ("dice", "nsd") else f"{value:.2f}"
