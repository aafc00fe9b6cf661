"""Which cases a run trains on and which it holds out: chosen, written down, and found again by prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import read_json, write_csv, write_json
from mim3d.core.names import cut, is_entry_name
from mim3d.core.run_folder import GO_ON, Run
from mim3d.core.settings import coerce
from mim3d.datasets.cases import Case
from mim3d.datasets.splits import Split, TrainPart, split_by_list, split_cases

SPLIT_NAME = "split.json"
LIST_NAME = "held_out.csv"


@dataclass(frozen=True)
class FoldChoice:
    """Which of the folds of a data set is held out.

    Attributes:
        fold: Number of the fold, from 0; None holds nothing out.
        num_folds: Number of folds in all.
        split_seed: Seed by which patients are split into folds.
    """

    fold: int | None
    num_folds: int
    split_seed: int

    def held_out_patients(self, groups: Sequence[Sequence[Case]]) -> set[str]:
        """Patients that are held out in any of some groups of cases, each of which is split by itself.

        Raises:
            ConfigError: A fold that does not exist.
            DataError: Cases that cannot be split.
        """
        if self.fold is None:
            return set()
        splits = [split_cases(g, fold=self.fold, num_folds=self.num_folds, seed=self.split_seed) for g in groups]
        return {case.patient for split in splits for case in split.val}


def cases_by_task(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases that each task splits into folds: segmentation those with label maps, classification those of a class.

    Where all cases have both, the two are the same; a task that no case is for is left out.
    """
    groups = ([c for c in cases if c.label is not None], [c for c in cases if c.class_name is not None])
    return [group for group in groups if group]


def choose_split(
    cases: Sequence[Case],
    *,
    fold: int | None,
    num_folds: int,
    part: TrainPart = TrainPart(),
    split_seed: int = 0,
    unreadable: Sequence[Case] = (),
    held_out_list: str | None = None,
) -> Split:
    """Split the cases of a data set, and keep a part of those to train on.

    Folds and parts depend on the data set and their own seeds alone, so that methods and training seeds are compared on
    the same cases.

    Args:
        cases: All cases of the data set.
        fold: Which fold is held out; None holds nothing out.
        num_folds: Number of folds.
        part: Which of the training cases are kept.
        split_seed: Seed by which patients are split into folds.
        unreadable: Further cases, whose files cannot be read: counted in folds and parts, so that mending a file moves
            no other case, and then left out.
        held_out_list: Text file that names the held-out cases or patients, in place of a fold.
    Raises:
        ConfigError: A fold that does not exist, or a negative seed.
        DataError: Cases that cannot be split, a part that cannot be taken, or one of which no case is readable.
    """
    cases = [*cases, *unreadable]
    if held_out_list is not None:
        split = split_by_list(cases, held_out_list)
    elif fold is None:
        split = Split(train=tuple(case for case in cases if case.split in (None, "train")), val=())
    else:
        split = split_cases(cases, fold=fold, num_folds=num_folds, seed=split_seed)
    if not split.train:
        raise DataError('No case is left to train on; mark some "train" in the list.')
    ids = {case.id for case in split.train}
    train = part.take(split.train, [case for case in cases if case.id not in ids])
    return Split(train=train, val=split.val).without(unreadable)


def split_in_words(split: Split, fold: int | None, num_folds: int, held_out_list: str | None = None) -> str:
    """By what cases are held out: a list, the data set's own split or folds, or those that were drawn."""
    if not split.val:
        return "none held out"
    if held_out_list is not None:
        return f"named in {held_out_list}"
    if any(case.split in ("val", "test") for case in split.val):
        return "declared split"
    if any(case.fold is not None for case in split.val):
        return f"declared fold {fold}"
    return f"fold {fold} of {num_folds}, from 0"


def write_split(run: Run, split: Split) -> None:
    """Write the ids of both parts to ``split.json``, and the held-out cases as a list that is DATA again."""
    if not run.writes:
        return
    parts = {"train": split.train, "val": split.val}
    lists = {
        name: [{"id": c.id, "images": list(c.images), "label": c.label, "patient": c.patient} for c in part]
        for name, part in parts.items()
    }
    write_json(run.path / SPLIT_NAME, lists, remedy=GO_ON)
    # The ids too: those of a whole data set are not always what a shorter list would make of the same images.
    head = ("id", "image", "label", "class", "patient", "labels")
    write_csv(run.path / LIST_NAME, head, list_rows(split.val, head), remedy=GO_ON)


def list_rows(cases: Sequence[Case], columns: Sequence[str]) -> list[list[str | None]]:
    """Rows of a list that is DATA again, with some of the columns that lists may have."""
    rows = (
        {
            "id": case.id,
            "image": ";".join(case.images),
            "label": case.label,
            "class": case.class_name,
            "patient": case.patient,
            "modality": case.modality,
            "labels": ";".join(case.labelled or ()),
        }
        for case in cases
    )
    return [[row[name] for name in columns] for row in rows]


def held_out_cases(run: Path) -> list[Case]:
    """The held-out cases of a run, under the ids they had there.

    Args:
        run: A run of fine-tuning, or its segmenter folder.
    Raises:
        DataError: The run holds no split, or nothing was held out.
    """
    path = next((folder / SPLIT_NAME for folder in (run, run.parent) if (folder / SPLIT_NAME).is_file()), None)
    if path is None:
        raise DataError(f"{run} has no {SPLIT_NAME} that lists held-out cases; name the scans with --input.")
    try:
        cases = [
            Case(
                id=coerce(row["id"], str, "id"),
                images=coerce(row["images"], tuple[str, ...], "images"),
                label=coerce(row["label"], str | None, "label"),
                patient=coerce(row["patient"], str, "patient"),
            )
            for row in read_json(str(path))["val"]
        ]
        outside = next((case.id for case in cases if not is_entry_name(case.id)), None)
        if outside is not None or not all(case.images for case in cases):
            raise ValueError("a case without images" if outside is None else f"the id {cut(outside)!r}")
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise DataError(f"{path} is no split that mim3d wrote ({error!r}); name the scans with --input.") from error
    if not cases:
        raise DataError(f"{run} held no case out; name the scans with --input.")
    return cases


def held_out_by_all(runs: Sequence[str]) -> list[Case]:
    """The cases that every one of some runs held out, see ``held_out_cases``.

    Raises:
        ConfigError: Runs that held out different cases, so that one learned from what another is tested on.
        DataError: A run that holds no split, or held out nothing.
    """
    first, *others = [held_out_cases(Path(run)) for run in runs]
    for cases, run in zip(others, runs[1:], strict=True):
        if {case.images for case in cases} != {case.images for case in first}:
            raise ConfigError(
                f"{runs[0]} and {run} held out different cases, so each may have learned from cases of the other; "
                "predict with one run at a time, or name new scans with --input."
            )
    return first
