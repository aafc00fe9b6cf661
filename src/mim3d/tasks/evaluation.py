"""What `mim3d evaluate` gives a task, what it takes back, and how scores are shown."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal

from mim3d.core.errors import ConfigError
from mim3d.core.left_out import Failure
from mim3d.core.progress import say
from mim3d.metrics import Bootstrap

if TYPE_CHECKING:
    from rich.table import Table

    from mim3d.reporting.paper_tables import PaperTable

#: Most characters of a line in the head of a column, where its words are no longer.
HEAD_WIDTH = 8

#: Characters of the names of rows at least, between two columns, and in a line of a table outside of a terminal.
FIRST_WIDTH = 8
_BETWEEN = 2
_WIDE = 1000

#: Names of columns, and rows of cells.
CsvTable = tuple[Sequence[str], Sequence[Sequence[Any]]]


@dataclass(frozen=True, kw_only=True)
class LabelMapSettings:
    """Settings that mean something to label maps alone.

    Attributes:
        preset: Published data set, such as COVID-19-20, that gives the tolerance of surfaces, the names of labels and
            the regions, as far as the settings below do not.
        nsd_tolerance_mm: Distance in mm up to which two surfaces agree; that of the preset, or 1 mm, if left out.
        labels: Names or values of the labels to score; every declared one if left out.
        regions: Unions of labels to score in place of single ones, such as '{whole tumour: [1, 2, 3]}', by value or
            name; if left out, those of the preset, or that the predictions' own list declares. --labels adds single
            ones.
        lesions: With true, score the lesions of every label one by one; with names, those of these labels or regions.
        lesion_overlap: Least intersection over union for a lesion to count as found; 0 asks for one shared voxel.
        lesion_matching: How lesions match: many lets a lesion count for several others, one_to_one for one at most.
        lesion_min_ml: Connected components smaller than this many ml are no lesions.
        missing: A reference without a prediction is left out with a warning (leave_out), or scored as an empty
            prediction (worst).
    """

    preset: str | None = None
    nsd_tolerance_mm: float | None = None
    labels: list[str] | None = None
    regions: dict[str, list[int | str]] | None = None
    lesions: bool | list[str] = False
    lesion_overlap: float = 0.0
    lesion_matching: Literal["many", "one_to_one"] = "many"
    lesion_min_ml: float = 0.0
    missing: Literal["leave_out", "worst"] = "leave_out"


@dataclass(frozen=True, kw_only=True)
class ClassTableSettings:
    """Settings that mean something to tables of classes alone.

    Attributes:
        class_column: Column of the references that holds the class.
        positive: The positive class of two; the last in sorted order if left out.
        by_patient: Score patients by the mean probabilities of their scans, not scans.
        num_bins: Number of bins of the calibration error.
        baseline_column: A number in the references, such as a diameter, whose AUC is compared with the classifier's.
    """

    class_column: str = "class"
    positive: str | None = None
    by_patient: bool = False
    num_bins: int = 10
    baseline_column: str | None = None


@dataclass(frozen=True)
class EvaluationSettings(LabelMapSettings, ClassTableSettings):
    """Settings of `mim3d evaluate`.

    Attributes:
        predictions: Folder that `mim3d predict` wrote, a folder of label maps by any other tool, or a table of classes
            (.csv with id, predicted and a column probability_CLASS for each class).
        references: Folder of label maps (labelsTr), label files, or any form of DATA with labels; with a table of
            classes, a .csv with id, case or image, and a class. A column patient says which cases belong together.
        out: File of scores to write, ending in .json; a table of the cases (.csv) comes beside it.
        compare: Predictions of another method, in the same form: differences case by case, with intervals and tests.
        num_bootstrap: How often patients are drawn anew for the intervals; 0 makes none.
        seed: Seed of these draws.
        tables: Write Markdown (.md) and LaTeX (.tex) tables beside the file of scores.
        num_workers: Processes that score cases; if left out one per core, as far as work and memory reach.
        strict: Refuse cases that cannot be scored instead of leaving them out.
        task: Name or dotted path of your own task, which scores its predictions; its code is imported.
        overwrite: Replace the scores of other predictions.
    """

    predictions: str
    references: str | list[str]
    out: str
    _: KW_ONLY
    compare: str | None = None
    num_bootstrap: int = 2000
    seed: int = 0
    tables: bool = True
    num_workers: int | None = None
    strict: bool = False
    task: str | None = None
    overwrite: bool = False

    @property
    def bootstrap(self) -> Bootstrap:
        """How intervals are made."""
        return Bootstrap(num_bootstrap=self.num_bootstrap, seed=self.seed)

    def group(self, kind: type[LabelMapSettings] | type[ClassTableSettings]) -> dict[str, Any]:
        """Return the settings of one kind of predictions by name."""
        return {setting.name: getattr(self, setting.name) for setting in fields(kind)}

    def refuse_given(self, kind: type[LabelMapSettings] | type[ClassTableSettings], theirs: str, ours: str) -> None:
        """Refuse settings that mean nothing to these predictions.

        Args:
            kind: The settings that must all be as they are by default.
            theirs: What these settings are for, in the plural.
            ours: What the predictions are, with their article.

        Raises:
            ConfigError: The sentence names the first setting that was given all the same.
        """
        for setting in fields(kind):
            value = getattr(self, setting.name)
            if value != setting.default:
                raise ConfigError(
                    f"{setting.name} is {value!r}, which is a setting for {theirs}, but predictions names {ours} "
                    f"({self.predictions}); leave it out."
                )


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What became of an evaluation: all that is written and printed.

    Attributes:
        content: The file of scores, in plain values.
        num_cases: Number of cases that were scored.
        csv_tables: Tables that are written beside the file of scores, by the ending of their names.
        printed: Tables that are printed.
        paper_tables: Tables for a paper, written as Markdown and LaTeX.
        failures: Why cases could not be scored, by id; ``content`` lists the reasons.
    """

    content: Mapping[str, Any]
    num_cases: int
    csv_tables: Mapping[str, CsvTable] = field(default_factory=dict)
    printed: "Sequence[Table]" = ()
    paper_tables: "Sequence[PaperTable]" = ()
    failures: Mapping[str, Failure] = field(default_factory=dict)


