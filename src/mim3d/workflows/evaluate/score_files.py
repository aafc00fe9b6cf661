"""What `mim3d evaluate` writes and prints."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mim3d.core.files import write_csv, write_text
from mim3d.metrics import SCORE_NAMES
from mim3d.reporting.paper_tables import p_cell

#: What of a case's lesions goes into the table of cases.
LESION_NAMES = (
    "num_reference",
    "num_predicted",
    "num_detected",
    "num_true",
    "sensitivity",
    "precision",
    "f1",
    "false_positives",
    "dice",
)


def beside(path: str, ending: str) -> str:
    """The path of a file beside the file of scores: ``scores.json`` and ``.csv`` make ``scores.csv``."""
    return f"{os.path.splitext(path)[0]}{ending}"


def write_label_rows(path: str, content: Mapping[str, Any]) -> None:
    """A row per case and label beside the file of scores; those of a compared method in a file of its own."""
    write_csv(beside(path, ".csv"), *_label_rows(content["cases"]))
    if "comparison" in content:
        write_csv(beside(path, ".compared.csv"), *_label_rows(content["comparison"]["cases"]))


def _label_rows(cases: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    with_lesions = any("lesions" in score for case in cases for score in case["labels"].values())
    lesion_names = LESION_NAMES if with_lesions else ()
    rows = []
    for case in cases:
        for name, score in case["labels"].items():
            found = score.get("lesions") or {}
            numbers = [*(score[key] for key in SCORE_NAMES), *(found.get(key) for key in lesion_names)]
            rows.append([case["id"], name, score["status"], *numbers, case["patient"]])
    return ["id", "label", "status", *SCORE_NAMES, *(f"lesion_{key}" for key in lesion_names), "patient"], rows


def write_tables(path: str, content: Mapping[str, Any]) -> None:
    """Tables for a paper beside the file of scores."""
    from mim3d.reporting.paper_tables import latex, markdown, paper_tables

    tables = paper_tables(content)
    for ending, text in ((".md", markdown(tables)), (".tex", latex(tables))):
        write_text(beside(path, ending), text)
    print(f"Tables: {beside(path, '.md')}, {beside(path, '.tex')}")


def _table(title: str | None, first: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def show_labels(content: Mapping[str, Any]) -> None:
    """Print the scores per label, those of lesions, and the comparison."""
    tolerance = content["settings"]["nsd_tolerance_mm"]
    table = _table(
        None, "Label", ("Cases", "Dice", "HD95 mm", f"NSD {tolerance:g} mm", "Volume error ml", "Missed", "Invented")
    )
    keys = ("dice", "hd95_mm", "nsd", "volume_error_ml")
    for name, row in content["per_label"].items():
        counts = [str(row[key]) for key in ("num_cases", "num_missed", "num_invented")]
        table.add_row(Text(name), counts[0], *(number(row[key], key) for key in keys), *counts[1:])
    table.add_section()
    mean = content["mean"]
    table.add_row("mean", str(content["num_cases"]), *(number(mean[key], key) for key in keys), "", "")
    ends = content["mean_ci95"]
    if ends["dice"] is not None:
        table.add_row("95 % interval", "", *(_interval(ends[key], key) for key in keys), "", "")
    Console().print(table)
    _show_lesions(content["per_label"])
    if "comparison" in content:
        _show_comparison(content["comparison"])


def _show_lesions(per_label: Mapping[str, Mapping[str, Any]]) -> None:
    rows = {name: row["lesions"] for name, row in per_label.items() if "lesions" in row}
    if not rows:
        return
    heads = ("Lesions", "Detected", "Sensitivity", "Precision", "F1", "Lesion Dice", "False per scan")
    table = _table("Lesions", "Label", heads)
    for name, row in rows.items():
        counts = [str(row["num_reference"]), str(row["num_detected"])]
        values = [row[key] for key in ("sensitivity", "precision", "f1", "dice", "false_positives_per_scan")]
        table.add_row(Text(name), *counts, *(number(value, "dice") for value in values))
    Console().print(table)


def _show_comparison(comparison: Mapping[str, Any]) -> None:
    paired = comparison["paired"]
    table = _table(
        f"Difference to {comparison['predictions']}, {comparison['num_cases']} cases",
        "Label",
        ("Score", "Difference", "95 % interval", "p", "p after Holm"),
    )
    for name, row in [*paired["per_label"].items(), ("mean", paired["mean"])]:
        for key in ("dice", "hd95_mm", "nsd", *(key for key in ("lesion_f1",) if key in row)):
            each = row[key]
            holm = p_cell(each["p_holm"]) if "p_holm" in each else ""
            difference = "-" if each["difference"] is None else f"{each['difference']:+.4f}"
            table.add_row(Text(name), key, difference, _interval(each["ci95"], key), p_cell(each["p"]), holm)
    Console().print(table)


def show_classes(content: Mapping[str, Any]) -> None:
    """Print the scores of a classifier, the baseline's, and the comparison."""
    table = _table(None, "Score", ("Value", "95 % interval"))
    for key, value in content["mean"].items():
        table.add_row(key, number(value, "dice"), _interval(content["mean_ci95"][key], "dice"))
    for name, row in content.get("baseline", {}).items():
        table.add_row(Text(f"baseline: auc of {name}"), number(row["auc"], "dice"), _interval(row["ci95"], "dice"))
    for key, row in content.get("comparison", {}).get("paired", {}).items():
        interval = _interval(row["ci95"], "dice")
        table.add_row(Text(f"difference of {key}"), number(row["difference"], "dice"), interval)
    Console().print(table)


def number(value: float | None, key: str) -> str:
    """A score with the decimals that its name asks for; a dash where it is not defined."""
    if value is None:
        return "-"
    return f"{value:.4f}" if key in ("dice", "nsd") or key.startswith("lesion_") else f"{value:.2f}"


def _interval(ends: Sequence[float] | None, key: str) -> str:
    return "-" if ends is None else f"{number(ends[0], key)} to {number(ends[1], key)}"
