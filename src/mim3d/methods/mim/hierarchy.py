"""MiM's hierarchy of volumes: levels, masking units, and where children are cut (METHOD: Mask in Mask).

Every level is cut into units: the footprint of the next level, or single tokens at the last. A unit is hidden or
visible as a whole, and every child is cut from a hidden unit of its parent. Levels that nobody gave are planned from
the token size and the scans' shapes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mim3d.backbones.contract import check_multiple, size_text
from mim3d.core.errors import ConfigError
from mim3d.core.names import number_of
from mim3d.core.types import Triple
from mim3d.methods.crops import by_text, check_crop, median_shape, padding_ratio
from mim3d.nn.tokens import draw_hidden_units, num_hidden, unit_index, unit_mask
from mim3d.nn.volumes import token_grid

MAX_LEVELS = 4

#: A planned hierarchy pads at most this share of a crop, averaged over the scans.
PLANNED_PADDING = 0.25


@dataclass(frozen=True, kw_only=True)
class Level:
    """One level of a hierarchy.

    Attributes:
        name: Used in logs (``loss/coarse``).
        footprint: Voxels of the scan that one volume covers.
        size: Voxels it is shown to the network as.
        mask_ratio: Hidden share of its units, half rounded up.
        num_children: Volumes of the next level cut from hidden units of each volume; 0 at the last level.
        loss_weight: Weight of its reconstruction.
    """

    name: str
    footprint: Triple
    size: Triple
    mask_ratio: float
    num_children: int = 0
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_weight < 0:
            raise ConfigError(f"{self.name} level: loss_weight ({self.loss_weight}) must be zero or more, such as 1.")


@dataclass(frozen=True)
class Geometry:
    """A level in numbers: what follows from the settings.

    Attributes:
        level: The settings.
        token_grid: Tokens along X, Y, Z.
        unit_grid: Masking units along X, Y, Z.
        num_volumes: Volumes of this level in one sample.
        source: Index of the ancestor level it is sliced from; None when it is read from the scan.
    """

    level: Level
    token_grid: Triple
    unit_grid: Triple
    num_volumes: int
    source: int | None

    @cached_property
    def tokens_per_unit(self) -> Triple:
        """Tokens of one unit along X, Y, Z."""
        x, y, z = (tokens // units for tokens, units in zip(self.token_grid, self.unit_grid, strict=True))
        return x, y, z

    @cached_property
    def num_units(self) -> int:
        """Masking units of one volume."""
        return math.prod(self.unit_grid)

    @cached_property
    def num_hidden_units(self) -> int:
        """Hidden units of one volume, the same for every volume."""
        return num_hidden(self.num_units, self.level.mask_ratio)

    @cached_property
    def num_hidden_tokens(self) -> int:
        """Hidden tokens of one volume, the same for every volume."""
        return self.num_hidden_units * math.prod(self.tokens_per_unit)


@dataclass(frozen=True)
class DrawnLevel:
    """The volumes of one level in one sample; ``n`` volumes, children of one parent side by side.

    Attributes:
        offsets: ``(n, 3)`` first voxel of each volume, from the first voxel of the root.
        hidden: ``(n, L)`` token masks.
        places: ``(n,)`` raster index of each volume's place among its parent's units (zeros at the root).
    """

    offsets: np.ndarray
    hidden: np.ndarray
    places: np.ndarray


class Hierarchy:
    """A checked sequence of levels, coarsest first.

    Args:
        levels: One to four levels.
        token_size: Voxels of one token of the encoder along X, Y, Z.
    Raises:
        ConfigError: Sizes do not fit each other (the sentence names sizes that do), or fewer units are hidden than
            children are asked for.
    """

    def __init__(self, levels: Sequence[Level], token_size: Triple) -> None:
        if not 1 <= len(levels) <= MAX_LEVELS or len({level.name for level in levels}) < len(levels):
            names = [level.name for level in levels]
            raise ConfigError(f"a hierarchy has 1 to {MAX_LEVELS} levels with different names, not {names}.")
        self.token_size = token_size
        geometries: list[Geometry] = []
        for index, level in enumerate(levels):
            child = levels[index + 1] if index + 1 < len(levels) else None
            geometries.append(_geometry(level, child, token_size, geometries))
        self.levels = tuple(geometries)

    @property
    def num_volumes(self) -> int:
        """Volumes of one sample, all levels together."""
        return sum(geometry.num_volumes for geometry in self.levels)

    def draw(self, rng: np.random.Generator) -> list[DrawnLevel]:
        """Draw the masks and the children of one sample; level by level, so every child lies in a hidden unit."""
        offsets, places = np.zeros((1, 3), dtype=np.int64), np.zeros(1, dtype=np.int64)
        drawn = []
        for geometry, child in zip(self.levels, (*self.levels[1:], None), strict=True):
            units = [draw_hidden_units(geometry.num_units, geometry.level.mask_ratio, rng) for _ in offsets]
            hidden = np.stack([unit_mask(unit, geometry.unit_grid, geometry.tokens_per_unit) for unit in units])
            drawn.append(DrawnLevel(offsets, hidden, places))
            if child is not None:
                chosen = [rng.permutation(unit)[: geometry.level.num_children] for unit in units]
                places = np.concatenate(chosen)
                corners = [unit_index(int(place), geometry.unit_grid) for place in places]
                parents = np.repeat(offsets, geometry.level.num_children, axis=0)
                offsets = parents + np.array(corners) * np.array(child.level.footprint)
        return drawn


def _geometry(level: Level, child: Level | None, token_size: Triple, above: Sequence[Geometry]) -> Geometry:
    check_multiple(level.size, token_size, f"{level.name} level: size")
    tokens = token_grid(level.size, token_size)
    unit_grid = tokens if child is None else _unit_grid(level, child, token_size)
    parent = above[-1] if above else None
    num_volumes = parent.num_volumes * parent.level.num_children if parent else 1
    native = [index for index, ancestor in enumerate(above) if ancestor.level.size == ancestor.level.footprint]
    geometry = Geometry(level, tokens, unit_grid, num_volumes, native[-1] if native else None)
    if not 0 < geometry.num_hidden_units < geometry.num_units:
        raise ConfigError(
            f"{level.name} level: mask_ratio {level.mask_ratio} hides {geometry.num_hidden_units} of "
            f"{geometry.num_units} units; at least one must be hidden and one visible."
        )
    if child is None and level.num_children:
        raise ConfigError(f"{level.name} level: num_children ({level.num_children}) must be 0, since no level follows.")
    if child is not None and not 1 <= level.num_children <= geometry.num_hidden_units:
        raise ConfigError(
            f"{level.name} level: num_children ({level.num_children}) must be between 1 and its "
            f"{geometry.num_hidden_units} hidden units (mask_ratio {level.mask_ratio} of "
            f"{geometry.num_units}); ask for fewer or hide more."
        )
    return geometry


def _unit_grid(level: Level, child: Level, token_size: Triple) -> Triple:
    units = []
    for axis, parent_voxels, child_voxels, size, edge in zip(
        "XYZ", level.footprint, child.footprint, level.size, token_size, strict=True
    ):
        if child_voxels <= 0 or parent_voxels % child_voxels:
            whole = max(1, parent_voxels // max(child_voxels, 1)) * child_voxels
            raise ConfigError(
                f"{level.name} level: footprint axis {axis} ({parent_voxels}) is not a multiple of the "
                f"{child.name} footprint ({child_voxels}); use {whole} for the parent."
            )
        num_units = parent_voxels // child_voxels
        step = num_units * edge
        if size % step:
            below = size // step * step
            fits = f"{below} or {below + step}" if below else f"{step}"
            raise ConfigError(
                f"{level.name} level: size axis {axis} ({size}) cuts a token at the edge of a {child.name} cell "
                f"({num_units} cells, tokens of {size_text(token_size)}); use {fits}."
            )
        units.append(num_units)
    return units[0], units[1], units[2]


def full_levels(token_size: Triple) -> tuple[Level, ...]:
    """The paper's three levels, in proportion to the token: 192/96/16 for tokens of 16, 64/32/8 for tokens of 8.

    Small tokens get four per axis instead of six: they are for small scans and small machines.
    """
    tokens = 6 if max(token_size) >= 16 else 4
    x, y, z = (tokens * edge for edge in token_size)
    return (
        Level(name="coarse", footprint=(2 * x, 2 * y, 2 * z), size=(x, y, z), mask_ratio=0.5, num_children=4),
        Level(name="middle", footprint=(x, y, z), size=(x, y, z), mask_ratio=0.6, num_children=4),
        Level(name="fine", footprint=token_size, size=(x, y, z), mask_ratio=0.5),
    )


def plan_levels(token_size: Triple, shapes: Sequence[Triple]) -> tuple[Level, ...]:
    """The deepest hierarchy that pads under a quarter of its crops, or the one that pads least.

    Scans that do not fill the coarsest of all levels get fewer, none of which is shown at more than twice its size.
    """
    plans = [full_levels(token_size)] if _holds_all_levels(token_size, shapes) else []
    # Small scans: shown as they are, cells of half the edge shown at twice their size, no third level (METHOD).
    per_axis = list(zip(median_shape(shapes), token_size, strict=True))
    x, y, z = (max(4, min(8, int(voxels / edge) // 2 * 2)) * edge for voxels, edge in per_axis)
    coarse = Level(name="coarse", footprint=(x, y, z), size=(x, y, z), mask_ratio=0.5, num_children=4)
    plans.append((coarse, Level(name="middle", footprint=(x // 2, y // 2, z // 2), size=(x, y, z), mask_ratio=0.6)))
    x, y, z = (max(2, min(6, round(voxels / edge))) * edge for voxels, edge in per_axis)
    plans.append((Level(name="middle", footprint=(x, y, z), size=(x, y, z), mask_ratio=0.6),))
    for levels in plans:
        if padding_ratio(levels[0].footprint, shapes) < PLANNED_PADDING:
            return levels
    return min(plans, key=lambda levels: padding_ratio(levels[0].footprint, shapes))


def why_fewer_levels(levels: Sequence[Level], token_size: Triple, shapes: Sequence[Triple]) -> list[str]:
    """One line where a hierarchy is the plan for scans that are too small for all levels; none for any other."""
    full = full_levels(token_size)
    if len(levels) >= len(full) or tuple(levels) != plan_levels(token_size, shapes):
        return []
    return [
        f"planned {number_of(len(levels), 'level')}, not {len(full)}: the scans have {by_text(median_shape(shapes))} "
        f"voxels (median), and {len(full)} levels need {by_text(full[0].footprint)} for tokens of "
        f"{by_text(token_size)}; a level that exceeds the scans, or shows so little of them so large, stays idle"
    ]


def _holds_all_levels(token_size: Triple, shapes: Sequence[Triple]) -> bool:
    """Whether the median scan fills three quarters of the coarsest level along every axis."""
    footprint = full_levels(token_size)[0].footprint
    return all(4 * scan >= 3 * voxels for scan, voxels in zip(median_shape(shapes), footprint, strict=True))


def check_padding(levels: Sequence[Level], token_size: Triple, shapes: Sequence[Triple]) -> None:
    """Refuse a hierarchy that is mostly padding.

    Raises:
        ConfigError: Above ``MAX_PADDING``, with a hierarchy that fits or the smallest scan it would need.
    """
    fitting = plan_levels(token_size, shapes)
    fits = f"a hierarchy that fits is {describe_levels(fitting)} (leave method.levels out to have it planned)"
    tokens = f"tokens: scans this small hold fewer than 2 tokens of {size_text(token_size)} voxels per axis"
    check_crop(
        "method.levels", levels[0].footprint, fitting[0].footprint, shapes, otherwise=f"use smaller {tokens}", fits=fits
    )


def describe_levels(levels: Sequence[Level]) -> str:
    """Footprints and sizes of a hierarchy in one line."""
    return ", ".join(f"{level.name} {by_text(level.footprint)} shown as {by_text(level.size)}" for level in levels)
