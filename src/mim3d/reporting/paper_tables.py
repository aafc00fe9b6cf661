"""Scores as tables for a paper: Markdown, and LaTeX with booktabs.

Every number of a column has the same decimals: the value, its deviation and both ends of its interval.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from mim3d.reporting.rendering import number, render


@dataclass(frozen=True)
class Column:
    """A score as a column of a table.

    Attributes:
        key: Name of the score in a file of scores.
        title: Title of the column.
        decimals: Number of digits after the decimal point.
    """

    key: str
    title: str
    decimals: int


LABEL_COLUMNS = (
    Column("dice", "Dice", 3),
    Column("nsd", "NSD", 3),
    Column("hd95_mm", "HD95 (mm)", 2),
    Column("volume_error_ml", "Volume error (ml)", 2),
)
LESION_COLUMNS = (
    Column("sensitivity", "Sensitivity", 3),
    Column("precision", "Precision", 3),
    Column("f1", "F1", 3),
    Column("dice", "Lesion Dice", 3),
    Column("false_positives_per_scan", "False positives per scan", 2),
)
PAIRED_LESION_COLUMNS = (
    Column("lesion_f1", "Lesion F1", 3),
    Column("lesion_false_positives", "False positives per scan", 2),
)
AUC = Column("auc", "AUC", 3)
CLASS_COLUMNS = (
    AUC,
    Column("accuracy", "Accuracy", 3),
    Column("balanced_accuracy", "Balanced accuracy", 3),
    Column("f1_macro", "Macro F1", 3),
    Column("sensitivity", "Sensitivity", 3),
    Column("specificity", "Specificity", 3),
    Column("brier", "Brier score", 3),
    Column("ece", "ECE", 3),
)


@dataclass(frozen=True)
class PaperTable:
    """A table in plain text, to be written in any form.

    Attributes:
        name: One word, for a LaTeX label.
        caption: What the table shows, and how its cells are to be read.
        heads: Titles of the columns. The first column names the rows.
        rows: Cells, one sequence per row.
        has_mean: Whether the last row is a mean of the others, to be set apart.
    """

    name: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    has_mean: bool = False


def markdown(tables: Sequence[PaperTable]) -> str:
    """Tables in Markdown, each with its caption above."""
    return render("tables.md", tables=tables)


def latex(tables: Sequence[PaperTable]) -> str:
    r"""Tables in LaTeX, for a document with ``\usepackage{booktabs}``."""
    return render("tables.tex", tables=tables)


def label_tables(content: Mapping[str, Any]) -> list[PaperTable]:
    """The tables of scores of label maps, with their lesions and the compared method where they were scored."""
    settings, interval = content["settings"], _interval_words(content["settings"]["num_bootstrap"])
    nsd_title = f"NSD at {settings['nsd_tolerance_mm']:g} mm"
    columns = [replace(column, title=nsd_title) if column.key == "nsd" else column for column in LABEL_COLUMNS]
    reading = f"mean ± standard deviation over cases{interval}."
    tables = [_scores_table("scores", f"{_counted('Segmentation', content)}: {reading}", content, columns)]
    if any("lesions" in row for row in content["per_label"].values()):
        rows = []
        for label, row in content["per_label"].items():
            if (found := row.get("lesions")) is not None:
                cells = (value_cell(found, {}, found["ci95"], column) for column in LESION_COLUMNS)
                rows.append([label, str(found["num_reference"]), str(found["num_predicted"]), *cells])
        caption = f"{_counted('Detection of lesions', content)}, pooled over all lesions{interval}."
        heads = ["Label", "Lesions", "Predicted", *(column.title for column in LESION_COLUMNS)]
        tables.append(PaperTable("lesions", caption, heads, rows))
    if "comparison" in content:
        comparison = content["comparison"]
        cases = f"{comparison['num_cases']} cases"
        compared = {**comparison["compared"], "num_cases": comparison["num_cases"]}
        caption = f"The compared method on the {cases} of both methods: {reading}"
        tables.append(_scores_table("compared", caption, compared, columns))
        caption = (
            f"Difference to the compared method on {cases}{interval}; p of the Wilcoxon signed-rank test, corrected "
            "over labels after Holm (the mean row is not corrected)."
        )
        paired = comparison["paired"]
        known = [column for column in (*columns, *PAIRED_LESION_COLUMNS) if column.key in paired["mean"]]
        rows = []
        for label, row in [*paired["per_label"].items(), ("Mean over labels", paired["mean"])]:
            pairs = [(row[column.key], column) for column in known]
            texts = [(difference_cell(each, column), p_cell(each.get("p_holm", each["p"]))) for each, column in pairs]
            rows.append([label, *chain.from_iterable(texts)])
        heads = ["Label", *(title for column in known for title in (column.title, "p"))]
        tables.append(PaperTable("differences", caption, heads, rows, has_mean=True))
    return tables


def _counted(what: str, content: Mapping[str, Any]) -> str:
    cases, patients = content["num_cases"], content["num_patients"]
    every = cases + len(content["not_scored"].get("unusable", ()))
    of_all = f" of {every}" if every > cases else ""
    return f"{what}, {cases}{of_all} cases" + (f" of {patients} patients" if patients != cases else "")


def _interval_words(num_bootstrap: int) -> str:
    return f" [95 % bootstrap interval over patients, {num_bootstrap} resamples]" if num_bootstrap else ""


def _scores_table(name: str, caption: str, content: Mapping[str, Any], columns: Sequence[Column]) -> PaperTable:
    rows = [
        [label, str(row["num_cases"]), *(value_cell(row, row["std"], row["ci95"], column) for column in columns)]
        for label, row in content["per_label"].items()
    ]
    mean = content["mean"], content["mean_std"], content["mean_ci95"]
    rows.append(["Mean over labels", str(content["num_cases"]), *(value_cell(*mean, column) for column in columns)])
    return PaperTable(name, caption, ["Label", "Cases", *(column.title for column in columns)], rows, has_mean=True)


def class_tables(content: Mapping[str, Any]) -> list[PaperTable]:
    """The tables of scores of a classifier, with the baseline and the compared method where they were scored."""
    settings, interval = content["settings"], _interval_words(content["settings"]["num_bootstrap"])
    columns = [column for column in CLASS_COLUMNS if column.key in content["mean"]]
    rows = [[each.title, value_cell(content["mean"], {}, content["mean_ci95"], each)] for each in columns]
    caption = f"{_counted('Classification', content)}{interval}."
    tables = [PaperTable("classification", caption, ["Score", "Value"], rows)]
    names = list(content["per_class"])
    rows = [[name, *map(str, counts)] for name, counts in zip(names, content["confusion"], strict=True)]
    tables.append(PaperTable("confusion", "Cases by class (rows) and predicted class.", ["Class", *names], rows))
    rows = []
    for row in content["reliability"]:
        ends, values = f"{row['from']:.2f} to {row['to']:.2f}", (row["mean_probability"], row["frequency"])
        rows.append([ends, str(row["num_cases"]), *(number(value, 3) for value in values)])
    caption = "Reliability: predicted probability and observed frequency."
    heads = ["Probability", "Cases", "Mean probability", "Frequency"]
    tables.append(PaperTable("reliability", caption, heads, rows))
    if "baseline" in content:
        titles = ("Predictions", settings["baseline_column"], "Difference")
        rows = [
            [title, value_cell(row, {}, {"auc": row["ci95"]}, AUC)]
            for title, row in zip(titles, content["baseline"].values(), strict=True)
        ]
        caption = f"Comparison with one column of the references{interval}."
        tables.append(PaperTable("baseline", caption, ["", "AUC"], rows, has_mean=True))
    if "comparison" in content:
        rows = []
        for each in columns:
            row = content["comparison"]["paired"][each.key]
            both = [number(row[key], each.decimals) for key in ("value", "compared")]
            rows.append([each.title, *both, difference_cell(row, each)])
        caption = f"Two methods on the {content['comparison']['num_cases']} cases of both{interval}."
        tables.append(PaperTable("comparison", caption, ["Score", "Predictions", "Compared", "Difference"], rows))
    return tables


def value_cell(values: Mapping[str, Any], stds: Mapping[str, Any], intervals: Mapping[str, Any], column: Column) -> str:
    """``0.883 ± 0.041 [0.871, 0.895]``, with what of it is known; a dash without a value."""
    value, std = values.get(column.key), stds.get(column.key)
    if value is None:
        return number(None, column.decimals)
    spread = "" if std is None else f" ± {number(std, column.decimals)}"
    return number(value, column.decimals) + spread + _interval(intervals.get(column.key), column.decimals)


def difference_cell(row: Mapping[str, Any], column: Column) -> str:
    """``+0.012 [0.003, 0.021]``; a dash without a difference."""
    if row["difference"] is None:
        return number(None, column.decimals)
    text = number(row["difference"], column.decimals)
    sign = "" if text.startswith("−") or float(text) == 0 else "+"
    return sign + text + _interval(row["ci95"], column.decimals)


def p_cell(p: float | None) -> str:
    """A p value to three decimals, ``<0.001`` where it is smaller; a dash where there is none."""
    return "<0.001" if p is not None and p < 0.001 else number(p, 3)


def _interval(ends: Sequence[float] | None, decimals: int) -> str:
    return "" if ends is None else f" [{number(ends[0], decimals)}, {number(ends[1], decimals)}]"
