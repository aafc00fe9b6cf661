"""Crops become network input, from the pyramid where they fit it, the same under any number of reading processes."""

import gc
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pytest
import torch

from mim3d.caching.build import build_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import DamagedError, Mim3dError
from mim3d.datasets.cases import read_cases
from mim3d.loading.loader import Loader
from mim3d.loading.samples import MAX_DAMAGED_IN_A_ROW, Crop, Sample, SampleDataset, level_of
from mim3d.loading.stored_images import StoredImages
from mim3d.nn.volumes import flip, resize_image
from mim3d.scans.intensity import Intensity
from tests.array_scans import ArrayScan
from tests.batches import on_cpu
from tests.nifti import write_nifti

INTENSITIES = [Intensity(), Intensity(window=(-175.0, 250.0)), Intensity(kind="zscore", window=None)]
FLIPS = [(False, False, False), (True, False, True), (True, True, True)]

SCRIPT = """
    import os, signal, sys, time
    from mim3d.loading.loader import Loader
    from mim3d.loading.samples import Crop, Sample
    from mim3d.scans.intensity import Intensity
    from tests.array_scans import random_scan

    class Corner:
        def draw(self, scan, rng):
            return Sample(images={"image": (Crop((0, 0, 0), (4, 4, 4), (4, 4, 4)),)})

    if __name__ == "__main__":
        loader = Loader([random_scan((8, 8, 8))], Corner(), Intensity(), batch_size=1, seed=0, num_workers=1)
        batches = loader.batches(0)
        next(batches)
        import multiprocessing
        worker = multiprocessing.active_children()[0]
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.5)
        print(worker.is_alive(), len(next(batches)["image"].to("cpu")), time.monotonic(), flush=True)
"""


@pytest.mark.slow
def test_workers_outlive_a_schedulers_signal_and_never_keep_a_finished_program_waiting() -> None:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )
    alive, samples, last_s = done.stdout.split()
    assert (alive, samples) == ("True", "1")
    assert "Traceback" not in done.stderr
    # The interpreter does not wait for a worker that will not end by itself.
    assert time.monotonic() - float(last_s) < 5


class Fixed:
    """A sampler that draws one sample."""

    def __init__(self, sample):
        self.sample = sample

    def draw(self, scan, rng):
        return self.sample


def loaded(scan, read, intensity=INTENSITIES[0], **settings):
    """One crop as the loader gives it."""
    sample = Sample(images={"image": (read,)}, **settings)
    return SampleDataset([scan], Fixed(sample), intensity, 0, None)[0]["image"][0]


