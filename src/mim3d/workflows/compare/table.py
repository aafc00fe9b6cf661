"""The tables of a comparison, from the files of results alone."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from mim3d.core.errors import ConfigError
from mim3d.core.files import write_csv, write_json, write_text
from mim3d.core.names import number_of
from mim3d.core.progress import say
from mim3d.core.settings import nearest
from mim3d.metrics import Bootstrap
from mim3d.metrics.crossed import CONVENTIONS, CrossedClasses, CrossedScores
from mim3d.metrics.paired import holm
from mim3d.reporting.arms import CONTENT_NAME, comparison_rows, comparison_tables
from mim3d.reporting.page import write_report
from mim3d.reporting.paper_tables import latex, markdown
from mim3d.tasks import create_task
from mim3d.tasks.evaluation import print_tables, printed_table
from mim3d.workflows.compare.cells import Cell, read_result
from mim3d.workflows.compare.plan import cells_of, read_plan
from mim3d.workflows.compare.settings import CompareSettings
from mim3d.workflows.finetune.settings import FinetuneSettings

REPORT_NAME = "report.html"

#: Misses, and notes, that are printed.
_MOST_SAID = 5

#: Warnings of runs that change how the results of an arm are to be read.
_TOLD = ("leak", "weights", "learning", "left out")


def write_tables(out: Path, settings: CompareSettings) -> None:
    """Write comparison.json, .csv, .md, .tex and the report of a comparison, and print its table.

    Args:
        out: Folder of the comparison.
        settings: How the table is made: the reference, the score to count steps to, and the draws of intervals.

    Raises:
        ConfigError: There is no plan, or no arm of the name that is the reference.
    """
    results, bootstrap = Results.read(out, settings), Bootstrap(num_bootstrap=settings.num_bootstrap)
    try:
        content = results.content(settings.reference, settings.target_dice, bootstrap)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # Somebody changed them: what mim3d writes has all of it.
        raise ConfigError(f"{out / 'cells'}: a result is not as mim3d compare wrote it ({error!r}).") from error
    write_json(out / CONTENT_NAME, content, indent=1, allow_nan=False)
    write_csv(out / "comparison.csv", *comparison_rows(content))
    tables = comparison_tables(content)
    write_text(out / "comparison.md", markdown(tables))
    write_text(out / "comparison.tex", latex(tables))
    shown = printed_table(tables[0].caption, tables[0].heads[0], tables[0].heads[1:])
    for row in tables[0].rows:
        shown.add_row(*row)
    print_tables([shown])
    for miss in content["misses"][:_MOST_SAID]:
        say(f"missing: {miss['cell']}: {miss['reason']}")
    for note in content["notes"][:_MOST_SAID]:
        say(f"note: {note}")
    if (more := len(content["misses"]) + len(content["notes"])) > _MOST_SAID:
        say(f"all {more} misses and notes are in the report")
    say(f"tables: {out / 'comparison'}.csv, .md, .tex")
    write_report([str(out)], str(out / REPORT_NAME), [], overwrite=True)


@dataclass(frozen=True)
class Results:
    """The plan of a comparison, and the results that are there.

    Attributes:
        plan: The plan.
        cells: Its cells.
        found: Result of each cell that has one, by id.
    """

    plan: Mapping[str, Any]
    cells: Sequence[Cell]
    found: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, out: Path, settings: CompareSettings) -> "Results":
        """Read the folder of a comparison."""
        plan = read_plan(out)
        cells = cells_of(plan, settings)
        read = {cell.id: read_result(out, cell) for cell in cells}
        return cls(plan, cells, {name: result for name, result in read.items() if result is not None})

    def done(self, **about: Any) -> list[tuple[Cell, Mapping[str, Any]]]:
        """The finished cells with some attributes, each with its result."""
        return [
            (cell, self.found[cell.id])
            for cell in self.cells
            if self.found.get(cell.id, {}).get("status") == "done"
            and all(getattr(cell, name) == value for name, value in about.items())
        ]

    @property
    def arms(self) -> list[str]:
        """Names of the arms."""
        return [arm["name"] for arm in self.plan["arms"]]

    def content(self, reference: str | None, target: float | None, bootstrap: Bootstrap) -> dict[str, Any]:
        """All numbers of the comparison, as JSON holds them.

        Raises:
            ConfigError: There is no arm of the name of the reference.
        """
        if reference is not None and reference not in self.arms:
            raise ConfigError(f"There is no arm '{reference}'.{nearest(reference, self.arms)}")
        first = reference or self.arms[0]
        # The same for all cells.
        task = next((cell.settings.task for cell in self.cells if isinstance(cell.settings, FinetuneSettings)), None)
        is_classes = task is not None and create_task(task).needs == "class"
        rows: list[dict[str, Any]] = []
        for labels in self.plan["labels"]:
            scored = {arm: self._scores(arm, labels, is_classes) for arm in self.arms}
            goal = self._goal(first, labels) if target is None else target
            for arm in self.arms:
                own, other = scored[arm], None if arm == first else scored[first]
                rows.append(
                    {
                        **self._about(arm, labels),
                        **own.row(bootstrap),
                        **(own.against(other, bootstrap) if other is not None else {}),
                        "target": goal,
                        "steps_to_target": None if goal is None else self._steps_to(arm, labels, goal),
                    }
                )
        for row, p in zip(rows, holm([row.get("p") for row in rows]), strict=True):
            row["p_holm"] = p
        return {
            "kind": "comparison",
            "format": 1,
            "data": self.plan["data"],
            "score": "auc" if is_classes else "dice",
            "reference": first,
            "target": target,
            "num_bootstrap": bootstrap.num_bootstrap,
            "conventions": CONVENTIONS,
            "labels": self.plan["labels"],
            "folds": self.plan["folds"],
            "num_tested": self.plan["num_tested"],
            "arms": [{**arm, **self._costs(arm["name"])} for arm in self.plan["arms"]],
            "rows": rows,
            "probes": self._probes(),
            "misses": self._misses(),
            "notes": [*self.plan["notes"], *self._unlike(first), *self._unchosen(), *self._said()],
        }

    def _about(self, arm: str, labels: str) -> dict[str, Any]:
        cells = [cell for cell in self.cells if (cell.kind, cell.arm, cell.labels) == ("finetune", arm, labels)]
        numbers = sorted({cell.num_patients for cell in cells})
        done = self.done(kind="finetune", arm=arm, labels=labels)
        return {
            "arm": arm,
            "labels": labels,
            "num_labelled": numbers[0] if len(numbers) == 1 else numbers,
            "num_seeds": len({cell.seed for cell, _ in done}),
            "num_cells": len(cells),
            "num_done": len(done),
        }

    def _scores(self, arm: str, labels: str, is_classes: bool) -> "ArmScores":
        patients = list(dict.fromkeys(self.plan["patients"].values()))
        seeds = list(dict.fromkeys(cell.seed for cell in self.cells if cell.kind == "finetune"))
        done = [(seeds.index(cell.seed), result) for cell, result in self.done(kind="finetune", arm=arm, labels=labels)]
        if is_classes:
            return ArmScores({}, _classes(done, self.plan["patients"], patients, len(seeds)))
        collected: dict[str, dict[tuple[int, int], list[float]]] = {
            key: defaultdict(list) for key in ("dice", "nsd", "hd95_mm")
        }
        for seed, result in done:
            for case in result["cases"]:
                place = patients.index(self.plan["patients"][case["id"]])
                for key, found in collected.items():
                    values = [row[key] for row in case["labels"].values() if row.get(key) is not None]
                    if values:
                        found[place, seed].append(fmean(values))
        return ArmScores(
            {key: CrossedScores(_filled(found, (len(patients), len(seeds)))) for key, found in collected.items()}
        )

    def _curve(self, arm: str, labels: str) -> dict[int, float]:
        """The mean score of validation at each step that all finished runs of an arm validated at."""
        done = self.done(kind="finetune", arm=arm, labels=labels)
        # Runs whose AUC is not defined have no curve.
        curves = [dict(map(tuple, result["validation"])) for _, result in done if result["validation"]]
        shared = set.intersection(*map(set, curves)) if curves else set()
        return {step: fmean(curve[step] for curve in curves) for step in sorted(shared)}

    def _goal(self, arm: str, labels: str) -> float | None:
        return max(self._curve(arm, labels).values(), default=None)

    def _steps_to(self, arm: str, labels: str, goal: float) -> int | None:
        return next((step for step, value in self._curve(arm, labels).items() if value >= goal), None)

    def _costs(self, arm: str) -> dict[str, Any]:
        """Steps, seconds and memory of an arm's runs, medians over them."""
        costs: dict[str, Any] = {}
        for kind in ("pretrain", "finetune"):
            results = [result for _, result in self.done(kind=kind, arm=arm)]
            for name in ("steps", "train_s", "step_s", "memory_bytes"):
                values = [result[name] for result in results if result.get(name) is not None]
                costs[f"{kind}_{name}"] = median(values) if values else None
        return costs

    def _probes(self) -> list[dict[str, Any]]:
        rows = []
        for arm in self.arms:
            results = [result for _, result in self.done(kind="probe", arm=arm)]
            row: dict[str, Any] = {"arm": arm, "num_done": len(results)}
            for name in ("features", "random"):
                for kind in ("linear", "neighbours"):
                    values = [result[name][kind] for result in results if result.get(name, {}).get(kind) is not None]
                    row[f"{name}_{kind}"] = fmean(values) if values else None
            if results:
                rows.append(row)
        return rows

    def _misses(self) -> list[dict[str, Any]]:
        """Cells without a result, or with a failure for one."""
        rows = []
        for cell in self.cells:
            result = self.found.get(cell.id)
            if result is None or result["status"] != "done":
                reason = "not run yet" if result is None else str(result["reason"])
                rows.append(
                    {"cell": cell.id, "kind": cell.kind, "arm": cell.arm, "labels": cell.labels, "reason": reason}
                )
        return rows

    def _unlike(self, first: str) -> list[str]:
        """In what arms differed beside their weights: with weights also in the network, else in fine-tuning."""
        backbones = {arm["name"]: arm["backbone"] for arm in self.plan["arms"]}
        notes = [
            f"{arm['name']} has another network ({arm['backbone']}) than {first} ({backbones[first]}): their "
            "difference is not that of pre-training alone."
            for arm in self.plan["arms"]
            if arm["kind"] != "from scratch" and arm["backbone"] != backbones[first]
        ]
        for name in ("schedule", "decoder"):
            arms: dict[str, dict[str, None]] = defaultdict(dict)
            for cell, result in self.done(kind="finetune"):
                if value := result.get(name):
                    arms[value][cell.arm] = None
            if len(arms) > 1:
                each = "; ".join(f"{value}: {', '.join(names)}" for value, names in arms.items())
                notes.append(f"The {name} of fine-tuning differs between arms ({each}).")
        return notes

    def _unchosen(self) -> list[str]:
        """With which amounts of labels validation could not choose among the weights of a run."""
        notes = []
        for labels in self.plan["labels"]:
            done = self.done(kind="finetune", labels=labels)
            if number := sum(not result["validation"] for _, result in done):
                notes.append(
                    f"labels {labels}: in {number} of {number_of(len(done), 'run')} all cases that choose are of one "
                    "class, so that their AUC is not defined: the last weights are tested, and steps are counted in "
                    "the other runs."
                )
        return notes

    def _said(self) -> list[str]:
        """What runs of an arm warned of that changes how their results are to be read, each once with its arm."""
        said = {
            f"{cell.arm}: {row['text']}": None
            for cell, result in self.done()
            for row in result.get("warnings", ())
            if row.get("kind") in _TOLD
        }
        said |= {
            f"{cell.id}: {result['not_predicted']}": None
            for cell, result in self.done(kind="finetune")
            if result.get("not_predicted")
        }
        return list(said)


