"""Where hierarchies lie: on the voxels of the resolution that their reduced level is read in, or anywhere."""

import numpy as np
import pytest
import torch

from mim3d.backbones.hybrid import Hybrid
from mim3d.caching.build import build_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import ConfigError
from mim3d.datasets.cases import read_cases
from mim3d.loading.samples import SampleDataset, level_of
from mim3d.methods.crops import MAX_DRAWS, draw_origin
from mim3d.methods.mim.hierarchy import Level
from mim3d.methods.mim.method import MiM
from mim3d.nn.volumes import flip, resize_image
from mim3d.scans.intensity import Intensity
from tests.array_scans import random_scan
from tests.nifti import write_nifti

BACKBONE = Hybrid(widths=(6, 12, 24), depths=(1, 1, 1), num_heads=2)

#: A hierarchy of reductions by 4 and by 2, then full resolution.
DEEP = (
    Level(name="whole", footprint=(64, 64, 64), size=(16, 16, 16), mask_ratio=0.5, num_children=2),
    Level(name="part", footprint=(32, 32, 32), size=(16, 16, 16), mask_ratio=0.5, num_children=2),
    Level(name="near", footprint=(16, 16, 16), size=(16, 16, 16), mask_ratio=0.5),
)


def drawn(shape, num_samples=40, **settings):
    """Samples of a scan."""
    sampler = MiM(**settings).planned(BACKBONE, [shape]).sampler(BACKBONE)
    return [sampler.draw(random_scan(shape), np.random.default_rng(seed)) for seed in range(num_samples)]


@pytest.mark.parametrize(("levels", "reductions"), [(None, {"coarse": 1}), (DEEP, {"whole": 2, "part": 1, "near": 0})])
@pytest.mark.parametrize("shape", [(90, 70, 81), (70, 64, 50), (65, 66, 67)])
def test_every_reduced_crop_lies_on_the_pyramid_under_every_flip(levels, reductions, shape):
    samples = drawn(shape, levels=levels)
    assert len({sample.flips for sample in samples}) == 8
    for sample in samples:
        for name, level in reductions.items():
            assert [level_of(read, 3) for read in sample.images[name]] == [level] * len(sample.images[name])


def test_origins_stay_where_they_were_allowed_and_reach_every_multiple():
    rng = np.random.default_rng(0)
    places = [draw_origin((100, 100, 20), ((20, 41, 0), (90, 60, 20)), (32, 32, 32), rng, 4) for _ in range(400)]
    assert {x for x, _, _ in places} == set(range(20, 59, 4))
    assert {y for _, y, _ in places} == {28, 32, 36, 40}
    assert {z for _, _, z in places} == {-12, -8, -4, 0}


def test_where_no_multiple_fits_the_one_below_is_taken_and_stays_inside():
    for size in range(32, 40):
        x, _, _ = draw_origin((size, 64, 64), ((size - 33, 0, 0), (size, 64, 64)), (32, 32, 32), _Rng(), 4)
        assert x % 4 == 0
        assert 0 <= x <= size - 32


class _Rng:
    """Draws the greatest number."""

    def integers(self, low, high):
        assert low < high
        return high - 1


