"""A comparison of arms as tables, a curve and a section of the report, from the numbers that `mim3d compare` wrote."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mim3d.core.errors import ConfigError
from mim3d.core.files import load_json
from mim3d.core.settings import coerce
from mim3d.reporting.paper_tables import Column, PaperTable, difference_cell, p_cell, value_cell
from mim3d.reporting.rendering import Theme, chart, chart_text, number, run_colour, style_axes

#: File of all numbers of a comparison, in its folder.
CONTENT_NAME = "comparison.json"

_TITLES = {"dice": "Dice", "auc": "AUC"}
_TESTS = {"dice": "the Wilcoxon signed-rank test", "auc": "DeLong's paired test"}

#: Columns of the table in CSV.
_COLUMNS = (
    *("arm", "labels", "num_labelled", "num_seeds", "num_done", "num_cells", "mean", "ci95_low", "ci95_high", "nsd"),
    *("hd95_mm", "difference", "difference_low", "difference_high", "p", "p_holm", "target", "steps_to_target"),
)

Score = float | None
Ends = tuple[Score, Score] | None

#: What is read of a file of numbers, which somebody else may have written: entry -> type.
_WHOLE: Mapping[str, Any] = {
    "score": str,
    "reference": str,
    "target": float | None,
    "num_bootstrap": int,
    "num_tested": int,
    "data": str,
    "labels": list[str],
    "folds": list[int],
    "arms": list[dict[str, Any]],
    "rows": list[dict[str, Any]],
    "probes": list[dict[str, Any]],
    "misses": list[dict[str, Any]],
    "notes": list[str],
}
_ROW: Mapping[str, Any] = {
    **dict.fromkeys(("arm", "labels"), str),
    **dict.fromkeys(("num_seeds", "num_done", "num_cells"), int),
    **dict.fromkeys(("mean", "nsd", "hd95_mm", "difference", "p", "p_holm", "target"), Score),
    **dict.fromkeys(("ci95", "difference_ci95"), Ends),
    "num_labelled": int | list[int],
    "steps_to_target": int | None,
}
_ARM: Mapping[str, Any] = {
    **dict.fromkeys(("name", "kind", "backbone"), str),
    "method": str | None,
    **{
        f"{kind}_{name}": Score
        for kind in ("pretrain", "finetune")
        for name in ("steps", "train_s", "step_s", "memory_bytes")
    },
}
_PROBE: Mapping[str, Any] = {
    "arm": str,
    **{f"{name}_{kind}": Score for name in ("features", "random") for kind in ("linear", "neighbours")},
}
_MISS: Mapping[str, Any] = dict.fromkeys(("cell", "arm", "labels", "reason"), str)


def read_comparison(folder: str | Path) -> dict[str, Any]:
    """The numbers of a comparison.

    Raises:
        ConfigError: The file cannot be read, or holds something else.
    """
    path = Path(folder) / CONTENT_NAME
    try:
        content = coerce(load_json(path), dict[str, Any], "it")
        whole = _typed(content, _WHOLE, "it")
        for name, entries in (("rows", _ROW), ("arms", _ARM), ("probes", _PROBE), ("misses", _MISS)):
            whole[name] = [_typed(each, entries, f"{name}[{place}]") for place, each in enumerate(whole[name])]
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"{path} holds no comparison ({error}); write it anew by mim3d compare.") from error
    return whole


def _typed(content: Mapping[str, Any], entries: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {name: coerce(content.get(name), hint, f"{where}.{name}") for name, hint in entries.items()}


def comparison_rows(content: Mapping[str, Any]) -> tuple[Sequence[str], list[list[Any]]]:
    """Columns and rows of the table as CSV, one row for each arm and amount of labels."""
    rows = []
    for row in content["rows"]:
        low, high = row.get("ci95") or (None, None)
        less, more = row.get("difference_ci95") or (None, None)
        found = {**row, "ci95_low": low, "ci95_high": high, "difference_low": less, "difference_high": more}
        found["num_labelled"] = numbered(row["num_labelled"])
        rows.append([found.get(name) for name in _COLUMNS])
    return _COLUMNS, rows


def numbered(numbers: int | Sequence[int]) -> str:
    """Numbers of patients, which may differ by one between folds."""
    return str(numbers) if isinstance(numbers, int) else f"{min(numbers)} to {max(numbers)}" if numbers else "0"


def comparison_tables(content: Mapping[str, Any]) -> list[PaperTable]:
    """The tables for a paper: scores and differences, costs, probes, what is missing, and notes."""
    tables = [_score_table(content), _cost_table(content)]
    if content["probes"]:
        rows = [
            [
                row["arm"],
                *(
                    number(row.get(f"{name}_{kind}"), 3)
                    for name in ("features", "random")
                    for kind in ("linear", "neighbours")
                ),
            ]
            for row in content["probes"]
        ]
        heads = ["Arm", "Linear", "k-NN", "Linear, random encoder", "k-NN, random encoder"]
        tables.append(PaperTable("probes", "Balanced accuracy of frozen features on tested patients.", heads, rows))
    if content["misses"]:
        rows = [[row["cell"], row["reason"]] for row in content["misses"]]
        tables.append(PaperTable("misses", "Runs without a result.", ["Run", "Reason"], rows))
    if content["notes"]:
        rows = [[note] for note in content["notes"]]
        tables.append(PaperTable("notes", "What changes how these numbers are to be read.", ["Note"], rows))
    return tables


def _score_table(content: Mapping[str, Any]) -> PaperTable:
    title = _TITLES.get(content["score"], content["score"])
    score = Column("mean", title, 3)
    rows = []
    for row in content["rows"]:
        missing = "" if row["num_done"] == row["num_cells"] else "*"
        against = (
            [difference_cell({"difference": row["difference"], "ci95": row.get("difference_ci95")}, score)]
            if "difference" in row and row["arm"] != content["reference"]
            else ["–"]
        )
        rows.append(
            [
                row["arm"],
                f"{row['labels']} ({numbered(row['num_labelled'])})",
                value_cell(row, {}, {"mean": row.get("ci95")}, score) + missing,
                *against,
                p_cell(row.get("p_holm")),
                "–" if row["steps_to_target"] is None else str(row["steps_to_target"]),
                f"{row['num_done']} of {row['num_cells']}",
            ]
        )
    starred = any(row["num_done"] < row["num_cells"] for row in content["rows"])
    interval = " [95 % interval over patients and seeds]" if content["num_bootstrap"] else ""
    caption = (
        f"{title} of {content['num_tested']} tested patients{interval}; difference to {content['reference']}; p of "
        f"{_TESTS.get(content['score'], 'a paired test')} over patients, corrected after Holm over the whole table; "
        "steps after which "
        f"validation reaches {_goals(content)}."
        + (" *: of the runs that are done alone, so not comparable with complete rows." if starred else "")
    )
    heads = ["Arm", "Labels (patients)", title, "Difference", "p (Holm)", "Steps", "Runs"]
    return PaperTable("comparison", caption, heads, rows)


def _goals(content: Mapping[str, Any]) -> str:
    """The scores of validation to which steps are counted, in words."""
    goals = {row["labels"]: row["target"] for row in content["rows"]}
    if content["target"] is not None:
        return number(content["target"], 3)
    each = ", ".join(f"{number(goal, 3)} ({labels})" for labels, goal in goals.items())
    return f"the best of {content['reference']}: {each}"


def _cost_table(content: Mapping[str, Any]) -> PaperTable:
    rows = []
    for arm in content["arms"]:
        cells = [arm["name"], arm["kind"], arm["backbone"]]
        for kind in ("pretrain", "finetune"):
            memory, steps = arm.get(f"{kind}_memory_bytes"), arm.get(f"{kind}_steps")
            cells += [
                number(steps, 0),
                number(arm.get(f"{kind}_step_s"), 3),
                number(None if (time_s := arm.get(f"{kind}_train_s")) is None else time_s / 60, 1),
                number(None if memory is None else memory / 2**30, 2),
            ]
        rows.append(cells)
    heads = ["Arm", "Begins", "Network"]
    columns = ("steps", "s/step", "min", "GiB")
    heads += [f"{what}: {name}" for what in ("pre-training", "fine-tuning") for name in columns]
    caption = "What each arm costs: medians over its runs; memory as a training step needs it."
    return PaperTable("costs", caption, heads, rows)


def comparison_section(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the section of the report shows; empty where there is no comparison."""
    if not contents:
        return {}
    return {
        "comparisons": [
            {
                "title": Path(content["data"]).name,
                "chart": efficiency_chart(content),
                "caption": "Scores against labels, with intervals.",
                "legend": [(arm["name"], run_colour(place)) for place, arm in enumerate(content["arms"])],
                "tables": comparison_tables(content),
            }
            for content in contents
        ]
    }