@dataclass(frozen=True)
class ArmScores:
    """The scores of an arm with an amount of labels.

    Attributes:
        crossed: Scores of label maps by name; empty for classes.
        classes: Probabilities of classes; None for label maps, and where nothing is done.
    """

    crossed: Mapping[str, CrossedScores]
    classes: CrossedClasses | None = None

    def row(self, bootstrap: Bootstrap) -> dict[str, Any]:
        """Mean, interval and further scores."""
        if not self.crossed:
            known = self.classes
            return {
                "mean": None if known is None else known.mean(),
                "ci95": None if known is None else known.interval(bootstrap),
            }
        own = self.crossed["dice"]
        others = {key: scores.mean() for key, scores in self.crossed.items() if key != "dice"}
        return {"mean": own.mean(), "ci95": own.interval(bootstrap), **others}

    def against(self, other: "ArmScores", bootstrap: Bootstrap) -> dict[str, Any]:
        """Difference to another arm, its interval, and p."""
        if not self.crossed:
            if self.classes is None or other.classes is None:
                return {"difference": None, "difference_ci95": None, "p": None}
            difference, ends, p = self.classes.against(other.classes, bootstrap)
            return {"difference": difference, "difference_ci95": ends, "p": p}
        less = self.crossed["dice"].less(other.crossed["dice"])
        return {
            "difference": less.mean(),
            "difference_ci95": less.interval(bootstrap),
            "p": less.signed_rank_p(),
        }


