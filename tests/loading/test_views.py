"""Views of one scan: the same crop under several keys, and many small crops under one, are read once each."""

import numpy as np
import pytest
import torch

from mim3d.caching import shards
from mim3d.caching.build import build_cache
from mim3d.caching.layout import FileRange
from mim3d.caching.preprocessing import Preprocessing
from mim3d.datasets.cases import read_cases
from mim3d.loading.loader import Loader
from mim3d.loading.samples import Crop, Sample, SampleDataset
from mim3d.scans.intensity import Intensity
from tests.nifti import noise, write_nifti

INTENSITY = Intensity()
FULL = Crop((3, 5, 7), (40, 36, 32), (40, 36, 32))
REDUCED = Crop((4, 8, 0), (64, 48, 48), (32, 24, 24))
RESIZED = Crop((4, 8, 1), (30, 30, 30), (20, 20, 20))


class Fixed:
    """A sampler that draws one sample."""

    def __init__(self, sample):
        self.sample = sample

    def draw(self, scan, rng):
        return self.sample


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A labelled scan in a cache of three levels."""
    folder = tmp_path_factory.mktemp("views")
    write_nifti(folder / "data" / "images" / "a.nii.gz", noise((80, 70, 64)))
    write_nifti(folder / "data" / "labels" / "a.nii.gz", noise((80, 70, 64), seed=1).astype(np.uint8))
    return build_cache(read_cases(folder / "data"), folder / "cache", Preprocessing())


class Reads:
    """What is read of a cache: the ranges of its files, and the blocks that are unpacked."""

    def __init__(self, monkeypatch):
        self.ranges, self.num_blocks = [], 0
        pread, unpack = FileRange.pread, shards._unpack

        def counting_pread(file, offset, length):
            self.ranges.append((file.path, offset, length))
            return pread(file, offset, length)

        def counting_unpack(packed, place):
            self.num_blocks += 1
            unpack(packed, place)

        monkeypatch.setattr(FileRange, "pread", counting_pread)
        monkeypatch.setattr(shards, "_unpack", counting_unpack)

    def of(self, scans, **sample):
        """The sample, the ranges read for it, and the number of blocks."""
        self.ranges, self.num_blocks = [], 0
        read = SampleDataset(scans, Fixed(Sample(**sample)), INTENSITY, 0, None)[0]
        return read, self.ranges, self.num_blocks


@pytest.fixture
def reads(scans, monkeypatch):
    """Counts what is read, indices and metadata apart, which are remembered."""
    counted = Reads(monkeypatch)
    counted.of(scans, images={"a": (FULL,), "b": (REDUCED,)}, labels={"l": (FULL,)})
    return counted


@pytest.mark.parametrize("crop", [FULL, REDUCED, RESIZED])
@pytest.mark.parametrize("flips", [(False, False, False), (True, False, True)])
def test_a_crop_asked_for_under_two_keys_is_read_once(scans, reads, crop, flips):
    one, ranges, num_blocks = reads.of(scans, images={"student": (crop,)}, flips=flips)
    assert num_blocks > 0
    two, *again = reads.of(scans, images={"student": (crop,), "teacher": (crop, crop)}, flips=flips)
    assert again == [ranges, num_blocks]
    assert torch.equal(one["student"], two["student"])
    assert torch.equal(two["teacher"], torch.cat([one["student"]] * 2))


def test_labels_and_images_of_two_views_are_read_once(scans, reads):
    one, ranges, num_blocks = reads.of(scans, images={"a": (FULL,)}, labels={"la": (FULL,)})
    two, *again = reads.of(scans, images={"a": (FULL,), "b": (FULL,)}, labels={"la": (FULL,), "lb": (FULL,)})
    assert again == [ranges, num_blocks]
    assert torch.equal(two["lb"], one["la"])


def test_two_sizes_of_one_crop_are_read_once_unless_a_level_holds_one(scans, reads):
    large, small = Crop((2, 2, 2), (40, 40, 40), (40, 40, 40)), Crop((2, 2, 2), (40, 40, 40), (30, 30, 30))
    alone, ranges, num_blocks = reads.of(scans, images={"large": (large,)})
    both, *again = reads.of(scans, images={"large": (large,), "small": (small,)})
    assert again == [ranges, num_blocks]
    assert torch.equal(both["large"], alone["large"])
    reduced, *_ = reads.of(scans, images={"small": (small,)})
    assert torch.equal(both["small"], reduced["small"])


def test_many_small_crops_of_one_scan_share_their_blocks(scans, reads):
    origins = [(x, y, z) for x in (0, 7, 16) for y in (1, 20) for z in (0, 9, 24)]
    crops = tuple(Crop(origin, (8, 8, 8), (8, 8, 8)) for origin in origins)
    read, ranges, num_blocks = reads.of(scans, images={"small": crops})
    assert read["small"].shape == (18, 1, 8, 8, 8)
    # All of them lie in the first block.
    assert (len(ranges), num_blocks) == (1, 1)
    for crop, got in zip(crops, read["small"], strict=True):
        alone, *_ = reads.of(scans, images={"small": (crop,)})
        assert torch.equal(got, alone["small"][0])


def test_values_that_are_read_once_are_counted_once(scans):
    one, two = (
        SampleDataset(scans, Fixed(Sample(images=images, labels={"l": (FULL, FULL)})), INTENSITY, 0, None).num_values(0)
        for images in ({"a": (FULL,)}, {"a": (FULL,), "b": (FULL, FULL)})
    )
    assert one == two == 2 * 40 * 36 * 32


@pytest.mark.parametrize("num_workers", [0, 1])
def test_views_of_a_batch_are_tensors_of_their_own(scans, num_workers):
    sampler = Fixed(Sample(images={"student": (FULL,), "teacher": (FULL,)}))
    batches = Loader(scans, sampler, INTENSITY, batch_size=2, seed=0, num_workers=num_workers).batches(0)
    batch = next(batches)
    student, teacher = (batch[key].to("cpu") for key in ("student", "teacher"))
    assert student.shape == (2, 1, 1, 40, 36, 32)
    assert torch.equal(student, teacher)
    student += 1
    assert not torch.equal(student, teacher)
    batches.close()
