"""The sections of a report; what is missing becomes a remark in its place."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import yaml

from mim3d.core.config import flat
from mim3d.core.errors import Mim3dError
from mim3d.reporting.class_scores import baseline_note, class_table, confusion_table, reliability_picture
from mim3d.reporting.curves import curves_picture, metric_names
from mim3d.reporting.drawing import label_colour
from mim3d.reporting.marks import number, swatch
from mim3d.reporting.overlays import overlay_picture, read_view
from mim3d.reporting.page import Section, figure, folded, note, table
from mim3d.reporting.score_tables import (
    ScoreSet,
    case_mean,
    cases_table,
    counts_note,
    dice_picture,
    score_table,
)
from mim3d.reporting.sources import NamedRun

#: A caption names the Dice of each label up to so many labels.
_NAMED_LABELS = 4


def legend(items: Sequence[tuple[str, str]]) -> str:
    """HTML that tells names by colour."""
    shown = "".join(f'<span class="item">{swatch(tint)}{escape(name)}</span>' for name, tint in items)
    return f'<p class="legend">{shown}</p>'


def runs_section(runs: Sequence[NamedRun]) -> Section:
    """What was run, and how it went, in a table."""
    heads = ["Run", "Command", "Method or task", "Steps", "Last loss", "Best val/dice", "Time", "Samples/s", "Seed"]
    rows = []
    for run in runs:
        curves = run.curves
        losses, dice = curves.series("loss")[1], curves.series("val/dice")[1]
        speed = curves.series("samples_per_s")[1]
        steps = [int(line["step"]) for line in run.record.metrics]
        rows.append(
            [
                run.name,
                run.command,
                run.subject or "–",
                str(max(steps)) if steps else "none logged",
                f"{losses[-1]:.4g}" if losses.size else "–",
                f"{dice.max():.4f}" if dice.size else "–",
                _duration(curves.series("time_s")[1].tolist()),
                f"{np.median(speed):.3g}" if speed.size else "–",
                _shown(run.record.config.get("seed")),
            ]
        )
    return Section("runs", "Runs", table(heads, rows))


def _duration(times_s: Sequence[float]) -> str:
    """Total of the sessions of a run, whose clock starts anew with each."""
    if not times_s:
        return "–"
    total = sum(a for a, b in zip(times_s, [*times_s[1:], 0.0], strict=True) if b < a)
    hours, rest = divmod(round(total), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def scores_section(sets: Sequence[ScoreSet]) -> Section:
    """The table of scores, each case's Dice, and what the numbers mean."""
    if not sets:
        missing = "No scores: write them to RUN/scores.json with mim3d evaluate, or name them with --scores."
        return Section("scores", "Scores", note(missing))
    maps, classes = _by_kind(sets)
    body = (_map_scores(maps) if maps else "") + (_class_scores(classes) if classes else "")
    return Section("scores", "Scores", body)


def _by_kind(sets: Sequence[ScoreSet]) -> tuple[list[ScoreSet], list[ScoreSet]]:
    """Scores of label maps, and scores of classifiers."""
    return [each for each in sets if not each.is_of_classes], [each for each in sets if each.is_of_classes]


def _map_scores(sets: Sequence[ScoreSet]) -> str:
    body = counts_note(sets) + score_table(sets)
    if len(sets) > 1:
        body += note(f"Differences are to {sets[0].name}, the first.")
    body += figure(
        dice_picture(sets),
        "Dice of every case; the line is the median. In the table ± is the deviation over cases; below it stands the "
        "95 % interval of the mean, where it was made.",
    )
    return body + folded("Every case", cases_table(sets)) + _conventions(sets[0])


def _class_scores(sets: Sequence[ScoreSet]) -> str:
    body = class_table(sets) + note("Beside each score stands its 95 % interval, where it was made.")
    body += "".join(map(baseline_note, sets)) + "".join(map(confusion_table, sets))
    body += figure(reliability_picture(sets), "Calibration: on the dotted line, what was predicted came true as often.")
    return body + _conventions(sets[0])


def _conventions(scores: ScoreSet) -> str:
    conventions = scores.content.get("conventions")
    if not isinstance(conventions, Mapping):
        return ""
    terms = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(text))}</dd>" for key, text in conventions.items())
    return folded("What the numbers mean", f"<dl>{terms}</dl>")


def segmentations_section(sets: Sequence[ScoreSet]) -> Section:
    """The worst, median and best case, every set of scores beside the others on the same slices."""
    title = "Segmentations"
    sets, classes = _by_kind(sets)
    if classes and not sets:
        return Section("segmentations", title, note("No segmentations: these are scores of classes."))
    if not sets:
        return Section("segmentations", title, note("No segmentations: they are found through the files of scores."))
    labels = dict(sorted({value: name for each in sets for value, name in each.labels.items()}.items()))
    colours = {value: label_colour(position) for position, value in enumerate(labels)}
    body = legend([(labels[value], colours[value]) for value in labels])
    body += note(
        "Reference filled, prediction as a line; cut out around the labels. Radiological convention: the patient's "
        "right (R) is on the left of the page, anterior (A) is up in axial and left in sagittal slices."
    )
    for rank, case_id in _telling_cases(sets).items():
        body += f"<h3>{escape(rank)}: {escape(case_id)}</h3>" + _case(case_id, sets, colours)
    return Section("segmentations", title, body)


