"""The page of a report: what each section shows, and a remark in the place of what is missing.

The templates say how it is shown, one for each section. The page is one HTML file that needs nothing but itself.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import matplotlib.style
import numpy as np
import yaml

from mim3d import __version__
from mim3d.core.errors import ConfigError, DataError, Mim3dError
from mim3d.core.files import plain_text, write_text
from mim3d.core.names import name_digest
from mim3d.core.progress import say
from mim3d.core.settings import flat
from mim3d.reporting import scan_images
from mim3d.reporting.charts import curve_names, curves_chart, dice_chart, reliability_chart
from mim3d.reporting.paper_tables import CLASS_COLUMNS, Column
from mim3d.reporting.rendering import interval, label_colour, number, render
from mim3d.reporting.sources import NamedRun, ScoreSet, read_sources
from mim3d.scans.grids import is_there

#: Most labels whose Dice a caption names.
_NAMED_LABELS = 4
_HISTORY_STEPS = 5
_CROP = {"image", "reference", "prediction"}
#: Scores of label maps that are shown.
LABEL_COLUMNS = (Column("dice", "Dice", 3), Column("hd95_mm", "HD95 (mm)", 2), Column("nsd", "NSD", 3))
#: Scores of which less is better.
LESS_IS_BETTER = {"hd95_mm"}


@dataclass(frozen=True, kw_only=True)
class ScoreCell:
    """A score of one set as text.

    Attributes:
        value: The score, or a dash.
        deviation: Its standard deviation over cases, empty where none is shown.
        interval: Its 95 % interval as "low to high", empty where none is shown.
        difference: Its difference to that of the first set, empty where none is shown.
        verdict: Whether the difference makes the score "better" or "worse", or leaves it the "same".
    """

    value: str
    deviation: str = ""
    interval: str = ""
    difference: str = ""
    verdict: str = ""


# A matplotlibrc, which may lie in the folder where the user stands, decides nothing: it could run LaTeX.
@matplotlib.style.context("default")
def write_report(runs: Sequence[str], out: str, scores: Sequence[str], *, overwrite: bool = False) -> str:
    """Write a report to a file, print its path, and return it.

    Args:
        runs: Folders of runs.
        out: File of the page, ending in .html.
        scores: Files of scores besides those of the runs.
        overwrite: Whether a report on other runs is replaced.
    Raises:
        ConfigError: A path is no run or no file of scores, or ``out`` cannot be written or holds something else.
    """
    if not runs:
        raise ConfigError("runs is empty; name at least one run folder.")
    if not out.lower().endswith((".html", ".htm")):
        raise ConfigError(f"out is {out}, but a report ends in .html; use {out.rstrip('/')}.html.")
    if os.path.isdir(out):
        raise ConfigError(f"out is {out}, which is a folder; give the name of a file.")
    path = os.path.abspath(out)
    marks = [name_digest(os.path.realpath(run)) for run in runs]
    _require_own(out, marks, overwrite=overwrite)
    shown_runs, shown_scores = read_sources(runs, scores)
    maps = [each for each in shown_scores if not each.is_of_classes]
    classes = [each for each in shown_scores if each.is_of_classes]
    images = [shown for run in shown_runs if (shown := _training_images(run))]
    sources: list[NamedRun | ScoreSet] = [*shown_runs, *shown_scores]
    said = [(each.name, each.warnings) for each in sources if each.warnings]
    sections: dict[str, tuple[str, dict[str, Any]]] = {
        **({"warnings": ("Warnings", {"sources": said})} if said else {}),
        "runs": (
            "Runs",
            {
                "rows": [_run_row(run) for run in shown_runs],
                "left_out": [(run.name, run.record.left_out) for run in shown_runs if run.record.left_out],
            },
        ),
        "scores": ("Scores", _scores(maps, classes)),
        "segmentations": ("Segmentations", {"has_classes": bool(classes), **_segmentations(maps)}),
        "curves": ("Learning curves", {"kinds": _curves(shown_runs)}),
        "images": ("Images from training", {"runs": images}),
        "settings": ("Settings and environment", _settings(shown_runs)),
    }
    names = [run.name for run in shown_runs]
    page = render(
        "report.html",
        runs=" ".join(marks),
        title=" · ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more runs",
        lead=f"{len(names)} {'run' if len(names) == 1 else 'runs'}, {datetime.now():%d %B %Y, %H:%M}",
        sections=[(anchor, title, render(f"{anchor}.html", **shown)) for anchor, (title, shown) in sections.items()],
        footer=f"Written by mim3d {__version__} report.",
    )
    write_text(path, page)
    say(f"Report: {path}")
    return path


def _require_own(out: str, marks: Sequence[str], *, overwrite: bool) -> None:
    """Refuse to replace a file that is no report, and unless asked to, a report that shares no run with these."""
    if not os.path.exists(out):
        return
    try:
        page = plain_text(out)
    except (OSError, UnicodeDecodeError):
        page = ""
    if "Written by mim3d " not in page:
        raise ConfigError(f"{out} exists and is no report of mim3d; choose another --out.")
    found = re.search(r'<meta name="mim3d-runs" content="([0-9a-f ]*)">', page)
    if found and not overwrite and not set(marks) & set(found[1].split()):
        raise ConfigError(f"{out} is a report on other runs; choose another --out, or use --overwrite true.")


def _run_row(run: NamedRun) -> list[str]:
    """What was run, and how it went."""
    losses, dice, speed, times_s = (run.series(key)[1] for key in ("loss", "val/dice", "samples_per_s", "time_s"))
    # The clock starts anew with every session of a run: their last times add up.
    total_s = round(sum(a for a, b in zip(times_s, [*times_s[1:], 0.0], strict=False) if b < a))
    hours, minutes, seconds = total_s // 3600, total_s // 60 % 60, total_s % 60
    duration = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
    steps = [int(line["step"]) for line in run.record.metrics]
    return [
        run.name,
        run.command,
        run.subject or "–",
        _steps_done(run, max(steps)) if steps else "none logged",
        f"{losses[-1]:.4g}" if losses.size else "–",
        f"{dice.max():.4f}" if dice.size else "–",
        duration if times_s.size else "–",
        f"{np.median(speed):.3g}" if speed.size else "–",
        _shown(run.record.config.get("seed")),
    ]


def _steps_done(run: NamedRun, last: int) -> str:
    """The last step, and of how many where it was not the end."""
    planned = (run.record.manifest.get("derived") or {}).get("max_steps")
    return f"{last} of {planned}" if isinstance(planned, int) and last < planned else str(last)


def _scores(maps: Sequence[ScoreSet], classes: Sequence[ScoreSet]) -> dict[str, Any]:
    """The tables of scores, each case's Dice or the calibration, and what the numbers mean."""
    shown: dict[str, Any] = {"maps": maps, "classes": classes}
    if maps:
        tolerance_mm = maps[0].content.get("settings", {}).get("nsd_tolerance_mm")
        shown |= {
            "columns": LABEL_COLUMNS,
            "tolerance": f" {tolerance_mm:g} mm" if tolerance_mm else "",
            "label_rows": label_rows(maps),
            "case_rows": case_rows(maps),
            "same_cases": len({frozenset(each.cases) for each in maps}) == 1,
            "dice_chart": dice_chart(maps),
        }
    if classes:
        shown |= {
            "class_rows": class_rows(classes),
            "confusions": [(each, list(each.content["per_class"]), each.content["confusion"]) for each in classes],
            "reliability_chart": reliability_chart(classes),
        }
    return shown


