"""The page of a report: what each section shows. A section that has nothing to show is not there.

The templates say how it is shown, one for each section. The page is one HTML file that needs nothing but itself.
"""

import os
import re
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import yaml

from mim3d import __version__
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import plain_text, write_text
from mim3d.core.names import name_digest, number_of
from mim3d.core.progress import say
from mim3d.core.settings import flat
from mim3d.core.warned import ComparisonWarning, UnfinishedWarning, merged
from mim3d.reporting import overlays, scan_images
from mim3d.reporting.arms import CONTENT_NAME, comparison_section, read_comparison
from mim3d.reporting.charts import curve_names, curves_chart
from mim3d.reporting.cohort import cohort
from mim3d.reporting.comparison import comparisons
from mim3d.reporting.rendering import label_colours, render
from mim3d.reporting.scores import score_tables
from mim3d.reporting.segmentations import segmentations
from mim3d.reporting.sources import NamedRun, ScoreSet, read_sources, trained_s, with_folds

_HISTORY_STEPS = 5
_CROP = {"image", "reference", "prediction"}
#: Scores of validation that tell how good a run became, the first that it has, each with its title.
_BEST = {"val/dice": "Dice", "val/auc": "AUC", "val/probe_linear": "linear probe"}


# A matplotlibrc, which may lie in the folder where the user stands, decides nothing: it could run LaTeX.
@matplotlib.style.context("default")
def write_report(
    runs: Sequence[str], out: str, scores: Sequence[str], cases: Sequence[str] = (), *, overwrite: bool = False
) -> str:
    """Write a report to a file, print its path, and return it.

    Args:
        runs: Folders of runs, of all folds of a fine-tuning, or of comparisons.
        out: File of the page, ending in .html.
        scores: Files of scores besides those of the runs.
        cases: Ids of the cases to show; some from the worst to the best if none is named.
        overwrite: Whether a report on other runs is replaced.
    Raises:
        ConfigError: A path is no run or no file of scores, no scores hold a case, or ``out`` cannot be written or holds
            something else.
    """
    if not runs:
        raise ConfigError("runs is empty; name at least one run folder.")
    if not out.lower().endswith((".html", ".htm")):
        raise ConfigError(f"out is {out}, but a report ends in .html; use {out.rstrip('/')}.html.")
    if os.path.isdir(out):
        raise ConfigError(f"out is {out}, which is a folder; give the name of a file.")
    path = os.path.abspath(out)
    compared = [given for given in runs if os.path.isfile(os.path.join(given, CONTENT_NAME))]
    runs = [run for given in runs if given not in compared for run in with_folds(given)]
    marks = [name_digest(os.path.realpath(run)) for run in (*compared, *runs)]
    _require_own(out, marks, overwrite=overwrite)
    shown_runs, shown_scores = read_sources(runs, scores)
    sections = _sections(shown_runs, shown_scores, cases)
    if shown := comparison_section([read_comparison(folder) for folder in compared]):
        sections.insert(0, ("comparison", "Comparison", shown))
    names = [*(Path(os.path.abspath(folder)).name for folder in compared), *(run.name for run in shown_runs)]
    counts = ((len(compared), "comparison"), (len(shown_runs), "run"))
    page = render(
        "report.html",
        runs=" ".join(marks),
        title=" · ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more",
        lead=f"{' and '.join(number_of(*count) for count in counts if count[0])}, {datetime.now():%d %B %Y, %H:%M}",
        sections=[(anchor, title, render(f"{anchor}.html", **shown)) for anchor, title, shown in sections],
        footer=f"Written by mim3d {__version__} report.",
    )
    write_text(path, page)
    say(f"Report: {path}")
    return path


def _sections(
    runs: Sequence[NamedRun], sets: Sequence[ScoreSet], cases: Sequence[str]
) -> list[tuple[str, str, dict[str, Any]]]:
    """Anchor, title and content of every section that has something to show."""
    sources: list[NamedRun | ScoreSet] = [*runs, *sets]
    said = {each.name: merged(*(other.warnings for other in sources if other.name == each.name)) for each in sources}
    for name, sentence in comparisons(runs).items():
        said[name] = merged(said[name], [{"kind": ComparisonWarning.kind, "text": sentence}])
        warnings.warn(sentence, category=ComparisonWarning, stacklevel=3)
    said = {name: rows for name, rows in said.items() if rows}
    images = [shown for run in runs if (shown := _training_images(run))]
    curves = _curves(runs)
    sections: dict[str, tuple[str, dict[str, Any]]] = {
        "warnings": ("Warnings", {"sources": list(said.items())} if said else {}),
        "runs": ("Runs", _runs(runs, has_scores=bool(sets)) if runs else {}),
        "cohort": ("Cohort", cohort(runs, sets)),
        "scores": ("Scores", score_tables(sets)),
        "segmentations": ("Segmentations", segmentations([each for each in sets if not each.is_of_classes], cases)),
        "curves": ("Learning curves", {"kinds": curves} if curves else {}),
        "images": ("Images from training", {"runs": images} if images else {}),
        "settings": ("Settings and environment", _settings(runs) if runs else {}),
    }
    return [(anchor, title, shown) for anchor, (title, shown) in sections.items() if shown]


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