def efficiency_chart(content: Mapping[str, Any]) -> str:
    """HTML of the score against the number of labelled patients, a line with intervals for each arm."""
    title = _TITLES.get(content["score"], content["score"])

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        panel = figure.subplots()
        style_axes(panel, theme)
        for place, arm in enumerate(content["arms"]):
            rows = [row for row in content["rows"] if row["arm"] == arm["name"] and row["mean"] is not None]
            # Beside each other, so that intervals can be told apart.
            across = [_most(row["num_labelled"]) * (1 + 0.02 * place) for row in rows]
            means = [row["mean"] for row in rows]
            panel.plot(across, means, color=run_colour(place), marker="o", markersize=3.5, linewidth=1.3)
            for x, row in zip(across, rows, strict=True):
                if row.get("ci95"):
                    panel.vlines(x, *row["ci95"], color=run_colour(place), linewidth=1.0)
        panel.set_xscale("log")
        ticks = {_most(row["num_labelled"]): row["labels"] for row in content["rows"]}
        labels = [chart_text(f"{number} ({text})" if text != str(number) else text) for number, text in ticks.items()]
        panel.set_xticks(list(ticks), labels)
        panel.minorticks_off()
        panel.set_xlabel("labelled patients", fontsize=8, color=theme.ink)
        panel.set_ylabel(title, fontsize=8, color=theme.ink)
        return figure

    return chart(draw, f"{title} against the number of labelled patients")


def _most(numbers: int | Sequence[int]) -> int:
    return max(1, numbers if isinstance(numbers, int) else max(numbers, default=1))
