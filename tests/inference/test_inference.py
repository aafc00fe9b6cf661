"""Sliding windows, mirroring, ensembles and the way back to the scan's own grid."""

import json
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mim3d.caching.foreground import foreground_of, threshold_of
from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import Case
from mim3d.inference import (
    Readout,
    Windows,
    classes_readout,
    mirrored_logits,
    padding_values,
    predict_scan,
    sliding_logits,
)
from mim3d.inference.sweep import Sweep, run_sweep
from mim3d.inference.windows import body_windows, cut_window
from mim3d.scans.intensity import Intensity
from tests.labelled import ball_scan, write_scan
from tests.restoring import restore

CPU = torch.device("cpu")
INTENSITY = Intensity(window=(0.0, 400.0))
THREE = classes_readout(3)


def two_thresholds(window_BCXYZ: torch.Tensor) -> torch.Tensor:
    """Voxel-wise logits of three classes: whatever the windows, the result of a scan is known."""
    voxels = window_BCXYZ[:, :1]
    return torch.cat([-(voxels - level).abs() for level in (0.25, 0.45, 0.65)], 1) * 20


def smoothed(window_BCXYZ: torch.Tensor) -> torch.Tensor:
    """Logits of three classes that depend on a voxel's neighbours, so that windows disagree."""
    return two_thresholds(F.avg_pool3d(window_BCXYZ, 3, stride=1, padding=1)) * torch.tensor([1.0, 1.1, 0.9]).view(
        1, 3, 1, 1, 1
    )


def case_of(tmp_path, array: np.ndarray, affine: np.ndarray | None = None) -> Case:
    write_scan(tmp_path / "scan.nii.gz", array, affine)
    return Case(id="scan", images=(str(tmp_path / "scan.nii.gz"),), patient="scan")


def predict(case: Case, windows: Windows, spacing_mm=None, networks=(two_thresholds,), readout=THREE, **options):
    return predict_scan(
        networks,
        case,
        readout=readout,
        preprocessing=Preprocessing(spacing_mm=spacing_mm),
        intensity=INTENSITY,
        windows=windows,
        device=CPU,
        **options,
    )


def whole_probabilities(case: Case, network, windows: Windows, spacing_mm=None) -> np.ndarray:
    """The straightforward way: all logits of the scan, softmax, all probabilities interpolated to its grid."""
    prepared = prepare(case, Preprocessing(spacing_mm=spacing_mm), with_label=False)
    logits = sliding_logits(
        network,
        torch.from_numpy(INTENSITY.apply(prepared.image, prepared.statistics)),
        windows,
        padding=padding_values(INTENSITY, prepared.statistics),
        device=CPU,
    )
    return restore(torch.softmax(logits, 0).numpy(), prepared)