def by_steps(scan, read, intensity, flips=(False, False, False), gain=1.0, bias=0.0):
    """The same from full resolution, one map after the other."""
    values = scan.to_values(scan.read(read.origin, read.footprint))
    image = resize_image(torch.from_numpy(intensity.apply(values, scan.statistics))[None], read.size)[0]
    return flip(image, flips) * gain + bias


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A noisy CT of two channels, stored without loss and in 8 bits."""
    folder = tmp_path_factory.mktemp("scans")
    rng = np.random.default_rng(0)
    for name in "ab":
        array = rng.normal(-100, 400, (50, 40, 61)).astype(np.int16)
        write_nifti(folder / f"{name}.nii.gz", np.clip(array, -1000, 1000))
    (folder / "list.csv").write_text("image\na.nii.gz;b.nii.gz\n")
    cases = read_cases(folder / "list.csv")
    return {
        name: build_cache(cases, folder / name, Preprocessing(intensities=name))[0] for name in ("lossless", "8-bit")
    }


@pytest.mark.parametrize("name", ["lossless", "8-bit"])
@pytest.mark.parametrize("intensity", INTENSITIES)
@pytest.mark.parametrize("flips", FLIPS)
def test_one_fused_map_gives_what_the_maps_give_one_after_the_other(scans, name, intensity, flips):
    for read in (
        Crop((3, 4, 5), (20, 21, 22), (20, 21, 22)),
        Crop((-5, 30, 50), (20, 20, 20), (20, 20, 20)),
        Crop((4, 4, 4), (32, 32, 32), (16, 16, 16)),
        Crop((4, 4, 4), (10, 20, 30), (16, 16, 16)),
    ):
        for gain, bias in ((1.0, 0.0), (1.1, -0.05), (-0.9, 0.02)):
            got = loaded(scans[name], read, intensity, flips=flips, gain=gain, bias=bias, pyramid=False)
            assert got.dtype == torch.float32
            expected = by_steps(scans[name], read, intensity, flips, gain, bias)
            torch.testing.assert_close(got, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("flips", FLIPS)
@pytest.mark.parametrize(("edge", "origin", "level"), [(32, (2, 4, 6), 1), (40, (8, 0, 16), 2)])
def test_the_pyramid_gives_the_mean_of_full_resolution_within_one_grey_level(scans, flips, edge, origin, level):
    scan = scans["8-bit"]
    read = Crop(origin, (edge,) * 3, (edge >> level,) * 3)
    assert level_of(read, scan.num_levels) == level
    got = loaded(scan, read, flips=flips)
    expected = by_steps(scan, read, INTENSITIES[0], flips)
    assert got.shape == expected.shape
    # Each level is rounded by at most half a grey level.
    assert (got - expected).abs().max() <= (0.5 * level + 0.001) / 255
    assert not torch.equal(got, expected)
    torch.testing.assert_close(loaded(scan, read, flips=flips, pyramid=False), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("read", "level"),
    [
        (Crop((0, 2, -4), (32, 32, 16), (16, 16, 8)), 1),
        (Crop((0, 4, 8), (32, 32, 16), (8, 8, 4)), 2),
        (Crop((0, 2, 8), (32, 32, 16), (8, 8, 4)), 0),
        (Crop((1, 2, 4), (32, 32, 16), (16, 16, 8)), 0),
        (Crop((0, 8, 8), (64, 64, 64), (8, 8, 8)), 0),
        (Crop((0, 0, 0), (32, 32, 32), (32, 32, 32)), 0),
        (Crop((0, 0, 0), (16, 16, 16), (32, 32, 32)), 0),
        (Crop((0, 0, 0), (32, 32, 32), (16, 16, 32)), 0),
    ],
)
def test_a_crop_comes_from_the_level_whose_voxels_are_its_own(read, level):
    assert level_of(read, 3) == level
    assert level_of(read, 1) == 0


def test_outside_the_scan_a_level_is_padded_like_full_resolution(scans):
    got = loaded(scans["8-bit"], Crop((-16, -8, 48), (32, 32, 32), (16, 16, 16)))
    assert (got[:, :8] == 0).all()
    assert (got[:, :, :4] == 0).all()
    assert (got[:, :, :, 7:] == 0).all()
    assert (got[:, 8:, 4:, :6] > 0).any()


TYPES = (np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float32)


class Drawn:
    """A sampler of crops anywhere, flipped anyhow, with labels and arrays of their own."""

    def draw(self, scan, rng):
        def read(size):
            x, y, z = (int(rng.integers(-3, voxels - 3)) for voxels in scan.shape)
            return Crop((x, y, z), (8, 6, 4), size)

        return Sample(
            images={"near": (read((8, 6, 4)), read((8, 6, 4))), "far": (read((4, 3, 2)),)},
            labels={"label": (read((8, 6, 4)),)},
            arrays={"mask": rng.random((3, 7)) < 0.5, "place": rng.integers(9, size=2), "air": rng.random(1)},
            flips=tuple(rng.random(3) < 0.5),
            gain=rng.uniform(0.9, 1.1),
            bias=rng.uniform(-0.1, 0.1),
        )


class DamagedScan(ArrayScan):
    """Its header is sound, its voxels are not."""

    def read(self, origin, size, level=0):
        raise DamagedError(f"{self.name}/image: missing or damaged; run `mim3d cache` again.")


def numbered_scans(damaged=(), number=6):
    """Scans of every stored type, each of which is told by its intensities."""
    made = []
    for index in range(number):
        dtype = TYPES[index % len(TYPES)]
        rng = np.random.default_rng(index)
        image = rng.integers(20 * index, 20 * index + 10, (2, 12, 11, 10)).astype(dtype)
        label = rng.integers(0, 3, (12, 11, 10), dtype=np.uint8)
        kind = DamagedScan if index in damaged else ArrayScan
        made.append(kind(image, label, name=f"scan{index}"))
    return made


def loader_of(scans, num_workers, batch_size=3, **settings):
    intensity = Intensity(window=(0.0, 1000.0))
    return Loader(scans, Drawn(), intensity, batch_size=batch_size, seed=5, num_workers=num_workers, **settings)


def assert_same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert tensor.dtype == other[key].dtype
            assert torch.equal(tensor, other[key]), key


def noisy(sample, seed):
    """An augmentation."""
    noise = torch.rand(sample["near"].shape, generator=torch.Generator().manual_seed(seed))
    return {**sample, "near": sample["near"] + noise}


@pytest.mark.parametrize("augment", [None, noisy])
def test_batches_are_the_same_bits_under_any_number_of_workers_and_wherever_they_begin(augment):
    scans = numbered_scans()
    batches = [on_cpu(loader_of(scans, workers, augment=augment).batches(0), 7) for workers in range(4)]
    for others in batches[1:]:
        assert_same(batches[0], others)
    assert batches[0][0]["near"].shape == (3, 2, 2, 8, 6, 4)
    assert batches[0][0]["far"].shape == (3, 1, 2, 4, 3, 2)
    assert batches[0][0]["label"].shape == (3, 1, 8, 6, 4)
    assert not torch.equal(batches[0][0]["near"], batches[0][2]["near"])
    for workers in (0, 2):
        loader = loader_of(scans, workers, augment=augment)
        assert_same(batches[0][3:5], on_cpu(loader.batches(9), 2))
        for rank in range(2):
            assert_same(batches[0][rank:6:2], on_cpu(loader.batches(0, rank=rank, world_size=2), 3))


def test_a_batch_is_what_the_data_set_gives_sample_by_sample():
    loader = loader_of(numbered_scans(), 2)
    samples = [loader.dataset[index] for index in range(3)]
    (batch,) = on_cpu(loader.batches(0), 1)
    assert_same([batch], [{key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_travel_as_they_are_stored_unless_they_are_resized_or_augmented(num_workers):
    scans = numbered_scans(number=1)
    batch = next(loader_of(scans, num_workers).batches(0))
    assert isinstance(batch["near"], StoredImages)
    assert batch["near"].numbers.dtype == torch.uint8
    assert batch["far"].numbers.dtype == torch.float32
    augmented = next(loader_of(scans, num_workers, augment=noisy).batches(0))
    assert augmented["near"].dtype == torch.float32


def test_reading_processes_end_with_the_iterator():
    before = set(multiprocessing.active_children())
    batches = loader_of(numbered_scans(), 3).batches(0)
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 3
    del batches
    gc.collect()
    assert not set(multiprocessing.active_children()) - before


def test_the_next_scan_stands_in_for_a_damaged_one_which_is_named_once():
    sound, damaged = numbered_scans(), numbered_scans(damaged=(1, 4))
    found = []
    for num_workers in range(4):
        loader = loader_of(damaged, num_workers)
        with pytest.warns(UserWarning) as warned:
            found.append(on_cpu(loader.batches(0), 8))
            found[-1] += on_cpu(loader.batches(24), 2)
        texts = sorted(str(warning.message) for warning in warned)
        assert len(texts) == 2
        for text, name in zip(texts, ("scan1", "scan4"), strict=True):
            assert text.startswith(f"{name} is damaged")
            assert f"{name}/image: missing or damaged" in text
        assert_same(found[0], found[-1])
    whole = SampleDataset(sound, Drawn(), Intensity(window=(0.0, 1000.0)), 5, None)
    for index in range(12):
        order = [whole._scan_of(index, attempt).name for attempt in range(3)]
        stand_in = next(name for name in order if name not in ("scan1", "scan4"))
        (scan,) = (scan for scan in sound if scan.name == stand_in)
        expected = SampleDataset([scan], Drawn(), Intensity(window=(0.0, 1000.0)), 5, None)[index]
        got = {key: tensor[index % 3] for key, tensor in found[0][index // 3].items()}
        assert_same([got], [expected])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("number", [3, MAX_DAMAGED_IN_A_ROW + 20])
def test_where_every_scan_is_damaged_training_ends(num_workers, number):
    scans = numbered_scans(damaged=range(number), number=number)
    with warnings.catch_warnings(), pytest.raises(DamagedError, match="missing or damaged"):
        next(loader_of(scans, num_workers).batches(0))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_strict_loader_ends_at_the_first_damaged_scan(num_workers):
    loader = loader_of(numbered_scans(damaged=(2,)), num_workers, batch_size=1, strict=True)
    order = [loader.dataset._scan_of(index).name for index in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = loader.batches(0)
        if order.index("scan2"):
            assert len([next(batches) for _ in range(order.index("scan2"))]) == order.index("scan2")
        with pytest.raises(DamagedError, match="scan2/image"):
            next(batches)


class HungScan(ArrayScan):
    """Its disk has stopped to answer."""

    def read(self, origin, size, level=0):
        time.sleep(600)


def test_a_disk_that_does_not_answer_is_told_of_with_the_scan():
    scans = numbered_scans()
    order = [loader_of(scans, 1).dataset._scan_of(index).name for index in range(6)]
    scans[int(order[4][-1])].__class__ = HungScan
    batches = loader_of(scans, 2, batch_size=1, timeout_s=1.0).batches(0)
    for _ in range(4):
        next(batches)
    with pytest.raises(Mim3dError, match=rf"has been at scan {order[4]} for 0.0167 min"):
        next(batches)
