"""What "mask in mask" has to mean: spatial masks, children cut from hidden places, settings that fit or say why."""

from dataclasses import replace

import numpy as np
import pytest

from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.methods.crops import padding_ratio
from mim3d.methods.mim.hierarchy import (
    Hierarchy,
    Level,
    check_padding,
    full_levels,
    plan_levels,
    why_fewer_levels,
)
from mim3d.nn.tokens import unit_index

TOKEN = (16, 16, 16)
SMALL_TOKEN = (8, 8, 8)
PAPER = full_levels(TOKEN)
NON_CUBIC = (
    Level(name="coarse", footprint=(64, 96, 32), size=(64, 48, 32), mask_ratio=0.5, num_children=3),
    Level(name="middle", footprint=(32, 32, 16), size=(32, 32, 32), mask_ratio=0.6, num_children=2),
    Level(name="fine", footprint=(16, 8, 8), size=(32, 32, 32), mask_ratio=0.5),
)
FOUR = (
    Level(name="whole", footprint=(384, 384, 384), size=(96, 96, 96), mask_ratio=0.5, num_children=1),
    *PAPER,
)


def test_the_papers_hierarchy_is_1_4_16_volumes_with_4_and_130_hidden_places() -> None:
    hierarchy = Hierarchy(PAPER, TOKEN)
    assert [geometry.num_volumes for geometry in hierarchy.levels] == [1, 4, 16]
    assert [geometry.num_hidden_units for geometry in hierarchy.levels] == [4, 130, 108]
    assert hierarchy.levels[0].tokens_per_unit == (3, 3, 3)
    assert [geometry.source for geometry in hierarchy.levels] == [None, None, 1]


@pytest.mark.parametrize(
    ("levels", "token_size"),
    [
        (PAPER, TOKEN),
        (full_levels(SMALL_TOKEN), SMALL_TOKEN),
        (NON_CUBIC, SMALL_TOKEN),
        (FOUR, TOKEN),
        (PAPER[1:], TOKEN),
        (full_levels((16, 16, 4)), (16, 16, 4)),
    ],
)
def test_every_child_is_cut_from_a_hidden_place_all_of_it(levels: tuple[Level, ...], token_size: Triple) -> None:
    hierarchy = Hierarchy(levels, token_size)
    for seed in range(20):
        drawn = hierarchy.draw(np.random.default_rng(seed))
        for geometry, parent, child_geometry, child in zip(
            hierarchy.levels, drawn, hierarchy.levels[1:], drawn[1:], strict=False
        ):
            for index, (offset, place) in enumerate(zip(child.offsets, child.places, strict=True)):
                owner = index // geometry.level.num_children
                voxels = np.array(child_geometry.level.footprint)
                tokens_per_voxel = np.array(geometry.token_grid) / np.array(geometry.level.footprint)
                start = (offset - parent.offsets[owner]) * tokens_per_voxel
                stop = (offset - parent.offsets[owner] + voxels) * tokens_per_voxel
                x, y, z = (slice(int(first), int(last)) for first, last in zip(start, stop, strict=True))
                covered = parent.hidden[owner].reshape(geometry.token_grid)[x, y, z]
                assert covered.size and covered.all()
                corner = np.array(unit_index(int(place), geometry.unit_grid)) * voxels
                assert (parent.offsets[owner] + corner == offset).all()


@pytest.mark.parametrize("levels", [PAPER, FOUR])
def test_the_number_hidden_is_the_same_for_every_volume_and_children_never_share_a_place(
    levels: tuple[Level, ...],
) -> None:
    hierarchy = Hierarchy(levels, TOKEN)
    for seed in range(10):
        drawn = hierarchy.draw(np.random.default_rng(seed))
        for geometry, level in zip(hierarchy.levels, drawn, strict=True):
            tokens_per_unit = np.prod(geometry.tokens_per_unit)
            assert (level.hidden.sum(1) == geometry.num_hidden_units * tokens_per_unit).all()
        for geometry, level in zip(hierarchy.levels, drawn[1:], strict=False):
            siblings = level.places.reshape(-1, geometry.level.num_children)
            assert all(len(set(row)) == len(row) for row in siblings.tolist())


def test_more_children_than_hidden_places_are_refused() -> None:
    levels = (replace(PAPER[0], num_children=5), *PAPER[1:])
    with pytest.raises(ConfigError, match="num_children \\(5\\) must be between 1 and its 4 hidden units"):
        Hierarchy(levels, TOKEN)