def _runs(runs: Sequence[NamedRun], *, has_scores: bool) -> dict[str, Any]:
    """How the runs went, the cases they left out, and what they have not left behind."""
    missing = [f"{run.name} has logged no metrics yet." for run in runs if not run.record.metrics]
    missing += [
        f"{run.name} has saved no images." for run in runs if run.command == "pretrain" and not run.record.pictures
    ]
    if not has_scores:
        missing.append("No scores: write them to RUN/scores.json with mim3d evaluate, or name them with --scores.")
    return {
        "rows": [_run_row(run) for run in runs],
        "left_out": [(run.name, run.record.left_out) for run in runs if run.record.left_out],
        "missing": missing,
    }


def _run_row(run: NamedRun) -> list[str]:
    """What was run, and how it went."""
    losses, speed = (run.series(key)[1] for key in ("loss", "samples_per_s"))
    best = [f"{title} {values.max():.4f}" for key, title in _BEST.items() if (values := run.series(key)[1]).size]
    time_s = trained_s(run.record)
    total_s = round(time_s or 0)
    hours, minutes, seconds = total_s // 3600, total_s // 60 % 60, total_s % 60
    duration = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
    return [
        run.name,
        run.command,
        run.subject or "–",
        _steps_done(run),
        f"{losses[-1]:.4g}" if losses.size else "–",
        best[0] if best else "–",
        duration if time_s is not None else "–",
        f"{np.median(speed):.3g}" if speed.size else "–",
        _shown(run.record.config.get("seed")),
    ]


def _steps_done(run: NamedRun) -> str:
    """The last step that was logged or kept, and of how many where it was not the end."""
    last = max([run.record.last_checkpoint, *(int(line["step"]) for line in run.record.metrics)])
    planned = (run.record.manifest.get("derived") or {}).get("max_steps")
    if not isinstance(planned, int) or last >= planned:
        return str(last) if last else "none logged"
    stopped = any(row["kind"] == UnfinishedWarning.kind for row in run.warnings)
    return f"{'stopped at ' if stopped else ''}{last} of {planned}"


def _curves(runs: Sequence[NamedRun]) -> list[dict[str, Any]]:
    """Losses, validation scores and learning rates; runs of one kind on one data set share their panels."""
    groups: dict[tuple[str, str], list[NamedRun]] = {}
    for run in runs:
        groups.setdefault((f"{run.command} {run.subject}".strip(), run.data), []).append(run)
    kinds = [kind for kind, _ in groups]
    shown = []
    for (kind, data), members in groups.items():
        main, others = curve_names(members)
        if main or others:
            shown.append(
                {
                    "title": kind if kinds.count(kind) == 1 else f"{kind}, {Path(data).name or 'other data'}",
                    "legend": [(run.name, run.colour) for run in members],
                    "chart": curves_chart(members, main or others),
                    "further": curves_chart(members, others) if main and others else "",
                }
            )
    return shown


def _training_images(run: NamedRun) -> dict[str, Any]:
    """The last images that a run saved and its reconstructions over training; empty where it saved none."""
    files = run.record.pictures
    if not files:
        return {}
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
            colours = {int(value): label_colours(position) for position, value in enumerate(values[values > 0])}
            legend = [(f"label {value}", pair) for value, pair in colours.items()]
            crops.append((name, overlays.crop_image(crop, colours), legend))
    images = [(name, crop) for name, crop in last.items() if "image" in crop and not crop.keys() >= _CROP]
    if not (levels or crops or images):
        return {}
    return {
        "title": f"{run.name}, step {step}",
        "levels": [(name, scan_images.level_image(name, level)) for name, level in levels.items()],
        "history": scan_images.history_image(history) if reconstructed else "",
        "crops": crops,
        "images": [(name, scan_images.level_image(name, crop)) for name, crop in images],
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
    hidden = ("settings", "command", "resumed", "warnings")
    # What other sections show is left out.
    facts = [flat({key: value for key, value in run.record.manifest.items() if key not in hidden}) for run in runs]
    facts = [{key: value for key, value in each.items() if not key.startswith("derived.cohort.")} for each in facts]
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