def _filled(found: Mapping[tuple[int, int], Sequence[float]], shape: tuple[int, int]) -> Any:
    values_PS = np.full(shape, math.nan)
    for place, values in found.items():
        values_PS[place] = fmean(values)
    return values_PS


def _classes(
    done: Sequence[tuple[int, Mapping[str, Any]]], patient_of: Mapping[str, str], patients: Sequence[str], seeds: int
) -> CrossedClasses | None:
    if not done:
        return None
    names = list(done[0][1]["classes"])
    ids = list(patient_of)
    probabilities_SNK = np.full((seeds, len(ids), len(names)), math.nan)
    classes_N, folds_N = np.zeros((2, len(ids)), dtype=np.int64)
    for seed, result in done:
        for case in result["cases"]:
            if case["probabilities"] is not None and case["true_class"] in names:
                place = ids.index(str(case["id"]))
                probabilities_SNK[seed, place] = case["probabilities"]
                classes_N[place], folds_N[place] = names.index(case["true_class"]), result["fold"]
    positive = names.index(done[0][1]["positive"]) if len(names) == 2 else None
    of_case = np.array([patients.index(patient_of[name]) for name in ids], dtype=np.int64)
    return CrossedClasses(
        probabilities_SNK=probabilities_SNK,
        classes_N=classes_N,
        patients_N=of_case,
        folds_N=folds_N,
        positive=positive,
    )