@pytest.mark.parametrize(
    ("levels", "token_size", "sentence"),
    [
        (
            (replace(PAPER[1], num_children=0, size=(90, 96, 96)),),
            TOKEN,
            r"axis X \(90\) is not a multiple of stride 16; use 80 or 96",
        ),
        (
            (replace(PAPER[0], size=(80, 96, 96)), *PAPER[1:]),
            TOKEN,
            "cuts a token at the edge of a middle cell.*use 64 or 96",
        ),
        (
            (replace(PAPER[0], footprint=(100, 192, 192)), *PAPER[1:]),
            TOKEN,
            r"axis X \(100\) is not a multiple of the middle",
        ),
        ((replace(PAPER[2], num_children=1),), TOKEN, "must be 0, since no level follows"),
        ((replace(PAPER[2], mask_ratio=0.0),), TOKEN, "at least one must be hidden"),
        ((), TOKEN, "1 to 4 levels"),
        ((PAPER[2], PAPER[2]), TOKEN, "different names"),
        ((PAPER[2],), (16, 16, 36), r"axis Z \(96\) is not a multiple of stride 36; use 72 or 108"),
        (PAPER, (16, 16, 24), r"cuts a token at the edge of a fine cell \(6 cells, tokens of 16 x 16 x 24\); use 144"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_sizes_that_do(
    levels: tuple[Level, ...], token_size: Triple, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Hierarchy(levels, token_size)


def test_padding_is_the_share_of_the_crop_outside_the_scan() -> None:
    assert padding_ratio((10, 10, 10), [(10, 10, 5), (20, 20, 20)]) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("token_size", "shape", "names"),
    [
        (TOKEN, (512, 512, 200), ["coarse", "middle", "fine"]),
        (SMALL_TOKEN, (224, 224, 160), ["coarse", "middle", "fine"]),
        (SMALL_TOKEN, (36, 50, 36), ["coarse", "middle"]),
        ((4, 4, 4), (20, 20, 20), ["coarse", "middle"]),
        (SMALL_TOKEN, (24, 24, 24), ["middle"]),
        ((4, 4, 4), (44, 44, 8), ["middle"]),
        ((16, 16, 4), (512, 512, 60), ["coarse", "middle", "fine"]),
        (TOKEN, (512, 512, 177), ["coarse", "middle", "fine"]),
        (TOKEN, (512, 512, 160), ["coarse", "middle", "fine"]),
        (TOKEN, (512, 512, 128), ["coarse", "middle"]),
        (TOKEN, (512, 512, 80), ["coarse", "middle"]),
        (SMALL_TOKEN, (94, 94, 63), ["coarse", "middle", "fine"]),
    ],
)
def test_planned_hierarchies_fit_the_scans_and_small_scans_get_fewer_levels(
    token_size: Triple, shape: Triple, names: list[str]
) -> None:
    levels = plan_levels(token_size, [shape])
    hierarchy = Hierarchy(levels, token_size)
    assert [level.name for level in levels] == names
    assert padding_ratio(levels[0].footprint, [shape]) < 0.25
    if len(levels) < 3:
        for geometry in hierarchy.levels:
            upsampling = max(s / f for s, f in zip(geometry.level.size, geometry.level.footprint, strict=True))
            assert upsampling <= 2


def test_a_hierarchy_that_is_mostly_padding_is_refused_with_one_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"75% of every 64x64x64 crop would be padding.*coarse 32x48x32 shown as"):
        check_padding(full_levels(SMALL_TOKEN), SMALL_TOKEN, [(36, 50, 36)])


def test_fewer_levels_than_all_are_explained_in_one_line_and_levels_of_ones_own_are_not() -> None:
    shapes = [(36, 50, 36), (35, 51, 35)]
    (line,) = why_fewer_levels(plan_levels(SMALL_TOKEN, shapes), SMALL_TOKEN, shapes)
    assert line.startswith(
        "planned 2 levels, not 3: the scans have 35x50x35 voxels (median), and 3 levels need 64x64x64 for tokens of 8"
    )
    assert not why_fewer_levels(full_levels(SMALL_TOKEN), SMALL_TOKEN, shapes)
    assert not why_fewer_levels(NON_CUBIC[:2], SMALL_TOKEN, shapes)
    large = [(96, 96, 96)]
    assert not why_fewer_levels(plan_levels(SMALL_TOKEN, large), SMALL_TOKEN, large)
