"""Scores as tables for a paper: Markdown, and LaTeX with booktabs.

Every number of a column has the same decimals: the value, its deviation and both ends of its interval.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mim3d.reporting.paper_cells import Column, difference_cell, p_cell, value_cell

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
PAIRED_COLUMNS = (
    *LABEL_COLUMNS,
    Column("lesion_f1", "Lesion F1", 3),
    Column("lesion_false_positives", "False positives per scan", 2),
)
CLASS_COLUMNS = (
    Column("auc", "AUC", 3),
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
        name: of one word, for a LaTeX label.
        caption: what it shows, and how its cells are to be read.
        heads: titles of the columns; the first column names the rows.
        rows: cells.
        has_mean: whether the last row stands for the others.
    """

    name: str
    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    has_mean: bool = False


def paper_tables(content: Mapping[str, Any]) -> list[PaperTable]:
    """The tables of a file of scores, of either kind."""
    return _class_tables(content) if content["kind"] == "classification" else _label_tables(content)


def markdown(tables: Sequence[PaperTable]) -> str:
    """Tables in Markdown, each with its caption above."""
    parts = []
    for table in tables:
        lines = [table.heads, [":--", *(["--:"] * (len(table.heads) - 1))], *table.rows]
        shown = [
            "| " + " | ".join(_md(cell) if n != 1 else cell for cell in line) + " |" for n, line in enumerate(lines)
        ]
        parts.append("\n".join([_md(table.caption), "", *shown]))
    return "\n\n".join(parts) + "\n"


def latex(tables: Sequence[PaperTable]) -> str:
    r"""Tables in LaTeX, for a document with ``\usepackage{booktabs}``."""
    parts = ["% Needs \\usepackage{booktabs}."]
    for table in tables:
        rows = [" & ".join(map(_tex, row)) + r" \\" for row in table.rows]
        if table.has_mean and len(rows) > 1:
            rows.insert(-1, r"\midrule")
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"\centering",
                    rf"\caption{{{_tex(table.caption)}}}",
                    rf"\label{{tab:{table.name}}}",
                    rf"\begin{{tabular}}{{l{'r' * (len(table.heads) - 1)}}}",
                    r"\toprule",
                    " & ".join(map(_tex, table.heads)) + r" \\",
                    r"\midrule",
                    *rows,
                    r"\bottomrule",
                    r"\end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


_TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    **{mark: "\\" + mark for mark in "&%$#_"},
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(mark, mark) for mark in text.replace("\n", " "))


def _md(text: str) -> str:
    return re.sub(r"([\\`*_{}|<>#~])", r"\\\1", text.replace("\n", " "))


def _label_tables(content: Mapping[str, Any]) -> list[PaperTable]:
    settings = content["settings"]
    titled = [
        Column(each.key, f"NSD at {settings['nsd_tolerance_mm']:g} mm", each.decimals) if each.key == "nsd" else each
        for each in LABEL_COLUMNS
    ]
    tables = [_scores_table("scores", _counted("Segmentation", content), content, titled)]
    if any("lesions" in row for row in content["per_label"].values()):
        tables.append(_lesion_table(content))
    if "comparison" in content:
        comparison = content["comparison"]
        caption = f"The compared method on {comparison['num_cases']} cases of both"
        counts = {"num_cases": comparison["num_cases"], "num_patients": None, "settings": settings}
        tables.append(_scores_table("compared", caption, {**comparison["compared"], **counts}, titled))
        tables.append(_paired_table(comparison, settings, titled))
    return tables


def _counted(what: str, content: Mapping[str, Any]) -> str:
    cases, patients = content["num_cases"], content["num_patients"]
    return f"{what}, {cases} cases" + (f" of {patients} patients" if patients != cases else "")


def _reading(settings: Mapping[str, Any]) -> str:
    return "mean ± standard deviation over cases" + _with_interval(settings)


def _with_interval(settings: Mapping[str, Any]) -> str:
    if not settings["num_bootstrap"]:
        return ""
    return f" [95 % bootstrap interval over patients, {settings['num_bootstrap']} resamples]"


