"""What a family of published weights is: how its files are known, what of them is ours, what its network expects."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mim3d.core.errors import CheckpointError
from mim3d.core.names import cut
from mim3d.core.types import Spacing
from mim3d.scans.intensity import Intensity
from mim3d.weights.states import HeldWeights, no_array, without_prefix_of

#: Tensors by name.
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ExpectedInput:
    """How the scans were prepared that a network learned from, as far as its authors say it.

    Attributes:
        modality: What made the scans: ``CT``, ``MR``, or words for several kinds; ``unknown`` where nobody says it.
        spacing_mm: Voxel size along X, Y, Z; None where there is no single one, or it is not known.
        spacing: The same in words, where there is no single one.
        orientation: Orientation of the axes of an array, or what is known of it.
        intensity: Mapping of intensities; None where mim3d has none such, or it is not known.
        values: The same in words, where mim3d has none such.
        channels: Channels of the input, in words; empty where tensors show them alone.
    """

    modality: str = "unknown"
    spacing_mm: Spacing | None = None
    spacing: str = "unknown"
    orientation: str = "unknown"
    intensity: Intensity | None = None
    values: str = "unknown"
    channels: str = ""

    def of_channels(self, number: int) -> "ExpectedInput":
        """The same with the number of channels that tensors show."""
        return replace(self, channels=self.channels or str(number))

    def rows(self) -> dict[str, str]:
        """What is known, in words, by what it is of."""
        return {
            "modality": self.modality,
            "voxel size": self.spacing if self.spacing_mm is None else f"{_numbers(self.spacing_mm)} mm",
            "orientation": self.orientation,
            "intensities": self._intensities(),
            "channels": self.channels or "unknown",
        }

    def _intensities(self) -> str:
        if self.intensity is None:
            return self.values
        if self.intensity.kind == "zscore" or self.intensity.window is None:
            return "z-score of each scan"
        low, high = self.intensity.window
        return f"{low:g} to {high:g} HU mapped to 0 to 1"

    def __str__(self) -> str:
        return ", ".join(f"{name} {said}" for name, said in self.rows().items())


def _numbers(values: Spacing) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _nothing(_: Any) -> None:
    return None


def _fit(_: Any, __: Any, ___: Any) -> str:
    return ""


def _no_settings(_: Any, __: Any) -> dict[str, Any]:
    return {}


def _unchanged(tensors: Tensors, _: HeldWeights) -> Tensors:
    return tensors


@dataclass(frozen=True, kw_only=True)
class Family:
    """A layout of weights, and what is known of all files that have it.

    Attributes:
        name: Name for people.
        anchors: Names of tensors that every encoder of the family has, without prefixes. What stands before the most of
            them is taken off.
        axes: Axes of the first anchor's tensor.
        marks: Patterns of paths (see :attr:`HeldWeights.paths`), of which a file has one each.
        absent: Patterns of paths that no file has.
        keys: Keys at the top of every file.
        encoder: Pattern with which names of the encoder begin.
        drops: Patterns of names that hold nothing learned, or the same a second time.
        renames: Patterns in names of the encoder, and what stands there in ours; one after the other.
        others: The same in names of all else.
        convert: Makes tensors of ours of those of the file, once they are renamed.
        last: Name, after renaming, that a file lacks if its end was lost.
        backbone: Name of our backbone that is the same network; empty for none.
        settings: The settings of that backbone which shapes show, or that the family fixes.
        settings_in_file: Settings that the file itself says, beside its tensors.
        open: Settings that change what is computed and that shapes do not show, unless these two give them.
        shown_by: Settings of which ``settings`` knows nothing where a file holds no tensor of a name, with its pattern.
        unfit: Says, as the end of a sentence, why an encoder of given settings, with its tensors, cannot be ours; empty
            where it can.
        expects: What its network expects of its input.
        expects_in_file: The same as the file itself says it; None where it does not.
        why_not: Why no backbone of ours is the network, where there is none.
        remark: What a user must know besides.
        licence: Terms of use; ``unknown`` where no one says them.
        commercial: False where the terms exclude commercial use.
        source: Where it was published.
    """

    name: str
    anchors: tuple[str, ...]
    source: str
    axes: int = 5
    marks: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    encoder: str = ""
    drops: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    convert: Callable[[Tensors, HeldWeights], Tensors] = _unchanged
    last: str = ""
    backbone: str = ""
    settings: Callable[[Tensors], dict[str, Any]] = dict
    settings_in_file: Callable[[Tensors, HeldWeights], dict[str, Any]] = _no_settings
    open: tuple[str, ...] = ()
    shown_by: tuple[tuple[str, str], ...] = ()
    unfit: Callable[[Mapping[str, Any], Tensors, HeldWeights], str] = _fit
    expects: ExpectedInput = ExpectedInput()
    expects_in_file: Callable[[HeldWeights], ExpectedInput | None] = _nothing
    why_not: str = ""
    remark: str = ""
    licence: str = "unknown"
    commercial: bool = True

    def lacks(self, held: HeldWeights) -> list[str]:
        """The signs of the family that a file lacks, in words; empty for a file of the family."""
        names, paths = set(_names_of(self, held)), held.paths
        first = self.anchors[0]
        prefixes = {name.removesuffix(first) for name in names if name == first or name.endswith(f".{first}")}
        whole = [prefix for prefix in prefixes if all(f"{prefix}{anchor}" in names for anchor in self.anchors)]
        missing: list[str] = []
        if not whole:
            found = {anchor for anchor in self.anchors if any(f".{name}".endswith(f".{anchor}") for name in names)}
            missing = [f"a tensor {anchor}" for anchor in self.anchors if anchor not in found]
            missing = missing or [f"{' and '.join(self.anchors)} under one prefix"]
        elif any(held.tensors[f"{prefix}{first}"].ndim != self.axes for prefix in whole):
            missing.append(f"{first} of {self.axes} axes")
        missing += [f"the key {key}" for key in self.keys if key not in held.beside]
        unmatched = [mark for mark in self.marks if not any(re.search(mark, path) for path in paths)]
        return missing + [
            "tensors as " + mark.replace(r"\b", "").replace("\\.", ".").lstrip("^:") for mark in unmatched
        ]

    def is_of(self, held: HeldWeights) -> bool:
        """Whether a file is of the family: it has every sign, and nothing that no file of it has."""
        return not self.lacks(held) and not any(re.search(one, path) for one in self.absent for path in held.paths)

    def nearness(self, held: HeldWeights) -> float:
        """Share of the family's signs that a file has, 0 to 1."""
        return 1 - len(self.lacks(held)) / len((*self.anchors, *self.keys, *self.marks))

    def own_tensors(self, held: HeldWeights) -> Tensors:
        """The tensors of a file by our names: ``encoder.*``, and all others as they are called there.

        Raises:
            CheckpointError: Some of the encoder's hold no plain numbers.
        """
        kept = {name: held.tensors[name] for name in _names_of(self, held)}
        bare = without_prefix_of(kept, self.anchors)
        inside: Tensors = {}
        outside: Tensors = {}
        for name, value in bare.items():
            if re.match(self.encoder, name):
                inside[_renamed(name, self.renames)] = value
            else:
                outside[_renamed(name, self.others)] = value
        if odd := [name for name, value in inside.items() if no_array(value)]:
            raise CheckpointError(
                f"{held.file} holds {no_array(inside[odd[0]])} in {len(odd)} of {len(inside)} tensors (first: "
                f"{cut(odd[0])}), which are not the plain numbers that a network learns; save the network as it was "
                "trained, in single or half precision."
            )
        return {f"encoder.{name}": value for name, value in self.convert(inside, held).items()} | outside


def _names_of(family: Family, held: HeldWeights) -> list[str]:
    return [name for name in held.tensors if not any(re.search(drop, name) for drop in family.drops)]


def _renamed(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name
