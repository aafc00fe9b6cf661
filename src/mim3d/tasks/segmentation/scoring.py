"""Which labels and regions are scored, and the scoring of label maps case by case, in this process or in several."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.left_out import Failure
from mim3d.core.resources import available_memory_bytes, num_cores
from mim3d.core.settings import nearest
from mim3d.core.worker_processes import Ended, work_through
from mim3d.datasets.label_voxels import is_of_image
from mim3d.datasets.references import Pair, annotated_values
from mim3d.metrics import LabelScore, LesionSettings, score_regions, values_in
from mim3d.scans.volumes import read_grid, read_volume

#: Sets of fewer voxels are scored before processes have started.
SMALL_VOXELS = 2**25

#: Memory of a case for each of its voxels at most: both maps, and masks and surfaces of a label as large as the scan.
BYTES_PER_VOXEL = 24


@dataclass(frozen=True)
class ScoredNames:
    """What is scored, and what it is called.

    Attributes:
        regions: Name -> the label values that belong to it, single labels included. It is empty where nothing is
            declared or chosen; then every value that the maps hold is scored.
        labels: Label value -> name, of every value in the regions.
        unions: Those of the regions that were asked for as unions.
    """

    regions: Mapping[str, tuple[int, ...]]
    labels: Mapping[int, str]
    unions: Mapping[str, tuple[int, ...]]


def scored_names(
    declared: Mapping[int, str], labels: Sequence[str] | None, regions: Mapping[str, Sequence[int | str]]
) -> ScoredNames:
    """Resolve names and values against the declared labels.

    Args:
        declared: Label value -> name, possibly with the background.
        labels: Names or values to score; None for every declared one, or for none beside regions.
        regions: Unions to score: name -> values or names.

    Raises:
        ConfigError: A label is not declared, a region is empty, or one name stands for two things.
    """
    names = [name for value, name in declared.items() if value != 0]
    # Names are followed by their value where two labels share one: a table needs one row each.
    known = {
        value: name if names.count(name) == 1 else f"{name}_{value}" for value, name in declared.items() if value != 0
    }
    unions: dict[str, tuple[int, ...]] = {}
    for region, members in regions.items():
        if not members:
            raise ConfigError(f"regions.{region} is empty; name the labels that it is made of.")
        unions[region] = tuple(dict.fromkeys(_value(f"regions.{region}", member, known) for member in members))
    if labels is None:
        chosen = {} if unions else known
    elif not labels:
        raise ConfigError("labels is empty; name the labels to score, or leave it out to score every one.")
    else:
        asked = [_value("labels", label, known) for label in labels]
        chosen = {value: known.get(value, label_name(value)) for value in asked}
    twice = unions.keys() & set(chosen.values())
    if twice:
        raise ConfigError(f"regions and labels both hold {sorted(twice)[0]!r}; give the region another name.")
    values = sorted({value for members in unions.values() for value in members} - chosen.keys())
    return ScoredNames(
        regions={**unions, **{name: (value,) for value, name in chosen.items()}},
        labels={**chosen, **{value: known.get(value, label_name(value)) for value in values}},
        unions=unions,
    )


def chosen_lesions(lesions: bool | Sequence[str], names: Sequence[str]) -> frozenset[str] | None:
    """Return the names whose lesions are scored; None for all.

    Raises:
        ConfigError: A name is not scored.
    """
    if isinstance(lesions, bool):
        return None
    if not names:
        raise ConfigError("lesions names labels, but none is declared; name them with --labels too, or use true.")
    for name in lesions:
        if name not in names:
            raise ConfigError(f"lesions holds {name!r}, which is not scored.{nearest(name, names)}")
    return frozenset(lesions)


def _value(where: str, label: int | str, declared: Mapping[int, str]) -> int:
    text = str(label)
    named = [value for value, name in declared.items() if name == text]
    if named:
        return named[0]
    value = int(text) if text.isdigit() and len(text) < 10 else 0
    if value in declared or (value > 0 and not declared):
        return value
    known = nearest(text, declared.values()) if declared else " None is: give values from 1."
    raise ConfigError(f"{where} holds {text!r}, which is not declared.{known}")


@dataclass(frozen=True, kw_only=True)
class CaseScoring:
    """How the label maps of one case are scored.

    Attributes:
        regions: Name -> the label values that belong to it; empty to score each value that a map holds.
        allowed: Values that maps may hold; None for any.
        nsd_tolerance_mm: Distance in mm up to which two surfaces agree.
        lesions: When lesions match; None leaves them out.
        lesions_of: Names whose lesions are scored; None for all.
        ignore_label: Value of the reference's voxels that count in no score; both maps are background there.
        names: Declared label value -> name, by which a list of references names what it has annotations of.
    """

    regions: Mapping[str, tuple[int, ...]]
    allowed: frozenset[int] | None
    nsd_tolerance_mm: float
    lesions: LesionSettings | None
    lesions_of: frozenset[str] | None
    ignore_label: int | None = None
    names: Mapping[int, str] = field(default_factory=dict)

    def attempt(self, pair: Pair) -> dict[str, LabelScore] | Failure:
        """Score one case, by name; or say why it cannot be, whatever is raised: it must not stop the others."""
        try:
            return self.score(pair)
        except Exception as error:
            return Failure.of(error, pair.prediction or pair.reference)

    def score(self, pair: Pair) -> dict[str, LabelScore]:
        """Score one case, by name.

        Raises:
            DataError: A map cannot be read, or holds a value that is not allowed.
        """
        reference = read_volume(pair.reference, label=True, narrow=True)
        volumes = [reference] if pair.prediction is None else [read_volume(pair.prediction, label=True, narrow=True)]
        volumes.append(reference)
        held = set[int]()
        for volume in volumes:
            values = set(values_in(volume.array))
            if self.allowed is None and volume is reference and is_of_image(reference.array, len(values)):
                raise DataError(
                    f"{reference.grid.path}: holds {len(values)} values that neighbouring voxels seldom share, as "
                    "those of an image; give the label map as the reference."
                )
            values.discard(-1 if self.ignore_label is None else self.ignore_label)
            if self.allowed is not None and not values <= self.allowed:
                raise DataError(
                    f"{volume.grid.path}: holds label values that are not declared "
                    f"({listed(sorted(values - self.allowed))}; declared are {listed(sorted(self.allowed))}); correct "
                    "the map, or name the labels to score with --labels."
                )
            held |= values
        truth = reference.array
        prediction = np.zeros_like(truth) if pair.prediction is None else volumes[0].array
        if self.ignore_label is not None:
            known = truth != self.ignore_label
            prediction, truth = prediction * known, truth * known
        return score_regions(
            prediction,
            truth,
            reference.spacing_mm,
            self._known(pair, held),
            nsd_tolerance_mm=self.nsd_tolerance_mm,
            lesions=self.lesions,
            lesions_of=self.lesions_of,
        )

    def _known(self, pair: Pair, held: Collection[int]) -> Mapping[str, tuple[int, ...]]:
        """What is scored of a case: of labels that its reference has no annotations of, nothing is known."""
        regions = self.regions or {label_name(value): (value,) for value in sorted(held)}
        told = {int(each) for each in pair.labelled or () if each.isdigit()}
        values = annotated_values(pair, self.names or {value: label_name(value) for value in {*held, *told}})
        return {name: members for name, members in regions.items() if values is None or values.issuperset(members)}


def label_name(value: int) -> str:
    """Return the name of a label that has none."""
    return f"label_{value}"


def processes_for(pairs: Sequence[Pair], num_workers: int | None) -> int:
    """Return how many processes score: those asked for, else one per core as far as work and memory reach."""
    if num_workers is not None:
        return max(1, min(num_workers, len(pairs)))
    sizes = [int(np.prod(read_grid(pair.reference).ras_shape)) for pair in pairs]
    if sum(sizes) < SMALL_VOXELS:
        return 1
    fitting = (available_memory_bytes() or 2**63) // (max(sizes) * BYTES_PER_VOXEL)
    return max(1, min(num_cores(), len(pairs), fitting))


def score_cases(
    pairs: Sequence[Pair], scoring: CaseScoring, num_workers: int
) -> Iterator[tuple[Pair, dict[str, LabelScore] | Failure]]:
    """Score cases; each with its scores by name, or why it has none, in the order in which they are done.

    Args:
        pairs: The cases.
        scoring: What is scored, and how.
        num_workers: Number of processes; 1 works in this one.

    Raises:
        DataError: Processes cannot be started, or end at every case.
    """
    if num_workers <= 1 or len(pairs) <= 1:
        yield from ((pair, scoring.attempt(pair)) for pair in pairs)
        return
    with closing(work_through(pairs, scoring.attempt, num_workers, place=os.path.dirname(pairs[0].reference))) as work:
        for pair, answer in work:
            if isinstance(answer, Ended):
                answer = Failure(f"{pair.prediction or pair.reference}: the process that scored it {answer}.")
            yield pair, answer
