"""What is probed: views of scans that an encoder sees, and the items in them whose class is known."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mim3d.core.types import Triple

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Shape suffixes: n items of a view, N items of all views, F raw values per item, C channels.


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """A box of one scan as the encoder sees it, and its items: tokens, or the whole box as one.

    Attributes:
        load: Reads it, ``(C, X, Y, Z)`` float32 network input.
        tokens_n: Raster indices of its tokens; None for the mean over all of them, which is then the one item.
        classes_n: Class of each item.
        raw_nF: mean and deviation of each channel over each item's voxels: what needs no encoder.
        patient: Whose scan it is.
    """

    load: Callable[[], Tensor]
    tokens_n: Ints | None
    classes_n: Ints
    raw_nF: Floats
    patient: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeSet:
    """Views to learn from and to score on, apart by patient.

    Attributes:
        target: ``labels`` of tokens, or ``classes`` of whole scans.
        names: K classes, each of them among the items to learn from.
        training: Views to learn from.
        held_out: Views to score on.
        size: Voxels of every view.
        token_edge: Voxels per token edge.
        num_scans: Scans to learn from, and to score on.
        left_out: Names of classes without an item to learn from.
    """

    target: str
    names: tuple[str, ...]
    training: tuple[View, ...]
    held_out: tuple[View, ...]
    size: Triple
    token_edge: int
    num_scans: tuple[int, int]
    left_out: tuple[str, ...] = ()

    def counts(self) -> dict[str, tuple[int, int]]:
        """Items of each class to learn from, and to score on."""
        per_part = [Counter(classes_of(views).tolist()) for views in (self.training, self.held_out)]
        return {name: (per_part[0][place], per_part[1][place]) for place, name in enumerate(self.names)}

    def is_scored_as(self, other: "ProbeSet") -> bool:
        """Whether both score on the same items: the same tokens of the same crops, or the same scans."""
        if self.target == "labels" and (self.size, self.token_edge) != (other.size, other.token_edge):
            return False
        return self.names == other.names and [_key(view) for view in self.held_out] == [
            _key(view) for view in other.held_out
        ]

    def in_memory(self) -> "ProbeSet":
        """The same with every view read once and kept."""
        return replace(self, training=_kept(self.training), held_out=_kept(self.held_out))


def _key(view: View) -> tuple[str, list[int] | None, list[int]]:
    return view.patient, None if view.tokens_n is None else view.tokens_n.tolist(), view.classes_n.tolist()


def _kept(views: Sequence[View]) -> tuple[View, ...]:
    return tuple(replace(view, load=_Kept(view.load())) for view in views)


@dataclass(frozen=True, eq=False)
class _Kept:
    image: Tensor

    def __call__(self) -> Tensor:
        return self.image


def classes_of(views: Sequence[View]) -> Ints:
    """Classes ``(N,)`` of all items."""
    return np.concatenate([view.classes_n for view in views]) if views else np.empty(0, np.int64)


def raw_of(views: Sequence[View]) -> Floats:
    """Raw values ``(N, F)`` of all items."""
    return np.concatenate([view.raw_nF for view in views])


def patients_of(views: Sequence[View]) -> list[str]:
    """Whose item each is, ``(N,)``."""
    return [view.patient for view in views for _ in view.classes_n]
