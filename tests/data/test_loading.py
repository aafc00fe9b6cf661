"""Crops become network input, from the pyramid where they fit it; reading processes end when the program does."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

from mim3d.data.cache import build_cache
from mim3d.data.cases import read_cases
from mim3d.data.loading import Read, Sample, SampleDataset, level_of
from mim3d.data.preprocessing import Preprocessing
from mim3d.data.transforms import Intensity, flip, resize_image
from tests.nifti import write_nifti

INTENSITIES = [Intensity(), Intensity(window=(-175.0, 250.0)), Intensity(kind="zscore", window=None)]
FLIPS = [(False, False, False), (True, False, True), (True, True, True)]

SCRIPT = """
    import os, signal, sys, time
    from mim3d.data.loading import Loader, Read, Sample
    from mim3d.data.transforms import Intensity
    from tests.scans import random_scan

    class Corner:
        def draw(self, scan, rng):
            return Sample(images={"image": (Read((0, 0, 0), (4, 4, 4), (4, 4, 4)),)})

    if __name__ == "__main__":
        loader = Loader([random_scan((8, 8, 8))], Corner(), Intensity(), batch_size=1, seed=0, num_workers=1)
        batches = loader.batches(0)
        next(batches)
        import multiprocessing
        worker = multiprocessing.active_children()[0]
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.5)
        print(worker.is_alive(), next(batches)["image"].shape[0], flush=True)
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
    assert done.stdout.strip() == "True 1", done.stderr


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
        Read((3, 4, 5), (20, 21, 22), (20, 21, 22)),
        Read((-5, 30, 50), (20, 20, 20), (20, 20, 20)),
        Read((4, 4, 4), (32, 32, 32), (16, 16, 16)),
        Read((4, 4, 4), (10, 20, 30), (16, 16, 16)),
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
    read = Read(origin, (edge,) * 3, (edge >> level,) * 3)
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
        (Read((0, 2, -4), (32, 32, 16), (16, 16, 8)), 1),
        (Read((0, 4, 8), (32, 32, 16), (8, 8, 4)), 2),
        (Read((0, 2, 8), (32, 32, 16), (8, 8, 4)), 0),
        (Read((1, 2, 4), (32, 32, 16), (16, 16, 8)), 0),
        (Read((0, 8, 8), (64, 64, 64), (8, 8, 8)), 0),
        (Read((0, 0, 0), (32, 32, 32), (32, 32, 32)), 0),
        (Read((0, 0, 0), (16, 16, 16), (32, 32, 32)), 0),
        (Read((0, 0, 0), (32, 32, 32), (16, 16, 32)), 0),
    ],
)
def test_a_crop_comes_from_the_level_whose_voxels_are_its_own(read, level):
    assert level_of(read, 3) == level
    assert level_of(read, 1) == 0


def test_outside_the_scan_a_level_is_padded_like_full_resolution(scans):
    got = loaded(scans["8-bit"], Read((-16, -8, 48), (32, 32, 32), (16, 16, 16)))
    assert (got[:, :8] == 0).all()
    assert (got[:, :, :4] == 0).all()
    assert (got[:, :, :, 7:] == 0).all()
    assert (got[:, 8:, 4:, :6] > 0).any()
