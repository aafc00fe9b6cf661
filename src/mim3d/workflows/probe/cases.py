"""The labelled scans of a probe: the cases, the targets of the classifiers, and the split."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mim3d.backbones.contract import Encoder
from mim3d.caching.build import build_cache
from mim3d.caching.cache import Cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import DataError, listed
from mim3d.core.names import number_of
from mim3d.core.progress import counted
from mim3d.core.types import Spacing, Triple
from mim3d.datasets.cases import Case, CaseSet
from mim3d.datasets.splits import Split
from mim3d.phantoms.dataset import PhantomSettings, make_set
from mim3d.probing.items import ProbeSet, class_set, label_set
from mim3d.probing.settings import Probing
from mim3d.scans.intensity import Intensity
from mim3d.workflows.shared.damage import damaged_rows
from mim3d.workflows.shared.held_out import choose_split
from mim3d.workflows.shared.inputs import given_scans, read_data, require_all, unreadable_of

#: What stands for a set of phantoms in place of DATA.
PHANTOM = "phantom"

#: The phantoms made for it: chest and belly in eight labels.
PHANTOMS = PhantomSettings(num_cases=15, size=(96, 96, 80), seed=0)

Target = Literal["labels", "classes"]


@dataclass(frozen=True)
class ProbeCases:
    """Labelled cases, before anything is prepared.

    Attributes:
        source: The data set or cache they belong to.
        target: What is classified: tokens by their label, or scans by their class.
        split: The cases to learn from, and the cases to score on.
    Raises:
        DataError: A class has too few cases to be learned; the sentence names it.
    """

    source: CaseSet | Cache
    target: Target
    split: Split

    def __post_init__(self) -> None:
        if self.target == "classes":
            from mim3d.tasks.classification.task import Classification

            Classification().check_split(self.split)

    @property
    def cases(self) -> list[Case]:
        """Of both parts."""
        return [*self.split.train, *self.split.val]

    def prepared(
        self, folder: str | Path, spacing_mm: Spacing | None, *, num_workers: int | None, strict: bool
    ) -> Cache:
        """The cached scans: as they are where the source is a cache, else built in ``folder``.

        Those that could not be used are its failures.

        Raises:
            ConfigError: A cache of another spacing, or a folder that holds another cache.
            DataError: Scans that cannot be used, or damaged ones: all of one part, or with ``strict`` any.
        """
        if isinstance(self.source, Cache):
            scans = given_scans(self.source, self.cases, spacing_mm)
        else:
            wanted = replace(self.source, cases=tuple(self.cases))
            scans = build_cache(wanted, folder, Preprocessing(spacing_mm=spacing_mm), num_workers=num_workers)
            scans.say_remarks(strict=strict)
        failed = (*scans.failed, *damaged_rows(scans.scans))
        require_all(failed, strict=strict)
        unusable = {row["id"] for row in failed}
        self.split.without([case for case in self.cases if case.id in unusable])
        return replace(scans, scans=tuple(s for s in scans if s.case.id not in unusable), failed=failed)

    def items(
        self,
        scans: Cache,
        encoder: Encoder,
        intensity: Intensity,
        probing: Probing,
        *,
        seed: int = 0,
        largest: Triple | None = None,
    ) -> ProbeSet:
        """Crops of the prepared scans, and their labels or classes.

        Raises:
            ConfigError: A crop that does not fit the encoder.
            DataError: There are fewer than two classes.
        """
        training, held_out = scans.subset(self.split.train), scans.subset(self.split.val)
        if self.target == "classes":
            return class_set(training, held_out, encoder, intensity, probing, watch=_watch)
        parts = training, held_out, scans.labels
        return label_set(*parts, encoder, intensity, probing, seed=seed, largest=largest, watch=_watch)


def _watch(scans: Sequence[CachedScan]) -> Iterator[CachedScan]:
    return counted(scans, len(scans), "scans")


def read_source(data: str, folder: str | Path, *, strict: bool = False) -> CaseSet | Cache:
    """The data set or cache behind DATA; phantoms are made in ``folder``.

    Raises:
        DataError: No case can be used, or a list cannot be read; or with ``strict``, a case cannot be used.
    """
    if data != PHANTOM:
        return read_data(data, keep_labels=True, strict=strict)
    make_set(folder, PHANTOMS)
    return read_data(str(folder), keep_labels=True)


def labelled_cases(source: CaseSet | Cache, target: Target | None, data: str) -> tuple[Target, list[Case]]:
    """What is classified in a data set, and the cases that can be used for it.

    Args:
        source: The data set or cache.
        target: The target that was asked for; None takes what most cases have, label maps where as many have both.
        data: What the user calls it.
    Raises:
        DataError: No case has what is asked for.
    """
    has_map = {scan.case.id for scan in source if scan.has_label} if isinstance(source, Cache) else None
    usable: dict[Target, list[Case]] = {
        "labels": [c for c in source.cases if (c.label is not None if has_map is None else c.id in has_map)],
        "classes": [c for c in source.cases if c.class_name is not None],
    }
    # Label maps hold more information than a class where there are as many.
    most: Target = "labels" if len(usable["labels"]) >= len(usable["classes"]) else "classes"
    chosen = target or most
    found = usable[chosen]
    if not found:
        needs = "a label map" if target == "labels" else "a class" if target == "classes" else "a label map or a class"
        raise DataError(
            f"{data}: no scan has {needs} to probe features with; give a labelled data set, a list with the column "
            f"label or class, or {PHANTOM}."
        )
    ids = {case.id for case in found}
    missing = [case.id for case in source.cases if case.id not in ids and case.split != "test"]
    if missing:
        what = "label map" if chosen == "labels" else "class"
        without = number_of(len(missing), "scan", "are")
        warnings.warn(f"{without} left out for want of a {what}: {listed(missing)}.", stacklevel=2)
    return chosen, found


def choose_cases(
    source: CaseSet | Cache,
    data: str,
    target: Target | None,
    *,
    fold: int,
    num_folds: int,
    split_seed: int,
    held_out_list: str | None = None,
) -> ProbeCases:
    """Labelled cases of DATA, split as `mim3d finetune` splits them.

    Raises:
        ConfigError: A fold that does not exist.
        DataError: No labelled scans, or too few.
    """
    chosen, cases = labelled_cases(source, target, data)
    unreadable = [each for each in unreadable_of(source) if chosen == "classes" or each.label is not None]
    split = choose_split(
        cases,
        fold=fold,
        num_folds=num_folds,
        split_seed=split_seed,
        unreadable=unreadable,
        held_out_list=held_out_list,
    )
    return ProbeCases(source, chosen, split)
