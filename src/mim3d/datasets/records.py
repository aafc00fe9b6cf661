"""What a case, a set of cases and a split are."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Case:
    """One scan of a data set, by the paths of its files (all absolute).

    Attributes:
        id: Unique in its set and safe as a file name.
        images: One path per channel; a DICOM series counts as one path.
        label: Path of the label map, or None.
        class_name: Class of the whole scan, or None.
        patient: Cases of one patient are never split apart.
        split: Declared part, "train", "val" or "test", or None.
        labelled: Labels, by name or value, that its label map has annotations of; None for all.
    """

    id: str
    images: tuple[str, ...]
    label: str | None = None
    class_name: str | None = None
    patient: str
    split: str | None = None
    labelled: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class CaseSet:
    """All cases of one data set.

    Attributes:
        root: The folder or list they come from.
        form: "folder", "pairs", "msd", "nnunet", "csv", "json", "preset", "list" or "slices".
        cases: Ordered by the list, or by path for folders.
        labels: Declared label value -> name with background 0 included; empty where nothing is declared.
    """

    root: str
    form: str
    cases: tuple[Case, ...]
    labels: dict[int, str]


@dataclass(frozen=True)
class Split:
    """The two parts of a data set that one fold trains and validates on."""

    train: tuple[Case, ...]
    val: tuple[Case, ...]


def listed(names: Sequence[object], limit: int = 5) -> str:
    """The first few names of a sequence for a sentence: ``a, b, c and 4 more``."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