def printed_table(title: str | None, first: str, columns: Sequence[str]) -> "Table":
    """Return an empty table for the terminal, whose first column names the rows.

    On a narrow terminal these names are broken, never a number, which says nothing when it is cut short.

    Args:
        title: Title above the table.
        first: Head of the first column.
        columns: Heads of the columns of numbers.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=None if title is None else Text(title),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column(Text(first), overflow="fold")
    for column in columns:
        lines = [line for part in column.split("\n") for line in wrap(part, HEAD_WIDTH, break_long_words=False)]
        table.add_column(Text("\n".join(lines)), justify="right", no_wrap=True)
    return table


def print_tables(tables: "Sequence[Table]") -> None:
    """Print tables below their titles: as wide as a terminal where their numbers fit, as wide as they are elsewhere."""
    from rich.console import Console

    for table in tables:
        console = Console()
        numbers = [
            max(console.measure(cell).maximum for cell in (column.header, *column.cells)) + _BETWEEN
            for column in table.columns[1:]
        ]
        free = console.width if console.is_terminal or "COLUMNS" in os.environ else _WIDE
        console.width = max(free, sum(numbers) + FIRST_WIDTH)
        # Within the table, a title is broken at the table's width.
        title, table.title = table.title, None
        if title is not None:
            say(str(title))
        with console.capture() as shown:
            console.print(table)
        print("\n".join(line.rstrip() for line in shown.get().split("\n")), end="", flush=True)


def number_cell(value: float | None, key: str) -> str:
    """Return a score with the decimals that its name asks for; a dash where it is not defined."""
    if value is None:
        return "-"
    return f"{value:.4f}" if key in ("dice", "nsd") or key.startswith("lesion_") else f"{value:.2f}"


def interval_cell(ends: Sequence[float] | None, key: str) -> str:
    """Return both ends of an interval; a dash where there is none."""
    return "-" if ends is None else f"{number_cell(ends[0], key)} to {number_cell(ends[1], key)}"