def _telling_cases(sets: Sequence[ScoreSet]) -> dict[str, str]:
    """Worst, median and best case by the mean Dice over labels and sets, of those that all sets scored."""
    shared = set.intersection(*(set(each.cases) for each in sets)) or set(sets[0].cases)
    means = {}
    for case_id in sorted(shared):
        dice = [case_mean(each.cases[case_id], "dice") for each in sets if case_id in each.cases]
        known = [value for value in dice if value is not None]
        if known:
            means[case_id] = float(np.mean(known))
    ranked = sorted(means, key=lambda name: means[name])
    if len(ranked) < 3:
        return {f"Case {position}": name for position, name in enumerate(ranked, start=1)}
    return {"Worst case": ranked[0], "Median case": ranked[(len(ranked) - 1) // 2], "Best case": ranked[-1]}


def _case(case_id: str, sets: Sequence[ScoreSet], colours: Mapping[int, str]) -> str:
    held = [each for each in sets if case_id in each.cases and each.cases[case_id].get("prediction") is not None]
    if not held:
        return note(f"{case_id} was not predicted and is scored as an empty prediction.")
    cases = [each.cases[case_id] for each in held]
    images = [path for case in cases for path in (case.get("images") or ())]
    remark = ""
    image = images[0] if images and os.path.exists(images[0].partition("::")[0]) else None
    if image is None:
        remark = note(f"The scan of {case_id} is not known or no longer there, so its labels are shown on black.")
    try:
        view = read_view(str(cases[0]["reference"]), [str(case["prediction"]) for case in cases], image)
    except Mim3dError as error:
        return note(f"{case_id} cannot be shown: {error}")
    figures = []
    for each, case, prediction in zip(held, cases, view.predictions, strict=True):
        dice = [f"{escape(name)} {number(score.get('dice'), 3)}" for name, score in case["labels"].items()]
        told = dice if len(dice) <= _NAMED_LABELS else []
        caption = f"{swatch(each.colour)}<b>{escape(each.name)}</b>: Dice "
        caption += ", ".join([*told, f"mean {number(case_mean(case, 'dice'), 3)}"])
        figures.append(figure(overlay_picture(view, prediction, colours), caption))
    return f'{remark}<div class="row pair">{"".join(figures)}</div>'


def curves_section(runs: Sequence[NamedRun]) -> Section:
    """Losses, validation scores and learning rates, runs of one kind in one set of panels."""
    kinds: dict[str, list[NamedRun]] = {}
    for run in runs:
        kinds.setdefault(f"{run.command} {run.subject}".strip(), []).append(run)
    body = ""
    for kind, members in kinds.items():
        curves = [run.curves for run in members]
        main, others = metric_names(curves)
        body += f"<h3>{escape(kind)}</h3>" + legend([(run.name, run.colour) for run in members])
        if not main:
            body += note("No metrics were logged yet.")
            continue
        body += f'<div class="wide">{curves_picture(curves, main)}</div>'
        if others:
            body += folded("Further metrics", curves_picture(curves, others))
    return Section("curves", "Learning curves", body)


def settings_section(runs: Sequence[NamedRun]) -> Section:
    """Settings of every run, where they differ, and what they ran on."""
    body = _differing(runs)
    for run in runs:
        text = yaml.safe_dump(run.record.config, sort_keys=False, allow_unicode=True, width=100)
        body += folded(f"Settings of {run.name}", f"<pre>{escape(text)}</pre>")
    hidden = ("settings", "command", "resumed")
    facts = [flat({k: v for k, v in run.record.manifest.items() if k not in hidden}) for run in runs]
    rows = [
        [key, *(_shown(each.get(key)) for each in facts)] for key in dict.fromkeys(k for each in facts for k in each)
    ]
    body += folded("Versions, hardware and inputs", table(["", *(run.name for run in runs)], rows))
    return Section("settings", "Settings and environment", body)


def _differing(runs: Sequence[NamedRun]) -> str:
    """A table of the settings that differ between runs of one command, if there are several."""
    body = ""
    for command in dict.fromkeys(run.command for run in runs):
        members = [run for run in runs if run.command == command]
        settings = [flat(run.record.config) for run in members]
        keys = dict.fromkeys(key for each in settings for key in each if key not in ("out", "resume"))
        rows = [
            [key, *(_shown(each.get(key)) for each in settings)]
            for key in keys
            if any(each.get(key) != settings[0].get(key) for each in settings)
        ]
        if len(members) > 1 and rows:
            body += f"<h3>What differs between the {escape(command)} runs</h3>"
            body += table(["Setting", *(run.name for run in members)], rows)
    return body


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)
