"""Stored numbers of every type become the same float32 on the device as on the way there."""

import numpy as np
import pytest
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device

from mim3d.caching.stored_voxels import INTEGER_TYPES, StoredIntensity
from mim3d.loading.stored_images import StoredCrops, StoredImages, pack
from mim3d.scans.intensity import Intensity
from tests.array_scans import statistics_of

LINES = (StoredIntensity(0.5, -20.0), StoredIntensity(2.0, 100.0))


def crop_of(dtype, seed=0):
    """Two channels over all numbers of a type."""
    limits = np.iinfo(dtype)
    numbers = np.random.default_rng(seed).integers(limits.min, limits.max, (2, 4, 5, 6), dtype=dtype, endpoint=True)
    numbers[0, 0, 0, :2] = limits.min, limits.max
    return numbers


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
@pytest.mark.parametrize("kind", ["window", "zscore"])
def test_every_stored_type_becomes_what_its_values_become(dtype, kind):
    crop = crop_of(dtype)
    values = np.stack([channel * line.scale + line.offset for channel, line in zip(crop, LINES, strict=True)])
    statistics = [statistics_of(channel) for channel in values]
    low, high = (float(np.percentile(values, percent)) for percent in (20, 80))
    intensity = Intensity(kind=kind, window=(low, high) if kind == "window" else None)
    sample = {"image": StoredCrops([crop, crop[:, ::-1]], intensity.rescaling(LINES, statistics, gain=1.1, bias=-0.02))}
    images = pack([sample, sample], np.empty)["image"].unpacked()
    assert isinstance(images, StoredImages)
    assert images.numbers.element_size() == np.dtype(dtype).itemsize
    got = images.to("cpu")
    expected = torch.from_numpy(intensity.apply(values, statistics)) * 1.1 - 0.02
    assert got.shape == (2, 2, 2, 4, 5, 6)
    assert got.dtype == torch.float32
    for one in got:
        torch.testing.assert_close(one[0], expected, atol=3e-6, rtol=1e-5)
        torch.testing.assert_close(one[1], expected.flip(1), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("others", [(np.int16,), (np.uint16, np.int16), (np.int32, np.uint32), (np.float32, np.uint8)])
def test_a_batch_of_several_types_holds_the_same_bits_as_each_sample_alone(others):
    rescaling = Intensity().rescaling(LINES, [statistics_of(np.zeros(1))] * 2)
    crops = [crop_of(np.uint8)]
    crops += [crop_of(t) if t is not np.float32 else np.random.rand(2, 4, 5, 6).astype(t) for t in others]
    samples = [{"image": StoredCrops([crop], rescaling)} for crop in crops]
    together = pack(samples, np.empty)["image"].unpacked()
    assert together.numbers.element_size() <= 4
    alone = [pack([sample], np.empty)["image"].unpacked().to("cpu")[0] for sample in samples]
    assert torch.equal(together.to("cpu"), torch.stack(alone))


def test_whatever_else_a_sample_holds_is_stacked_as_it_is():
    samples = [{"mask": torch.tensor([True, False]), "label": torch.full((1, 2, 2, 2), number)} for number in (5, 7)]
    packed = pack(samples, np.empty)
    assert torch.equal(packed["mask"].unpacked(), torch.tensor([[True, False], [True, False]]))
    assert packed["label"].unpacked().dtype == torch.int64
    assert packed["label"].unpacked().flatten(1).unique().tolist() == [5, 7]


def test_fabric_sends_images_to_the_device_as_float32():
    rescaling = Intensity().rescaling(LINES, [statistics_of(np.zeros(1))] * 2)
    batch = {"image": pack([{"image": StoredCrops([crop_of(np.uint8)], rescaling)}], np.empty)["image"].unpacked()}
    assert batch["image"].numbers.nbytes == 2 * 4 * 5 * 6
    moved = move_data_to_device(batch, torch.device("cpu"))["image"]
    assert torch.equal(moved, batch["image"].to("cpu"))
    assert moved.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", INTEGER_TYPES)
def test_a_gpu_gives_what_a_cpu_gives(dtype):
    rescaling = Intensity(window=(0.0, 200.0)).rescaling(LINES, [statistics_of(np.zeros(1))] * 2)
    images = pack([{"image": StoredCrops([crop_of(dtype)], rescaling)}], np.empty)["image"].unpacked()
    torch.testing.assert_close(images.to("cuda").cpu(), images.to("cpu"), atol=1e-6, rtol=1e-6)
