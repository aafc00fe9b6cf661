"""Pooling of tokens over scans: windows that count every token once, regions by voxels, against plain computations."""

import numpy as np
import pytest
import torch

from mim3d.backbones import create_model
from mim3d.caching.foreground import foreground_of
from mim3d.core.errors import ConfigError
from mim3d.inference.features import BoxRegions, LabelRegions, SampledAxis, Tiling, body_region, pool_features
from mim3d.inference.scan_input import ScanInput
from mim3d.scans.intensity import Intensity

STEP = 8


def scan_of(image: np.ndarray) -> ScanInput:
    volume = torch.from_numpy(image)
    return ScanInput(
        shape=image.shape[1:],
        spacing_mm=(1.0, 1.0, 1.0),
        affine=np.eye(4),
        intensity=Intensity(),
        multiple=(STEP,) * 3,
        padding=(0.0,) * len(image),
        part_of=lambda part: volume[part],
    )


def own_axes(shape):
    return tuple(SampledAxis(np.arange(size), np.arange(size)) for size in shape)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_model({"name": "hybrid", "widths": [8, 12, 16], "depths": [1, 1, 1], "num_heads": 2}).eval()


@pytest.mark.parametrize("shape", [(16, 16, 16), (40, 17, 9), (33, 70, 24), (5, 8, 100)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_every_voxel_belongs_to_one_window_and_lies_in_it(shape, overlap):
    tiling = Tiling(size=(32, 32, 16), overlap=overlap)
    seen = np.zeros(shape, dtype=int)
    for tile in tiling.windows(shape, STEP):
        for origin, start, stop, edge in zip(tile.origin, tile.start, tile.stop, tiling.size, strict=True):
            assert origin <= start < stop <= origin + edge
            assert (start - origin) % STEP == 0 and (stop - start) % STEP == 0
        inside = tuple(slice(max(0, start), stop) for start, stop in tile.ends)
        seen[inside] += 1
    assert (seen == 1).all()


def test_a_scan_that_fits_one_window_is_pooled_as_by_hand(encoder):
    rng = np.random.default_rng(0)
    shape = (24, 20, 28)
    image = rng.normal(0, 1, (1, *shape)).astype(np.float32)
    label = np.zeros(shape, np.uint8)
    label[3:17, 5:12, 6:25] = 4
    label[1, 1, 1] = 7
    region = LabelRegions(label, (4, 7), own_axes(shape))
    mapped = pool_features(encoder, encoder, scan_of(image), [region], [0, 2], Tiling(size=(32, 32, 32)))
    window = np.zeros((32, 32, 32), np.float32)
    window[4:28, 6:26, 2:30] = image[0]
    values = np.zeros((32, 32, 32), np.uint8)
    values[4:28, 6:26, 2:30] = label
    inside = np.zeros((32, 32, 32), bool)
    inside[4:28, 6:26, 2:30] = True
    with torch.no_grad():
        maps = encoder(torch.from_numpy(window)[None, None])
    for level, pooled in zip((0, 2), mapped, strict=True):
        stride = encoder.strides[level]
        voxels = maps[level][0].numpy().repeat(stride, 1).repeat(stride, 2).repeat(stride, 3)
        for row, value in enumerate((4, 7)):
            np.testing.assert_allclose(pooled.mean_RD[row], voxels[:, values == value].mean(1), rtol=1e-4, atol=1e-5)
        cut = values.reshape(32 // stride, stride, 32 // stride, stride, 32 // stride, stride)
        held = inside.reshape(cut.shape).sum((1, 3, 5))
        mostly = ((cut == 4).sum((1, 3, 5)) >= 0.5 * held) & (held > 0)
        np.testing.assert_array_equal(pooled.max_RD[0], maps[level][0].numpy()[:, mostly].max(1))
        # One voxel fills no token by half: that which it touches counts.
        token = [(at + 1) // stride for at in (4, 6, 2)]
        np.testing.assert_array_equal(pooled.max_RD[1], maps[level][0].numpy()[:, *token])
        assert pooled.weight_R.tolist() == [(label == 4).sum(), 1]


def test_a_large_scan_is_the_sum_of_its_windows_whatever_their_number_at_a_time(encoder):
    rng = np.random.default_rng(1)
    shape = (50, 33, 40)
    image = rng.normal(0, 1, (1, *shape)).astype(np.float32)
    image[:, :, :, :8] = -5
    body = body_region(foreground_of(image, [-2.5]), shape)
    one, four = (
        pool_features(encoder, encoder, scan_of(image), [body], [2], Tiling(size=(32, 32, 32), batch_size=number))[0]
        for number in (1, 4)
    )
    np.testing.assert_allclose(one.mean_RD, four.mean_RD, rtol=1e-5, atol=1e-6)
    # By hand, token by token of every window.
    total, weight = np.zeros(16), 0.0
    inside = np.kron(body.array, np.ones((4, 4, 4)))[:50, :33, :40]
    scan = scan_of(image)
    for tile in Tiling(size=(32, 32, 32)).windows(shape, STEP):
        with torch.no_grad():
            tokens = encoder(scan.crop(tile.origin, (32, 32, 32)))[-1][0].numpy()
        for place in np.ndindex(tokens.shape[1:]):
            first = [at + STEP * number for at, number in zip(tile.origin, place, strict=True)]
            if all(start <= at < stop for at, (start, stop) in zip(first, tile.ends, strict=True)):
                held = inside[tuple(slice(max(0, at), at + STEP) for at in first)].sum()
                total, weight = total + held * tokens[:, *place].astype(float), weight + held
    np.testing.assert_allclose(one.mean_RD[0], total / weight, rtol=1e-4, atol=1e-5)
    assert one.weight_R[0] == inside.sum() == weight


def test_windows_without_a_region_are_not_computed(encoder):
    label = np.zeros((100, 16, 16), np.uint8)
    label[90, 8, 8] = 1
    seen = []

    def maps_of(windows):
        seen.append(len(windows))
        return encoder(windows)

    image = np.zeros((1, 100, 16, 16), np.float32)
    region = LabelRegions(label, (1,), own_axes(label.shape))
    pool_features(maps_of, encoder, scan_of(image), [region], [2], Tiling(size=(32, 16, 16)))
    assert sum(seen) == 1


def test_boxes_are_pooled_as_label_maps_of_them_and_may_overlap(encoder):
    shape = (40, 24, 24)
    image = np.random.default_rng(2).normal(0, 1, (1, *shape)).astype(np.float32)
    boxes = np.array([[[2, 19], [3, 20], [1, 9]], [[10, 40], [3, 20], [5, 24]]])
    axes = own_axes(shape)
    scan, tiling = scan_of(image), Tiling(size=(24, 24, 24))
    found = pool_features(encoder, encoder, scan, [BoxRegions(boxes, axes)], [1], tiling)[0]
    for row, box in enumerate(boxes):
        label = np.zeros(shape, np.uint8)
        label[tuple(slice(*ends) for ends in box)] = 1
        alone = pool_features(encoder, encoder, scan, [LabelRegions(label, (1,), axes)], [1], tiling)[0]
        assert found.weight_R[row] == alone.weight_R[0]
        np.testing.assert_allclose(found.mean_RD[row], alone.mean_RD[0], rtol=1e-5)
        np.testing.assert_array_equal(found.max_RD[row], alone.max_RD[0])


def test_regions_of_a_finer_grid_keep_every_voxel_on_a_coarse_one():
    fine, coarse = (61, 48, 35), (20, 48, 12)
    axes = tuple(SampledAxis.between(n, 1.0, m, n / m) for n, m in zip(fine, coarse, strict=True))
    label = np.random.default_rng(3).integers(0, 3, fine).astype(np.uint8)
    region = LabelRegions(label, (1, 2), axes)
    tiles = list(Tiling(size=(16, 16, 16)).windows(coarse, 8))
    counted = sum(region.counts(tile, 8)[0].sum(1) for tile in tiles)
    assert counted.tolist() == [(label == 1).sum(), (label == 2).sum()]
    assert all(share.max() <= 1 for tile in tiles for share in region.counts(tile, 8)[1:])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"overlap": 1.0}, "overlap is 1.0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"size": (20, 16, 16)}, "window_size"),
    ],
)
def test_tilings_that_cannot_work_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        list(Tiling(**{"size": (16, 16, 16), **changes}).windows((30, 30, 30), 8))


def test_samples_lie_in_the_voxel_around_their_centre():
    """Two samples in each voxel, also where edges are no whole numbers apart."""
    assert SampledAxis.between(4, 1.0, 2, 2.0).voxel.tolist() == [0, 0, 1, 1]
    assert SampledAxis.between(3, 2.0, 6, 1.0).voxel.tolist() == [1, 3, 5]