def label_rows(sets: Sequence[ScoreSet]) -> list[tuple[str, list[ScoreCell]]]:
    """Scores of label maps per label, then their mean: for each of LABEL_COLUMNS a cell per set.

    Deviations and intervals are shown for up to two sets, and differences from the second set on.
    """
    labels = dict.fromkeys(name for each in sets for name in each.content["per_label"])
    rows = [(label, [each.content["per_label"].get(label, {}) for each in sets]) for label in labels]
    rows.append(("mean", [{**each.content["mean"], "ci95": each.content.get("mean_ci95")} for each in sets]))
    return [(title, [cell for column in LABEL_COLUMNS for cell in _cells(column, row)]) for title, row in rows]


def _cells(column: Column, rows: Sequence[Mapping[str, Any]]) -> list[ScoreCell]:
    """One score of every set."""
    cells: list[ScoreCell] = []
    first = rows[0].get(column.key)
    for row in rows:
        value, deviation, ends = (found.get(column.key) for found in (row, row.get("std") or {}, row.get("ci95") or {}))
        if len(rows) > 2 or (row.get("num_cases") or 0) < 2:
            deviation = None
        difference, verdict = "", ""
        if cells and value is not None and first is not None:
            change = value - first
            difference, verdict = "±0", "same"
            if abs(change) >= 0.5 * 10**-column.decimals:
                difference = ("+" if change > 0 else "") + number(change, column.decimals)
                verdict = "better" if (change > 0) != (column.key in LESS_IS_BETTER) else "worse"
        cells.append(
            ScoreCell(
                value=number(value, column.decimals),
                deviation="" if deviation is None else number(deviation, column.decimals),
                interval="" if len(rows) > 2 else interval(ends, column.decimals),
                difference=difference,
                verdict=verdict,
            )
        )
    return cells


