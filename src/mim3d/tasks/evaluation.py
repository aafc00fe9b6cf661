"""What `mim3d evaluate` gives a task, what it takes back, and how scores are shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from mim3d.core.errors import ConfigError
from mim3d.metrics import Bootstrap

if TYPE_CHECKING:
    from rich.table import Table

    from mim3d.reporting.paper_tables import PaperTable

#: Names of columns, and rows of cells.
CsvTable = tuple[Sequence[str], Sequence[Sequence[Any]]]


@dataclass(frozen=True, kw_only=True)
class LabelMapSettings:
    """Settings that mean something to label maps alone; `mim3d evaluate` describes each.

    Attributes:
        preset: Name of a published data set that gives the tolerance, names and regions that are not given.
        nsd_tolerance_mm: Distance in mm up to which two surfaces agree; None takes that of the preset, or 1 mm.
        labels: Names or values of the labels to score; None for every declared one.
        regions: Unions of labels to score in place of single ones, by name.
        lesions: Whether the lesions of every label are scored, or the names of labels and regions.
        lesion_overlap: Least intersection over union for a lesion to count as found.
        lesion_matching: Whether a lesion may count for several others.
        lesion_min_ml: Volume in millilitres below which connected components are no lesions.
        missing: What becomes of a reference without a prediction.
    """

    preset: str | None = None
    nsd_tolerance_mm: float | None = None
    labels: Sequence[str] | None = None
    regions: Mapping[str, Sequence[int | str]] | None = None
    lesions: bool | Sequence[str] = False
    lesion_overlap: float = 0.0
    lesion_matching: Literal["many", "one_to_one"] = "many"
    lesion_min_ml: float = 0.0
    missing: Literal["leave_out", "worst"] = "leave_out"


@dataclass(frozen=True, kw_only=True)
class ClassTableSettings:
    """Settings that mean something to tables of classes alone; `mim3d evaluate` describes each.

    Attributes:
        class_column: Column of the references that holds the class.
        positive: The positive class of two; None takes the last in sorted order.
        by_patient: Whether patients are scored by the mean probabilities of their scans.
        num_bins: Number of bins of the calibration error.
        baseline_column: Column of the references with a number that is compared with the classifier.
    """

    class_column: str = "class"
    positive: str | None = None
    by_patient: bool = False
    num_bins: int = 10
    baseline_column: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Which predictions are scored against which references, and how.

    Attributes:
        predictions: Folder or table of the predictions.
        references: What they are scored against.
        compare: Predictions of another method in the same form; None compares with none.
        bootstrap: How intervals are made.
        num_workers: Number of processes that score cases; None for one per core, as far as work and memory reach.
        label_maps: Settings for label maps.
        class_tables: Settings for tables of classes.
    """

    predictions: str
    references: str | Sequence[str]
    compare: str | None = None
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    num_workers: int | None = None
    label_maps: LabelMapSettings = field(default_factory=LabelMapSettings)
    class_tables: ClassTableSettings = field(default_factory=ClassTableSettings)

    def refuse_given(self, group: LabelMapSettings | ClassTableSettings, theirs: str, ours: str) -> None:
        """Refuse settings that mean nothing to these predictions.

        Args:
            group: The settings that must all be as they are by default.
            theirs: What the group is for, in the plural.
            ours: What the predictions are, with their article.

        Raises:
            ConfigError: The sentence names the first setting that was given all the same.
        """
        for setting in fields(group):
            value = getattr(group, setting.name)
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
    """

    content: Mapping[str, Any]
    num_cases: int
    csv_tables: Mapping[str, CsvTable] = field(default_factory=dict)
    printed: "Sequence[Table]" = ()
    paper_tables: "Sequence[PaperTable]" = ()


def printed_table(title: str | None, first: str, columns: Sequence[str]) -> "Table":
    """Return an empty table for the terminal, whose first column names the rows."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def number_cell(value: float | None, key: str) -> str:
    """Return a score with the decimals that its name asks for; a dash where it is not defined."""
    if value is None:
        return "-"
    return f"{value:.4f}" if key in ("dice", "nsd") or key.startswith("lesion_") else f"{value:.2f}"


def interval_cell(ends: Sequence[float] | None, key: str) -> str:
    """Return both ends of an interval; a dash where there is none."""
    return "-" if ends is None else f"{number_cell(ends[0], key)} to {number_cell(ends[1], key)}"
