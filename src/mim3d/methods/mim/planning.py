"""Hierarchies that fit the scans at hand: planned from the token size and the scans' shapes."""

from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np

from mim3d.backbones.contract import size_text
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.methods.mim.hierarchy import Level

#: A planned hierarchy pads at most this share of a crop, averaged over the scans.
PLANNED_PADDING = 0.25

#: More padding than this share is refused.
MAX_PADDING = 0.5


def padding_ratio(footprint: Triple, shapes: Sequence[Triple]) -> float:
    """Share of a crop of ``footprint`` voxels that lies outside the scan, averaged over scans of ``shapes``."""
    inside = np.minimum(np.array(footprint), np.array(shapes)) / np.array(footprint)
    return float(1 - inside.prod(axis=1).mean())


def full_levels(token_size: Triple) -> tuple[Level, ...]:
    """The paper's three levels, in proportion to the token: 192/96/16 for tokens of 16, 64/32/8 for tokens of 8.

    Small tokens get four per axis instead of six: they are for small scans and small machines.
    """
    tokens = 6 if max(token_size) >= 16 else 4
    size = _times(tokens, token_size)
    return (
        Level(name="coarse", footprint=_times(2, size), size=size, mask_ratio=0.5, num_children=4),
        Level(name="middle", footprint=size, size=size, mask_ratio=0.6, num_children=4),
        Level(name="fine", footprint=token_size, size=size, mask_ratio=0.5),
    )


def _candidates(token_size: Triple, shapes: Sequence[Triple]) -> Iterator[tuple[Level, ...]]:
    yield full_levels(token_size)
    # Small scans: shown as they are, cells of half the edge shown at twice their size, no third level (METHOD).
    typical = [median(axis) for axis in zip(*shapes, strict=True)]
    per_axis = list(zip(typical, token_size, strict=True))
    x, y, z = (max(4, min(8, int(voxels / edge) // 2 * 2)) * edge for voxels, edge in per_axis)
    yield (
        Level(name="coarse", footprint=(x, y, z), size=(x, y, z), mask_ratio=0.5, num_children=4),
        Level(name="middle", footprint=(x // 2, y // 2, z // 2), size=(x, y, z), mask_ratio=0.6),
    )
    x, y, z = (max(2, min(6, round(voxels / edge))) * edge for voxels, edge in per_axis)
    yield (Level(name="middle", footprint=(x, y, z), size=(x, y, z), mask_ratio=0.6),)


def plan_levels(token_size: Triple, shapes: Sequence[Triple]) -> tuple[Level, ...]:
    """The deepest hierarchy that pads under a quarter of its crops, or the one that pads least."""
    plans = list(_candidates(token_size, shapes))
    for levels in plans:
        if padding_ratio(levels[0].footprint, shapes) < PLANNED_PADDING:
            return levels
    return min(plans, key=lambda levels: padding_ratio(levels[0].footprint, shapes))


def check_padding(levels: Sequence[Level], token_size: Triple, shapes: Sequence[Triple]) -> None:
    """Refuse a hierarchy that is mostly padding.

    Raises:
        ConfigError: Above ``MAX_PADDING``, with a hierarchy that fits or the smallest scan it would need.
    """
    footprint = levels[0].footprint
    share = padding_ratio(footprint, shapes)
    if share <= MAX_PADDING:
        return
    fitting = plan_levels(token_size, shapes)
    remedy = f"use smaller tokens: scans this small hold fewer than 2 tokens of {size_text(token_size)} voxels per axis"
    if padding_ratio(fitting[0].footprint, shapes) <= MAX_PADDING:
        remedy = f"a hierarchy that fits is {describe_levels(fitting)} (leave method.levels out to have it planned)"
    raise ConfigError(
        f"method.levels: {share:.0%} of every {_by(footprint)} crop would be padding, since the scans have "
        f"{_by([int(median(axis)) for axis in zip(*shapes, strict=True)])} voxels (median); {remedy}."
    )


def describe_levels(levels: Sequence[Level]) -> str:
    """Footprints and sizes of a hierarchy in one line."""
    return ", ".join(f"{level.name} {_by(level.footprint)} shown as {_by(level.size)}" for level in levels)


def _times(factor: int, size: Triple) -> Triple:
    x, y, z = size
    return factor * x, factor * y, factor * z


def _by(size: Sequence[int]) -> str:
    return "x".join(str(voxels) for voxels in size)
