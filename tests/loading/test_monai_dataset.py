"""A cache is a MONAI data set in one line."""

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, PersistentDataset, list_data_collate
from monai.transforms import Compose, RandFlipd, RandSpatialCropd

import mim3d
from mim3d.core.errors import ConfigError
from tests.caching.test_cache import built, make_set


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monai")
    return built(make_set(folder / "data", num_cases=3, shape=(40, 36, 20)), folder / "cache")


def test_items_are_whole_scans_in_source_units_with_their_place(cache):
    dataset = mim3d.CachedDataset(cache.path)
    assert isinstance(dataset, Dataset)
    assert len(dataset) == 3
    item, scan = dataset[1], cache[1]
    np.testing.assert_array_equal(item["image"], scan.read((0, 0, 0), scan.shape).astype(np.float32))
    np.testing.assert_array_equal(item["label"][0], scan.read_label((0, 0, 0), scan.shape))
    np.testing.assert_array_equal(item["image"].affine, scan.affine)
    assert (item["id"], item["patient"]) == (scan.case.id, scan.case.patient)


def test_monai_transforms_and_loaders_work_on_it(cache):
    transform = Compose(
        [RandSpatialCropd(["image", "label"], (16, 16, 16), random_size=False), RandFlipd("image", 0.5)]
    )
    loader = DataLoader(mim3d.CachedDataset(cache, transform), batch_size=3, collate_fn=list_data_collate)
    batch = next(iter(loader))
    assert batch["image"].shape == (3, 1, 16, 16, 16)
    assert batch["label"].dtype == torch.int32


def test_a_persistent_data_set_can_lie_on_top_of_it(cache, tmp_path):
    on_top = PersistentDataset(list(mim3d.CachedDataset(cache)), Compose([]), cache_dir=tmp_path)
    np.testing.assert_array_equal(on_top[0]["image"], mim3d.CachedDataset(cache)[0]["image"])


def test_crops_are_read_alone_and_lie_where_they_say(cache):
    dataset = mim3d.CachedDataset(cache, crop=(16, 12, 8))
    dataset.set_random_state(0)
    origins = set()
    for _ in range(5):
        item, scan = dataset[0], cache[0]
        assert item["image"].shape == (1, 16, 12, 8)
        moved = np.linalg.inv(scan.affine) @ item["image"].affine.numpy()
        origin = tuple(round(first) for first in moved[:3, 3])
        origins.add(origin)
        np.testing.assert_array_equal(item["image"], scan.read(origin, (16, 12, 8)).astype(np.float32))
        np.testing.assert_array_equal(item["label"][0], scan.read_label(origin, (16, 12, 8)))
    assert len(origins) > 1
    dataset.set_random_state(0)
    assert torch.equal(
        dataset[0]["image"], mim3d.CachedDataset(cache, crop=(16, 12, 8)).set_random_state(0)[0]["image"]
    )


def test_crops_larger_than_a_scan_cover_it(cache):
    item = mim3d.CachedDataset(cache, crop=(64, 64, 64))[0]
    assert item["image"].shape == (1, 64, 64, 64)
    np.testing.assert_array_equal(item["image"][0, :40, :36, :20], cache[0].read((0, 0, 0), cache[0].shape)[0])


def test_a_crop_without_a_size_is_refused(cache):
    with pytest.raises(ConfigError, match="three positive numbers"):
        mim3d.CachedDataset(cache, crop=(0, 4, 4))
