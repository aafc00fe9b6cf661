"""A coarse crop is the average of what full resolution shows: beside metal, at odd edges, in every kind of cache."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from mim3d.caching.build import build_cache
from mim3d.caching.cache import open_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.shards import write_array
from mim3d.datasets.cases import read_cases
from mim3d.loading.loader import Loader
from mim3d.loading.samples import Crop, Sample, SampleDataset
from mim3d.nn.volumes import resize_image
from mim3d.scans.intensity import Intensity
from tests.nifti import write_nifti

SHAPE = (45, 38, 31)
CT, ZSCORE = Intensity(), Intensity(kind="zscore", window=None)

#: Footprints that reach over every odd edge, lie inside, and lie before the first voxel.
PLACES = [(-8, -8, -8), (0, 0, 0), (12, 8, 4), (20, 16, 8), (28, 20, 12)]


class Fixed:
    """A sampler that draws one crop."""

    def __init__(self, crop, pyramid=True):
        self.sample = Sample(images={"image": (crop,)}, pyramid=pyramid)

    def draw(self, scan, rng):
        return self.sample


def crop_at(origin, level, edge=24):
    return Crop(origin, (edge,) * 3, (edge >> level,) * 3)


def loaded(scan, crop, intensity, pyramid=True):
    return SampleDataset([scan], Fixed(crop, pyramid), intensity, 0, None)[0]["image"][0]


def averaged(scan, crop, intensity):
    """What the network is shown in full resolution, averaged over whole blocks in double precision."""
    fine = loaded(scan, Crop(crop.origin, crop.footprint, crop.footprint), intensity)
    return resize_image(fine[None].double(), crop.size)[0]


def step(scan, intensity):
    """Network input of one step of what is stored."""
    return float(np.abs(intensity.rescaling(scan.stored_intensities, scan.statistics)[:, 0]).max())


def cached(folder, array, intensities, window=(-1000.0, 1000.0)):
    write_nifti(folder / "data" / "a.nii.gz", array)
    settings = Preprocessing(intensities=intensities, window=window)
    return build_cache(read_cases(folder / "data"), folder / "cache", settings)[0]


def ct(fractions=False):
    """A noisy CT with a metal screw, dense bone, and air that the scanner filled with -3024."""
    rng = np.random.default_rng(0)
    array = rng.normal(40, 200, SHAPE)
    array[20:22, 15:18] = 12000
    array[30:34, 20:24, 5:20] = rng.normal(1400, 500, (4, 4, 15))
    array[:3] = -3024
    array[-2:, -3:] = 3000
    return (array if fractions else np.rint(array)).astype(np.float32 if fractions else np.int16)


def mri(fractions=False):
    """A noisy MRI with a few bright vessels."""
    rng = np.random.default_rng(1)
    array = rng.gamma(4, 60, SHAPE)
    array[10:12, 10:12] = 9000
    return (array if fractions else np.rint(array)).astype(np.float32 if fractions else np.int16)


@pytest.fixture(scope="module", params=["ct lossless", "ct 8-bit", "ct fractions", "mri lossless", "mri 8-bit"])
def scan_and_intensity(request, tmp_path_factory):
    modality, stored = request.param.split()
    array = (ct if modality == "ct" else mri)(stored == "fractions")
    scan = cached(tmp_path_factory.mktemp("set"), array, "8-bit" if stored == "8-bit" else "lossless")
    return scan, CT if modality == "ct" else ZSCORE


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("origin", PLACES)
def test_a_coarse_crop_is_the_average_of_what_full_resolution_shows(scan_and_intensity, origin, level):
    scan, intensity = scan_and_intensity
    crop = crop_at(origin, level)
    assert scan.shows(level, (tuple(first >> level for first in origin), crop.size), intensity.bounds)
    error = (loaded(scan, crop, intensity) - averaged(scan, crop, intensity)).abs().max()
    # Half a step for each level's rounding, and another half where a bound of the window lies between two steps.
    assert error <= (0.5 * level + 0.5) * step(scan, intensity) + 1e-6


def test_levels_of_whole_numbers_are_rounded_and_nothing_else(tmp_path):
    scan = cached(tmp_path, ct(), "lossless")
    for origin in PLACES:
        shown = np.clip(scan.read(origin, (24,) * 3), -1000, 1000).astype(float)
        blocks = shown.reshape(1, 12, 2, 12, 2, 12, 2).mean(axis=(2, 4, 6))
        x, y, z = (first // 2 for first in origin)
        np.testing.assert_array_equal(scan.read((x, y, z), (12,) * 3, 1), np.rint(blocks))


@pytest.mark.parametrize("intensities", ["lossless", "8-bit"])
@pytest.mark.parametrize("intensity", [Intensity(window=(-175.0, 250.0)), ZSCORE])
def test_where_the_network_has_another_window_coarse_crops_come_from_full_resolution(tmp_path, intensities, intensity):
    scan = cached(tmp_path, ct(), intensities)
    assert scan.clips_like(CT.bounds)
    # What 8 bits hold is clipped already: a z-score clips nothing more.
    assert scan.clips_like(intensity.bounds) == (intensity is ZSCORE and intensities == "8-bit")
    for origin in PLACES:
        crop = crop_at(origin, 1)
        error = (loaded(scan, crop, intensity) - averaged(scan, crop, intensity)).abs().max()
        assert error <= (0.5 * step(scan, intensity) if scan.clips_like(intensity.bounds) else 0) + 1e-5


def test_a_cache_made_for_a_networks_window_is_read_from_its_levels(tmp_path):
    narrow = Intensity(window=(-175.0, 250.0))
    scan = cached(tmp_path, ct(), "lossless", narrow.window)
    assert scan.clips_like(narrow.bounds)
    assert not scan.clips_like(CT.bounds)
    # Full resolution is stored without loss whatever the window.
    assert scan.read((0, 0, 0), SHAPE).max() == 12000
    crop = crop_at((20, 16, 8), 1)
    error = (loaded(scan, crop, narrow) - averaged(scan, crop, narrow)).abs().max()
    assert error <= 0.5 * step(scan, narrow) + 1e-6


def as_made_before(scan):
    """The same scan in a cache of an earlier version: levels of stored numbers, odd edges of what lies inside."""
    image = scan.read((0, 0, 0), scan.shape).astype(float)
    for level in (1, 2):
        pad = [(0, 0), *((0, size % 2) for size in image.shape[1:])]
        padded = np.pad(image, pad, constant_values=np.nan)
        halves = [part for size in padded.shape[1:] for part in (size // 2, 2)]
        image = np.rint(np.nanmean(padded.reshape(1, *halves), axis=(2, 4, 6)))
        folder = os.path.join(scan.source, "image", str(level))
        os.rename(folder, f"{folder}.new")
        write_array(folder, image.astype(scan.dtype))
    return replace(scan, level_windows=None)


@pytest.mark.parametrize("intensities", ["lossless", "8-bit"])
def test_caches_made_before_give_the_same_and_use_the_levels_that_hold_it(tmp_path, intensities):
    old = as_made_before(cached(tmp_path, ct(), intensities))
    used = set()
    for level in (1, 2):
        for origin in [*PLACES, (32, 24, 16)]:
            crop = crop_at(origin, level, edge=16)
            used.add(old.shows(level, (tuple(first >> level for first in origin), crop.size), CT.bounds))
            error = (loaded(old, crop, CT) - averaged(old, crop, CT)).abs().max()
            assert error <= 0.5 * level * step(old, CT) + 1e-6
    assert used == ({True, False} if intensities == "8-bit" else {False})


def test_a_manifest_without_the_column_is_read(tmp_path):
    import pyarrow.parquet as pq

    scan = cached(tmp_path, ct(), "lossless")
    manifest = tmp_path / "cache" / "manifest.parquet"
    pq.write_table(pq.read_table(manifest).drop_columns(["level_windows"]), manifest)
    assert scan.level_windows == ((-1000.0, 1000.0),)
    assert open_cache(tmp_path / "cache")[0].level_windows is None


def test_scans_whose_levels_are_not_used_are_counted_and_the_remedy_is_named(tmp_path):
    scan = cached(tmp_path, ct(), "lossless")
    loaders = [
        Loader([scan], Fixed(crop_at((0, 0, 0), level)), intensity, batch_size=1, seed=0)
        for level, intensity in ((1, CT), (0, ZSCORE), (1, Intensity(window=(-175.0, 250.0))))
    ]
    sentences = [loader.slow_levels for loader in loaders]
    assert sentences[:2] == [None, None]
    assert "1 of 1 scans" in sentences[2]
    assert "--window -175 250" in sentences[2]
    old = Loader([replace(scan, level_windows=None)], Fixed(crop_at((0, 0, 0), 1)), CT, batch_size=1, seed=0)
    assert "new folder" in old.slow_levels


def test_padding_of_a_level_is_what_its_window_shows(tmp_path):
    scan = cached(tmp_path, ct(), "lossless", (-200.0, 300.0))
    assert (scan.read((-4, 0, 0), (4, 4, 4)) == -1024).all()
    assert (scan.read((-4, 0, 0), (4, 4, 4), 1) == -200).all()
    assert torch.equal(loaded(scan, crop_at((-48, 0, 0), 1), CT), torch.zeros(1, 12, 12, 12))