def case_rows(sets: Sequence[ScoreSet]) -> list[tuple[str, list[str]]]:
    """Scores of every case as means over its labels: for each of LABEL_COLUMNS a text per set."""
    cases = [each.cases for each in sets]
    return [
        (
            name,
            [
                number(case_mean(held[name], column.key) if name in held else None, column.decimals)
                for column in LABEL_COLUMNS
                for held in cases
            ],
        )
        for name in sorted({name for held in cases for name in held})
    ]


def case_mean(case: Mapping[str, Any], key: str) -> float | None:
    """Mean of a score over the labels of a case that have it, or None where none has."""
    values = [score.get(key) for score in case["labels"].values()]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def class_rows(sets: Sequence[ScoreSet]) -> list[tuple[str, list[ScoreCell]]]:
    """Scores of classifiers that any of them has: a cell per set."""
    rows = []
    for column in CLASS_COLUMNS:
        key = column.key
        if any(key in each.content["mean"] for each in sets):
            pairs = [(each.content["mean"].get(key), each.content["mean_ci95"].get(key)) for each in sets]
            cells = [ScoreCell(value=number(value, 3), interval=interval(ends, 3)) for value, ends in pairs]
            rows.append(("Expected calibration error" if key == "ece" else column.title, cells))
    return rows