def by_hand(network, image: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Blended logits of an unpadded scan, window by window over a whole volume in double precision."""
    from mim3d.inference import window_weights

    weights = window_weights(windows.patch_size).double()
    total, seen = None, torch.zeros(image.shape[1:], dtype=torch.float64)
    for place in windows.places(tuple(image.shape[1:])):
        box = tuple(slice(first, first + edge) for first, edge in zip(place, windows.patch_size, strict=True))
        logits = network(image[(slice(None), *box)][None])[0].double()
        total = torch.zeros((len(logits), *image.shape[1:]), dtype=torch.float64) if total is None else total
        total[(slice(None), *box)] += logits * weights
        seen[box] += weights
    return (total / seen).float()


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(20, 31, 17), (5, 40, 8), (3, 3, 3), (16, 16, 16)])
def test_windows_give_back_a_voxel_wise_network_exactly(shape, overlap):
    image = torch.rand(2, *shape)
    windows = Windows(patch_size=(16, 12, 8), overlap=overlap, batch_size=3)
    logits = sliding_logits(two_thresholds, image, windows, padding=[0.0, 0.0], device=CPU)
    assert logits.shape == (3, *shape) and logits.dtype == torch.float32
    assert torch.allclose(logits, two_thresholds(image[None])[0], atol=1e-4)


@pytest.mark.parametrize("shape", [(20, 31, 17), (5, 40, 8), (16, 16, 16), (33, 13, 9)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
def test_the_number_of_windows_is_known_before_they_are_computed(shape, overlap):
    windows = Windows(patch_size=(16, 12, 8), overlap=overlap, batch_size=5)
    computed: list[int] = []

    def counting(window):
        computed.append(len(window))
        return two_thresholds(window)

    sliding_logits(counting, torch.rand(1, *shape), windows, padding=[0.0], device=CPU)
    assert sum(computed) == len(windows.places(shape))
    assert max(computed) <= windows.batch_size


def test_windows_are_blended_smoothly_and_count_most_in_their_middle():
    def position(window):
        ramp = torch.linspace(-1, 1, window.shape[2])[None, None, :, None, None].expand_as(window)
        return torch.cat([ramp, -ramp], 1)

    windows = Windows(patch_size=(16, 8, 8), overlap=0.5)
    logits = sliding_logits(position, torch.zeros(1, 24, 8, 8), windows, padding=[0.0], device=CPU)
    middle_of_second = logits[0, 15, 0, 0]
    assert abs(middle_of_second) < 0.15


def test_mirrored_logits_average_every_combination_turned_back():
    def asymmetric(window):
        weight = torch.arange(window.shape[2], dtype=torch.float32)[None, None, :, None, None]
        return window * weight

    window = torch.rand(2, 1, 4, 5, 6)
    size = window.shape[2]
    expected = window * (size - 1) / 2
    assert torch.allclose(mirrored_logits(asymmetric, window, (0,)), expected)
    assert torch.allclose(mirrored_logits(asymmetric, window, (0, 2)), expected)
    assert torch.allclose(mirrored_logits(asymmetric, window, ()), asymmetric(window))


def test_small_scans_are_padded_evenly_with_each_channels_own_low_value():
    image = torch.stack([torch.ones(3, 4, 9), 2 * torch.ones(3, 4, 9)])
    windows = Windows(patch_size=(8, 4, 8))
    assert windows.places((3, 4, 9)) == [(-2, 0, 0), (-2, 0, 1)]
    window = cut_window(lambda part: image[part], (-2, 0, 1), (8, 4, 8), (3, 4, 9), [-1.0, -2.0])
    assert window.shape == (2, 8, 4, 8)
    assert torch.equal(window[:, 2:5], image[..., 1:])
    assert (window[0, :2] == -1).all() and (window[1, 5:] == -2).all()


def test_the_padding_value_is_mapped_as_the_scan_is(tmp_path):
    prepared = prepare(case_of(tmp_path, ball_scan(0)[0]), Preprocessing())
    low = prepared.statistics[0].low
    assert padding_values(Intensity(window=(0.0, 200.0)), prepared.statistics) == pytest.approx([low / 200])
    zscore = Intensity(kind="zscore", window=None)
    expected = (low - prepared.statistics[0].mean) / prepared.statistics[0].std
    assert padding_values(zscore, prepared.statistics) == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("direction", ["RAS", "LPS", "PIR", "SLA"])
def test_labels_lie_where_the_structure_is_in_whatever_orientation_it_was_stored(tmp_path, direction):
    image, label = ball_scan(3)
    reference = nibabel.Nifti1Image(label, np.diag([1.0, 1.0, 1.2, 1.0]))
    target = nibabel.orientations.axcodes2ornt(direction)
    stored = nibabel.Nifti1Image(image, reference.affine).as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.io_orientation(reference.affine), target)
    )
    case = case_of(tmp_path, np.asarray(stored.dataobj), stored.affine)
    classes, grid = predict(case, Windows(patch_size=(12, 12, 12)))
    wanted = np.select([label == 2, label == 5], [1, 2])
    assert classes.dtype == np.uint8 and grid.shape == stored.shape
    assert (classes == wanted).mean() > 0.99


def test_a_resampled_scan_comes_back_on_its_own_grid_with_probabilities_interpolated(tmp_path):
    image, label = ball_scan(1, (40, 36, 32))
    case = case_of(tmp_path, image)
    classes, grid = predict(case, Windows(patch_size=(16, 16, 16)), spacing_mm=(1.5, 1.5, 1.5))
    assert classes.shape == image.shape == grid.ras_shape
    wanted = np.select([label == 2, label == 5], [1, 2])
    assert 2 * ((classes > 0) & (wanted > 0)).sum() / ((classes > 0).sum() + (wanted > 0).sum()) > 0.85


@pytest.mark.parametrize("shape", [(40, 20, 20), (20, 40, 20), (21, 19, 45)])
@pytest.mark.parametrize("spacing_mm", [None, (1.5, 1.4, 1.5), (0.8, 0.7, 2.0), (1.0, 1.0, 2.0)])
def test_rows_finished_on_the_way_equal_the_straightforward_way(tmp_path, shape, spacing_mm):
    case = case_of(tmp_path, ball_scan(1, shape)[0])
    windows = Windows(patch_size=(12, 12, 12), batch_size=3, body_only=False)
    whole = whole_probabilities(case, smoothed, windows, spacing_mm)
    filled = np.full((*shape, 3), np.nan, dtype=np.float32)
    labels, _ = predict(
        case, windows, spacing_mm, networks=[smoothed], probability_target=lambda grid, channels: filled
    )
    assert np.abs(filled - whole.transpose(1, 2, 3, 0)).max() < 1e-5
    margin = np.sort(whole, axis=0)
    clear = margin[-1] - margin[-2] > 1e-4
    assert clear.mean() > 0.95 and np.array_equal(labels[clear], whole.argmax(0)[clear])
    without, _ = predict(case, windows, spacing_mm, networks=[smoothed])
    assert np.array_equal(without[clear], labels[clear])


@pytest.mark.parametrize("shape", [(40, 20, 24), (24, 20, 40)])
def test_blended_logits_are_the_weighted_mean_over_windows(shape):
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    windows = Windows(patch_size=(12, 16, 12), overlap=0.4, batch_size=3)
    logits = sliding_logits(smoothed, image, windows, padding=[0.0], device=CPU)
    assert torch.allclose(logits, by_hand(smoothed, image, windows), atol=1e-5)


def test_windows_are_evenly_spaced_as_many_as_monai_lays():
    places = Windows(patch_size=(10, 10, 10), overlap=0.5).places((24, 10, 8))
    assert sorted({place[0] for place in places}) == [0, 5, 9, 14]
    assert {place[1:] for place in places} == {(0, -1)}
    in_box = Windows(patch_size=(10, 10, 10)).places((24, 30, 30), ((3, 26, 0), (17, 29, 30)))
    assert sorted({place[0] for place in in_box}) == [3, 7] and {place[1] for place in in_box} == {20}


def far_apart(shape=(80, 24, 24)) -> np.ndarray:
    """CT of two bodies with air between them, and noise in the air that one voxel in a hundred lifts over -950 HU."""
    image = np.random.default_rng(0).normal(-1000, 20, shape)
    image[4:16, 6:18, 6:18] = image[66:76, 6:18, 6:18] = 40
    return image.round().astype(np.int16)


def test_windows_without_any_body_are_left_out_and_are_background(tmp_path):
    case = case_of(tmp_path, far_apart())
    prepared = prepare(case, Preprocessing(), with_label=False)
    windows = Windows(patch_size=(12, 12, 12))
    places = body_windows(prepared.image.shape[1:], prepared.foreground, windows)
    assert 0 < len(places) < len(windows.places((80, 24, 24)))
    is_body = prepared.image[0] > 0
    seen = np.zeros(is_body.shape, dtype=bool)
    for x, y, z in places:
        seen[x : x + 12, y : y + 12, z : z + 12] = True
    assert seen[is_body].all() and not seen[30:50].any()

    def everything(window):
        return torch.cat([torch.zeros_like(window), torch.ones_like(window), -torch.ones_like(window)], 1)

    told: list[tuple[int, int]] = []
    filled = np.full((80, 24, 24, 3), np.nan, dtype=np.float32)
    labels, _ = predict(
        case,
        windows,
        networks=[everything],
        probability_target=lambda grid, channels: filled,
        on_windows=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (len(places), len(places))
    assert np.array_equal(labels == 1, seen)
    assert (filled[~seen] == [1, 0, 0]).all() and np.allclose(filled.sum(-1), 1, atol=1e-6)
    over_all, _ = predict(case, Windows(patch_size=(12, 12, 12), body_only=False), networks=[everything])
    assert (over_all == 1).all()


def test_skipped_rows_are_background_on_a_resampled_grid_too(tmp_path):
    case = case_of(tmp_path, far_apart(), np.eye(4))
    filled = np.full((80, 24, 24, 3), np.nan, dtype=np.float32)
    labels, _ = predict(
        case, Windows(patch_size=(12, 12, 12)), (1.6, 1.5, 1.0), probability_target=lambda grid, channels: filled
    )
    assert (filled[38:45] == [1, 0, 0]).all() and (labels[38:45] == 0).all()
    assert np.allclose(filled.sum(-1), 1, atol=1e-5)


def body_blocks(image):
    return foreground_of(image, [threshold_of(channel) for channel in image]).blocks


def test_blocks_of_the_body_are_those_of_the_foreground_rule():
    image = np.full((1, 9, 8, 8), -1000, dtype=np.int16)
    image[0, :4, :4, :2] = 0  # half of a block
    image[0, 4:8, 4:, :2] = 0
    image[0, 4, 4, 0] = -1000  # one voxel less than half
    image[0, 8, 4:, 4:] = 0  # a block of which one plane lies inside the scan
    expected = np.zeros((3, 2, 2), dtype=bool)
    expected[0, 0, 0] = expected[2, 1, 1] = True
    assert np.array_equal(body_blocks(image), expected)
    assert body_blocks(np.zeros((2, 5, 5, 5), dtype=np.float32)).all()
    assert np.array_equal(body_blocks(np.concatenate([image, image[:, ::-1]])), expected | body_blocks(image[:, ::-1]))


def test_an_ensemble_is_the_mean_of_the_probabilities(tmp_path):
    case = case_of(tmp_path, ball_scan(1)[0])
    windows = Windows(patch_size=(64, 64, 64), mirror_axes=(0,), body_only=False)
    networks = [smoothed, two_thresholds, lambda window: 3 * smoothed(window).flip(1)]
    filled = np.empty((22, 20, 18, 3), dtype=np.float32)
    predict(case, windows, networks=networks, probability_target=lambda grid, channels: filled)
    mean = np.mean([whole_probabilities(case, network, windows) for network in networks], axis=0)
    assert np.abs(filled - mean.transpose(1, 2, 3, 0)).max() < 1e-5


def test_networks_take_turns_at_every_batch(tmp_path):
    calls: list[str] = []

    def named(name):
        return lambda window: (calls.append(name), two_thresholds(window))[1]

    windows = Windows(patch_size=(12, 12, 12), batch_size=4)
    predict(case_of(tmp_path, ball_scan(1)[0]), windows, networks=[named("a"), named("b")])
    assert calls == ["a", "b"] * (len(calls) // 2) and len(calls) > 2


def test_regions_are_decided_by_their_probabilities_not_by_the_order_of_logits(tmp_path):
    def decide(probabilities):
        inside = probabilities > 0.5
        return torch.where(inside[1], 7, torch.where(inside[0], 4, 0)).to(torch.uint8)

    regions = Readout(
        empty=(0.0, 0.0), activate=lambda logits, axis: logits.sigmoid(), decide=decide, order_is_enough=False
    )

    def nested(window):
        return torch.cat([window - 0.35, window - 0.55], 1) * 100

    image, label = ball_scan(2)
    classes, _ = predict(case_of(tmp_path, image), Windows(patch_size=(12, 12, 12)), networks=[nested], readout=regions)
    assert set(np.unique(classes)) == {0, 4, 7}
    assert (classes == np.select([label == 5, label == 2], [7, 4])).mean() > 0.99


def test_a_scan_smaller_than_a_window_is_segmented_on_its_own_size(tmp_path):
    image, label = ball_scan(2)
    classes, _ = predict(case_of(tmp_path, image), Windows(patch_size=(64, 64, 64)))
    assert classes.shape == label.shape


def test_progress_runs_to_the_number_of_windows(tmp_path):
    told: list[tuple[int, int]] = []
    windows = Windows(patch_size=(12, 12, 12), batch_size=2)
    predict(case_of(tmp_path, ball_scan(2)[0]), windows, on_windows=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] > 2


def test_scores_that_do_not_fit_into_memory_are_refused_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("mim3d.inference.prediction.available_memory_bytes", lambda: 1000)
    with pytest.raises(DataError, match=r"scan.nii.gz: the scores of 3 classes .* GiB"):
        predict(case_of(tmp_path, ball_scan(2)[0]), Windows(patch_size=(12, 12, 12)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_more_is_held_than_the_rows_that_windows_still_touch(axis):
    shape = tuple(120 if place == axis else 24 for place in range(3))
    windows = Windows(patch_size=(16, 16, 16), batch_size=1)
    sweep = Sweep.over(windows.places(shape), windows.patch_size, shape)
    assert sweep.axis == axis and sweep.slab_shape == (16, 24, 24)
    assert sweep.slab_bytes(3) == 4 * 16 * 24 * 24 * (3 + 1)
    cut_at: list[int] = []
    rows: list[int] = []

    def cut(place):
        cut_at.append(place[axis])
        return torch.zeros(1, 16, 16, 16)

    def finish(first, sums_RKUV, weights_RUV):
        # A row is handed on as soon as a window is reached that begins behind it, and never before.
        assert first + len(sums_RKUV) <= cut_at[-1] or cut_at[-1] == 120 - 16
        assert (weights_RUV > 0).all()
        rows.extend(range(first, first + len(sums_RKUV)))

    run_sweep(sweep, windows, cut, two_thresholds, finish, device=CPU)
    assert rows == list(range(120))


#: Segments a scan of noise with a network that costs next to nothing, and tells the most memory it ever held.
MEASURED = """
import json, sys
import numpy as np, torch, nibabel
from mim3d.datasets.cases import Case
from mim3d.caching.preprocessing import Preprocessing
from mim3d.scans.intensity import Intensity
from mim3d.inference import Windows, classes_readout, predict_scan
from mim3d.core.resources import peak_memory_bytes

path, classes, edge, spacing = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
torch.set_num_threads(1)
before = peak_memory_bytes()
labels, grid = predict_scan(
    [lambda window: window.expand(-1, classes, -1, -1, -1)],
    Case(id="scan", images=(path,), patient="scan"),
    readout=classes_readout(classes),
    preprocessing=Preprocessing(spacing_mm=spacing),
    intensity=Intensity(window=(-1000.0, 1000.0)),
    windows=Windows(patch_size=(edge,) * 3, overlap=0.25, batch_size=1, body_only=False),
    device=torch.device("cpu"),
)
print(json.dumps({"before": before, "peak": peak_memory_bytes(), "shape": labels.shape}))
"""


def measured_peak(tmp_path, shape, num_classes: int, edge: int, spacing_mm=None) -> dict:
    planes = np.random.default_rng(0).integers(-1000, 1000, (*shape[:2], 8), dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(np.tile(planes, (1, 1, shape[2] // 8)), np.eye(4)), tmp_path / "scan.nii")
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "scan.nii"), str(num_classes), str(edge)]
    done = subprocess.run([*command, json.dumps(spacing_mm)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert tuple(told["shape"]) == shape
    return told


@pytest.mark.parametrize("spacing_mm", [None, [1.25, 1.25, 1.25]])
def test_memory_stays_far_below_the_scores_of_the_whole_scan(tmp_path, spacing_mm):
    told = measured_peak(tmp_path, (96, 96, 640), 24, 32, spacing_mm)
    whole_bytes = 4 * 24 * 96 * 96 * 640
    assert told["peak"] - told["before"] < 0.25 * whole_bytes


@pytest.mark.slow
@pytest.mark.parametrize("spacing_mm", [None, [1.1, 1.1, 1.25]])
def test_a_large_scan_with_14_classes_stays_within_8_gb(tmp_path, spacing_mm):
    told = measured_peak(tmp_path, (512, 512, 1000), 14, 96, spacing_mm)
    assert told["peak"] < 8e9


@pytest.mark.parametrize("settings", [{"overlap": 1.0}, {"overlap": -0.1}, {"batch_size": 0}, {"mirror_axes": (3,)}])
def test_window_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError):
        Windows(patch_size=(8, 8, 8), **settings)