def _scores_table(name: str, caption: str, content: Mapping[str, Any], columns: Sequence[Column]) -> PaperTable:
    rows = [
        [label, str(row["num_cases"]), *(value_cell(row, row["std"], row["ci95"], each) for each in columns)]
        for label, row in content["per_label"].items()
    ]
    mean = content["mean"], content["mean_std"], content["mean_ci95"]
    rows.append(["Mean over labels", str(content["num_cases"]), *(value_cell(*mean, each) for each in columns)])
    return PaperTable(
        name,
        f"{caption}: {_reading(content['settings'])}.",
        ["Label", "Cases", *(each.title for each in columns)],
        rows,
        has_mean=True,
    )


def _lesion_table(content: Mapping[str, Any]) -> PaperTable:
    rows = []
    for label, row in content["per_label"].items():
        found = row.get("lesions")
        if found is not None:
            cells = (value_cell(found, {}, found["ci95"], each) for each in LESION_COLUMNS)
            rows.append([label, str(found["num_reference"]), str(found["num_predicted"]), *cells])
    heads = ["Label", "Lesions", "Predicted", *(each.title for each in LESION_COLUMNS)]
    caption = _counted("Detection of lesions", content) + ", all lesions together" + _with_interval(content["settings"])
    return PaperTable("lesions", f"{caption}.", heads, rows)


def _paired_table(comparison: Mapping[str, Any], settings: Mapping[str, Any], titled: Sequence[Column]) -> PaperTable:
    paired = comparison["paired"]
    titles = {each.key: each.title for each in titled}
    columns = [each for each in PAIRED_COLUMNS if each.key in paired["mean"]]
    rows = []
    for label, row in [*paired["per_label"].items(), ("Mean over labels", paired["mean"])]:
        cells = []
        for each in columns:
            cells += [difference_cell(row[each.key], each), p_cell(row[each.key].get("p_holm", row[each.key]["p"]))]
        rows.append([label, *cells])
    heads = ["Label"]
    for each in columns:
        heads += [titles.get(each.key, each.title), "p"]
    caption = (
        f"Difference to the compared method on {comparison['num_cases']} cases{_with_interval(settings)}; p of the "
        "Wilcoxon signed-rank test, corrected over labels after Holm (the mean row is not corrected)."
    )
    return PaperTable("differences", caption, heads, rows, has_mean=True)


def _class_tables(content: Mapping[str, Any]) -> list[PaperTable]:
    settings = content["settings"]
    columns = [each for each in CLASS_COLUMNS if each.key in content["mean"]]
    caption = _counted("Classification", content) + _with_interval(settings)
    rows = [[each.title, value_cell(content["mean"], {}, content["mean_ci95"], each)] for each in columns]
    tables = [PaperTable("classification", f"{caption}.", ["Score", "Value"], rows)]
    names = list(content["per_class"])
    counts = [[name, *map(str, row)] for name, row in zip(names, content["confusion"], strict=True)]
    tables.append(PaperTable("confusion", "Cases by class (rows) and predicted class.", ["Class", *names], counts))
    reliability = [
        [f"{row['from']:.2f} to {row['to']:.2f}", str(row["num_cases"])]
        + [value_cell(row, {}, {}, Column(key, key, 3)) for key in ("mean_probability", "frequency")]
        for row in content["reliability"]
    ]
    heads = ["Probability", "Cases", "Mean probability", "Frequency"]
    tables.append(PaperTable("reliability", "Reliability: what was predicted and what came true.", heads, reliability))
    if "baseline" in content:
        auc = Column("auc", "AUC", 3)
        rows = [
            [title, value_cell(row, {}, {"auc": row["ci95"]}, auc)]
            for title, row in zip(
                ("Predictions", settings["baseline_column"], "Difference"), content["baseline"].values(), strict=True
            )
        ]
        caption = f"Against one column of the references{_with_interval(settings)}."
        tables.append(PaperTable("baseline", caption, ["", "AUC"], rows, has_mean=True))
    if "comparison" in content:
        tables.append(_class_comparison(content["comparison"], settings, columns))
    return tables


def _class_comparison(
    comparison: Mapping[str, Any], settings: Mapping[str, Any], columns: Sequence[Column]
) -> PaperTable:
    rows = []
    for each in columns:
        row = comparison["paired"][each.key]
        plain = [value_cell(row, {}, {}, Column(key, key, each.decimals)) for key in ("value", "compared")]
        rows.append([each.title, *plain, difference_cell(row, each)])
    caption = f"Two methods on {comparison['num_cases']} cases of both{_with_interval(settings)}."
    return PaperTable("comparison", caption, ["Score", "Predictions", "Compared", "Difference"], rows)
