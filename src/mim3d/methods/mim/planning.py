"""Hierarchies that fit the scans at hand: planned from the token size and the scans' shapes."""

from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np

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


def full_levels(patch_size: int) -> tuple[Level, ...]:
    """The paper's three levels, in proportion to the token: 192/96/16 for tokens of 16, 64/32/8 for tokens of 8.

    Small tokens get four per axis instead of six: they are for small scans and small machines.
    """
    tokens = 6 if patch_size >= 16 else 4
    size = tokens * patch_size
    return (
        Level(name="coarse", footprint=_cube(2 * size), size=_cube(size), mask_ratio=0.5, num_children=4),
        Level(name="middle", footprint=_cube(size), size=_cube(size), mask_ratio=0.6, num_children=4),
        Level(name="fine", footprint=_cube(patch_size), size=_cube(size), mask_ratio=0.5),
    )


def _candidates(patch_size: int, shapes: Sequence[Triple]) -> Iterator[tuple[Level, ...]]:
    yield full_levels(patch_size)
    # Small scans: shown as they are, cells of half the edge shown at twice their size, no third level (METHOD).
    typical = [median(axis) for axis in zip(*shapes, strict=True)]
    fitting = [max(4, min(8, int(voxels / patch_size) // 2 * 2)) * patch_size for voxels in typical]
    shown: Triple = (fitting[0], fitting[1], fitting[2])
    x, y, z = (size // 2 for size in shown)
    yield (
        Level(name="coarse", footprint=shown, size=shown, mask_ratio=0.5, num_children=4),
        Level(name="middle", footprint=(x, y, z), size=shown, mask_ratio=0.6),
    )
    flat = [max(2, min(6, round(voxels / patch_size))) * patch_size for voxels in typical]
    yield (
        Level(
            name="middle",
            footprint=(flat[0], flat[1], flat[2]),
            size=(flat[0], flat[1], flat[2]),
            mask_ratio=0.6,
        ),
    )


def plan_levels(patch_size: int, shapes: Sequence[Triple]) -> tuple[Level, ...]:
    """The deepest hierarchy that pads under a quarter of its crops, or the one that pads least."""
    plans = list(_candidates(patch_size, shapes))
    for levels in plans:
        if padding_ratio(levels[0].footprint, shapes) < PLANNED_PADDING:
            return levels
    return min(plans, key=lambda levels: padding_ratio(levels[0].footprint, shapes))


def check_padding(levels: Sequence[Level], patch_size: int, shapes: Sequence[Triple]) -> None:
    """Refuse a hierarchy that is mostly padding.

    Raises:
        ConfigError: above ``MAX_PADDING``, with a hierarchy that fits or the smallest scan it would need.
    """
    footprint = levels[0].footprint
    share = padding_ratio(footprint, shapes)
    if share <= MAX_PADDING:
        return
    fitting = plan_levels(patch_size, shapes)
    remedy = f"use smaller tokens: scans this small hold fewer than 2 tokens of {patch_size} voxels per axis"
    if padding_ratio(fitting[0].footprint, shapes) <= MAX_PADDING:
        remedy = f"a hierarchy that fits is {describe_levels(fitting)} (leave method.levels out to have it planned)"
    raise ConfigError(
        f"method.levels: {share:.0%} of every {_times(footprint)} crop would be padding, since the scans have "
        f"{_times(tuple(int(median(axis)) for axis in zip(*shapes, strict=True)))} voxels (median); {remedy}."
    )


def describe_levels(levels: Sequence[Level]) -> str:
    """Footprints and sizes of a hierarchy in one line."""
    return ", ".join(f"{level.name} {_times(level.footprint)} shown as {_times(level.size)}" for level in levels)


def _cube(edge: int) -> Triple:
    return edge, edge, edge


def _times(size: Sequence[int]) -> str:
    return "x".join(str(voxels) for voxels in size)