def _segmentations(maps: Sequence[ScoreSet]) -> dict[str, Any]:
    """Worst, median and best case by the mean Dice over labels and sets, of those that all sets scored."""
    labels = dict(sorted({value: name for each in maps for value, name in each.labels.items()}.items()))
    colours = {value: label_colour(position) for position, value in enumerate(labels)}
    shared = set.intersection(*(set(each.cases) for each in maps)) if maps else set()
    means = {}
    for case_id in sorted(shared or {name for each in maps[:1] for name in each.cases}):
        dice = [case_mean(each.cases[case_id], "dice") for each in maps if case_id in each.cases]
        known = [value for value in dice if value is not None]
        if known:
            means[case_id] = float(np.mean(known))
    ranked = sorted(means, key=lambda name: means[name])
    chosen = {f"Case {position}": name for position, name in enumerate(ranked, start=1)}
    if len(ranked) >= 3:
        chosen = {"Worst case": ranked[0], "Median case": ranked[(len(ranked) - 1) // 2], "Best case": ranked[-1]}
    return {
        "has_maps": bool(maps),
        "labels": [(name, colours[value]) for value, name in labels.items()],
        "cases": [(rank, case_id, *_case(case_id, maps, colours)) for rank, case_id in chosen.items()],
    }


def _case(
    case_id: str, sets: Sequence[ScoreSet], colours: Mapping[int, str]
) -> tuple[str, list[tuple[ScoreSet, str, str]]]:
    """A remark on a case, and for every set that predicted it the set, its Dice and its image."""
    held = [each for each in sets if case_id in each.cases and each.cases[case_id].get("prediction") is not None]
    if not held:
        return f"{case_id} was not predicted and is scored as an empty prediction.", []
    cases = [each.cases[case_id] for each in held]
    images = [path for case in cases for path in (case.get("images") or ())]
    image = images[0] if images and is_there(images[0]) else None
    remark = ""
    if image is None:
        remark = f"The scan of {case_id} is not known or no longer there, so its labels are shown on black."
    try:
        region = scan_images.read_region(str(cases[0]["reference"]), [str(case["prediction"]) for case in cases], image)
    except Mim3dError as error:
        return f"{case_id} cannot be shown: {error}", []
    figures = []
    for each, case, prediction in zip(held, cases, region.predictions, strict=True):
        dice = [f"{name} {number(score.get('dice'), 3)}" for name, score in case["labels"].items()]
        mean = f"mean {number(case_mean(case, 'dice'), 3)}"
        caption = ", ".join([*(dice if len(dice) <= _NAMED_LABELS else []), mean])
        figures.append((each, caption, scan_images.overlay_image(region, prediction, colours)))
    return remark, figures


def _curves(runs: Sequence[NamedRun]) -> list[dict[str, Any]]:
    """Losses, validation scores and learning rates, runs of one kind in one set of panels."""
    kinds: dict[str, list[NamedRun]] = {}
    for run in runs:
        kinds.setdefault(f"{run.command} {run.subject}".strip(), []).append(run)
    shown = []
    for kind, members in kinds.items():
        main, others = curve_names(members)
        shown.append(
            {
                "title": kind,
                "legend": [(run.name, run.colour) for run in members],
                "chart": curves_chart(members, main) if main else "",
                "further": curves_chart(members, others) if main and others else "",
            }
        )
    return shown


def _training_images(run: NamedRun) -> dict[str, Any]:
    """The last images that a run saved and its reconstructions over training; empty where none are expected."""
    files = run.record.pictures
    if not files:
        return {"remark": f"{run.name} has saved no images."} if run.command == "pretrain" else {}
    steps = list(files)
    count = min(_HISTORY_STEPS, len(steps))
    chosen = [steps[round(position)] for position in np.linspace(0, len(steps) - 1, count)]
    try:
        history = {step: scan_images.read_training_images(files[step]) for step in chosen}
    except DataError as error:
        return {"remark": str(error)}
    step, last = list(history.items())[-1]
    levels = {name: group for name, group in last.items() if "original" in group}
    reconstructed = levels and len(history) > 1 and all("reconstructed" in level for level in levels.values())
    crops = []
    for name, crop in last.items():
        if crop.keys() >= _CROP:
            values = np.union1d(crop["reference"], crop["prediction"])
            colours = {int(value): label_colour(position) for position, value in enumerate(values[values > 0])}
            crops.append((name, scan_images.crop_image(crop, colours)))
    return {
        "title": f"{run.name}, step {step}",
        "levels": [(name, scan_images.level_image(name, level)) for name, level in levels.items()],
        "history": scan_images.history_image(history) if reconstructed else "",
        "crops": crops,
    }


def _settings(runs: Sequence[NamedRun]) -> dict[str, Any]:
    """Settings of every run, where those of one command differ, and what the runs ran on."""
    differing = []
    for command in dict.fromkeys(run.command for run in runs):
        members = [run for run in runs if run.command == command]
        settings = [flat(run.record.config) for run in members]
        keys = dict.fromkeys(key for each in settings for key in each if key not in ("out", "resume"))
        changed = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]
        if changed:
            rows = [[key, *(_shown(each.get(key)) for each in settings)] for key in changed]
            differing.append((command, [run.name for run in members], rows))
    hidden = ("settings", "command", "resumed")
    facts = [flat({key: value for key, value in run.record.manifest.items() if key not in hidden}) for run in runs]
    return {
        "differing": differing,
        "texts": [
            (run.name, yaml.safe_dump(run.record.config, sort_keys=False, allow_unicode=True, width=100))
            for run in runs
        ],
        "names": [run.name for run in runs],
        "facts": [
            [key, *(_shown(each.get(key)) for each in facts)]
            for key in dict.fromkeys(key for each in facts for key in each)
        ],
    }


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)