def test_without_the_pyramid_hierarchies_are_drawn_as_they_always_were():
    shape = (90, 70, 81)
    for seed, sample in enumerate(drawn(shape, pyramid=False)):
        rng = np.random.default_rng(seed)
        rng.random(3)
        rng.uniform(-1, 1)
        rng.uniform(-1, 1)
        origin = tuple(int(rng.integers(0, voxels - 64 + 1)) for voxels in shape)
        assert sample.images["coarse"][0].origin == origin
        assert not sample.pyramid


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A noisy CT in 8 bits."""
    folder = tmp_path_factory.mktemp("stored")
    array = np.random.default_rng(0).normal(0, 300, (90, 70, 81)).clip(-1000, 1000)
    write_nifti(folder / "data" / "a.nii.gz", array.astype(np.int16))
    return build_cache(read_cases(folder / "data"), folder / "cache", Preprocessing())[0]


@pytest.mark.parametrize("levels", [None, DEEP])
def test_a_level_read_from_the_pyramid_is_the_mean_of_full_resolution_within_one_grey_level(stored, levels):
    method = MiM(levels=levels, intensity_gain=0.0, intensity_bias=0.0).planned(BACKBONE, [stored.shape])
    sampler = method.sampler(BACKBONE)
    differences = []
    for index in range(6):
        sample = sampler.draw(stored, np.random.default_rng((0, index)))
        batch = SampleDataset([stored], sampler, Intensity(), 0, None)[index]
        for name, reads in sample.images.items():
            for read, got in zip(reads, batch[name], strict=True):
                values = stored.to_values(stored.read(read.origin, read.footprint))
                image = torch.from_numpy(Intensity().apply(values, stored.statistics))
                expected = flip(resize_image(image[None], read.size)[0], sample.flips)
                differences.append(float((got - expected).abs().max()) * 255)
    assert 0.1 < max(differences) <= 1.001


def test_without_the_pyramid_crops_are_those_of_full_resolution(stored):
    method = MiM(pyramid=False, intensity_gain=0.0, intensity_bias=0.0, flip_prob=0.0).planned(BACKBONE, [stored.shape])
    sampler = method.sampler(BACKBONE)
    for index in range(10):
        (read,) = sampler.draw(stored, np.random.default_rng((0, index))).images["coarse"]
        image = Intensity().apply(stored.to_values(stored.read(read.origin, read.footprint)), stored.statistics)
        expected = resize_image(torch.from_numpy(image)[None], read.size)
        got = SampleDataset([stored], sampler, Intensity(), 0, None)[index]["coarse"]
        torch.testing.assert_close(got, expected, atol=3e-7, rtol=1e-6)


class HalfAir:
    """A scan with nothing in its upper half along X; its body box tells nothing of that."""

    shape = (192, 64, 64)
    body_box = ((0, 0, 0), shape)

    def __init__(self):
        self.asked = []

    def foreground_ratio(self, origin, size):
        self.asked.append((origin, size))
        return float(np.clip(96 - origin[0], 0, size[0]) / size[0])


def air_of(sample):
    """Air over the volumes that are read, counted afresh."""
    scan = HalfAir()
    return 1 - np.mean(
        [scan.foreground_ratio(r.origin, r.footprint) for reads in sample.images.values() for r in reads]
    )


def drawn_from_half(num_samples=60, **settings):
    sampler = MiM(**settings).planned(BACKBONE, [HalfAir.shape]).sampler(BACKBONE)
    scans = [HalfAir() for _ in range(num_samples)]
    samples = [sampler.draw(scan, np.random.default_rng(seed)) for seed, scan in enumerate(scans)]
    return samples, [len(scan.asked) // sum(len(reads) for reads in samples[0].images.values()) for scan in scans]


@pytest.mark.parametrize("levels", [None, DEEP])
def test_hierarchies_with_too_much_air_are_drawn_anew_and_their_air_is_told(levels):
    plain, draws = drawn_from_half(levels=levels, max_air=None)
    assert set(draws) == {1}
    samples, draws = drawn_from_half(levels=levels, max_air=0.5)
    for first, sample, number in zip(plain, samples, draws, strict=True):
        assert sample.arrays["air"].shape == (1,)
        assert sample.arrays["air"].dtype == np.float32
        # As stored: a flip must not make air of what is body.
        assert sample.arrays["air"][0] == pytest.approx(air_of(sample), abs=1e-6)
        if first.arrays["air"][0] <= 0.5:
            assert number == 1
            assert sample.images == first.images
        else:
            assert number > 1
    assert max(float(sample.arrays["air"][0]) for sample in plain) > 0.9
    assert max(float(sample.arrays["air"][0]) for sample in samples) <= 0.5


def test_where_air_cannot_be_avoided_the_draw_with_least_of_it_is_kept():
    samples, draws = drawn_from_half(20, max_air=0.0)
    for seed, (sample, number) in enumerate(zip(samples, draws, strict=True)):
        assert number <= MAX_DRAWS
        if sample.arrays["air"][0] > 0:
            assert number == MAX_DRAWS
        few = [drawn_with_seed(seed, limit) for limit in (0.5, 0.25)]
        assert all(sample.arrays["air"][0] <= other.arrays["air"][0] for other in few)
    again, _ = drawn_from_half(20, max_air=0.0)
    assert all(one.images == other.images for one, other in zip(samples, again, strict=True))
    assert {sample.arrays["air"][0] > 0 for sample in samples} == {True, False}


def drawn_with_seed(seed, max_air):
    sampler = MiM(max_air=max_air).planned(BACKBONE, [HalfAir.shape]).sampler(BACKBONE)
    return sampler.draw(HalfAir(), np.random.default_rng(seed))


def test_masks_belong_to_the_draw_that_was_kept():
    for sample in drawn_from_half(40, max_air=0.2)[0]:
        (root,) = sample.images["coarse"]
        for child, place in zip(sample.images["middle"], sample.arrays["place/middle"], strict=True):
            unit = np.unravel_index(int(place), (2, 2, 2))
            stored = [1 - u if flipped else u for u, flipped in zip(unit, sample.flips, strict=True)]
            assert child.origin == tuple(first + 32 * int(u) for first, u in zip(root.origin, stored, strict=True))


@pytest.mark.parametrize("max_air", [-0.1, 1.5])
def test_a_share_of_air_that_is_none_is_refused(max_air):
    with pytest.raises(ConfigError, match="max_air"):
        MiM(max_air=max_air)
