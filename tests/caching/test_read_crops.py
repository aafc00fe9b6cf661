"""Crops that are read together share what they have in common, and the disk is told of them beforehand."""

import os
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mim3d.caching.layout import FileRange, names_in
from mim3d.core.errors import DamagedError
from tests.caching.test_cache import built, make_set

SHAPE = (70, 65, 40)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crops")
    return built(make_set(folder / "data", num_cases=1, shape=SHAPE), folder / "cache")[0]


@dataclass(frozen=True)
class Watched(FileRange):
    """Bytes that keep account of how they are read."""

    reads: list = field(default_factory=list, hash=False, compare=False)
    announced: list = field(default_factory=list, hash=False, compare=False)

    def pread(self, offset, length):
        self.reads.append((offset, length))
        return super().pread(offset, length)

    def will_need(self, offset, length):
        self.announced.append((offset, length))


def watched(scan, name):
    """The scan with one of its files watched."""
    members = {member: FileRange(os.path.join(scan.source, member)) for member in names_in(scan.source)}
    members[name] = Watched(members[name].path)
    return replace(scan, source=members), members[name]


corner = st.tuples(*[st.integers(-20, 80)] * 3)
extent = st.tuples(*[st.integers(1, 50)] * 3)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(boxes=st.lists(st.tuples(corner, extent), max_size=4))
def test_crops_read_together_equal_those_read_alone(scan, boxes):
    for crop, (origin, size) in zip(scan.read_crops(boxes), boxes, strict=True):
        np.testing.assert_array_equal(crop, scan.read(origin, size))


def test_what_neighbours_share_is_read_once(scan):
    boxes = [((0, 0, 0), (40, 40, 40)), ((30, 0, 0), (40, 40, 40))]
    sizes = []
    for together in (True, False):
        one, shard = watched(scan, "image/0/c/0/0/0/0")
        one.read_crops(boxes) if together else [one.read(*box) for box in boxes]
        sizes.append(sum(length for _, length in shard.reads))
    assert sizes[0] < 0.8 * sizes[1]


def test_the_disk_is_told_exactly_what_is_read_later(scan):
    boxes = [((-5, 10, 3), (30, 30, 30)), ((200, 0, 0), (8, 8, 8))]
    one, shard = watched(scan, "image/0/c/0/0/0/0")
    one.will_need(boxes)
    told = list(shard.announced)
    shard.reads.clear()
    one.read_crops(boxes)
    assert told == shard.reads != []


def test_what_is_missing_is_told_when_it_is_read(scan, tmp_path):
    lost = replace(scan, source=str(tmp_path))
    lost.will_need([((0, 0, 0), (8, 8, 8))])
    with pytest.raises(DamagedError):
        lost.read_crops([((0, 0, 0), (8, 8, 8))])


@pytest.mark.parametrize(
    ("origin", "size", "expected"),
    [
        ((0, 0, 0), SHAPE, 1.0),
        ((-70, 0, 0), (140, 65, 40), 0.5),
        ((100, 0, 0), (8, 8, 8), 0.0),
        ((60, 60, 30), (20, 10, 20), 0.125),
    ],
)
def test_the_share_of_foreground_is_told_without_a_voxel(scan, tmp_path, origin, size, expected):
    whole = replace(scan, source=str(tmp_path), foreground=np.full((3, 3, 2), 255, np.uint8))
    assert whole.foreground_ratio(origin, size) == pytest.approx(expected)


def test_the_share_of_foreground_is_close_to_that_of_the_voxels(scan):
    voxels = scan.read((0, 0, 0), scan.shape)[0] > -950
    assert scan.foreground_ratio((0, 0, 0), scan.shape) == pytest.approx(voxels.mean(), abs=0.002)
    assert scan.foreground_ratio((32, 32, 0), (32, 32, 32)) == pytest.approx(
        voxels[32:64, 32:64, :32].mean(), abs=0.002
    )
