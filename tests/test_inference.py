"""Sliding windows, mirroring and the way back to the scan's own grid."""

import nibabel
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mim3d.data.cases import Case
from mim3d.data.preprocessing import Preprocessing, prepare, restore
from mim3d.data.transforms import Intensity
from mim3d.errors import ConfigError, DataError
from mim3d.inference import (
    Windows,
    best_class_on_grid,
    mirrored_logits,
    pad_to,
    padding_values,
    predict_scan,
    sliding_logits,
)
from tests.labelled import ball_scan, write_scan

CPU = torch.device("cpu")
INTENSITY = Intensity(window=(0.0, 400.0))


def two_thresholds(window_BCXYZ: torch.Tensor) -> torch.Tensor:
    """Voxel-wise logits of three classes: whatever the windows, the result of a scan is known."""
    voxels = window_BCXYZ[:, :1]
    return torch.cat([-(voxels - level).abs() for level in (0.25, 0.45, 0.65)], 1) * 20


def case_of(tmp_path, array: np.ndarray, affine: np.ndarray | None = None) -> Case:
    write_scan(tmp_path / "scan.nii.gz", array, affine)
    return Case(id="scan", images=(str(tmp_path / "scan.nii.gz"),), patient="scan")


def predict(case: Case, windows: Windows, spacing_mm=None, **options):
    return predict_scan(
        two_thresholds,
        case,
        num_classes=3,
        preprocessing=Preprocessing(spacing_mm=spacing_mm),
        intensity=INTENSITY,
        windows=windows,
        device=CPU,
        **options,
    )


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
    told: list[int] = []
    sliding_logits(two_thresholds, torch.rand(1, *shape), windows, padding=[0.0], device=CPU, on_windows=told.append)
    assert told[-1] == windows.count(shape)
    assert told == sorted(told)


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
    padded, inside = pad_to(image, (8, 4, 8), [-1.0, -2.0])
    assert padded.shape == (2, 8, 4, 9)
    assert torch.equal(padded[(slice(None), *inside)], image)
    assert (padded[0, :2] == -1).all() and (padded[1, 5:] == -2).all()


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


def test_classes_one_by_one_are_the_argmax_of_the_restored_probabilities(tmp_path):
    prepared = prepare(case_of(tmp_path, ball_scan(1)[0]), Preprocessing(spacing_mm=(1.3, 1.3, 1.3)))
    logits = torch.randn(5, *prepared.image.shape[1:], generator=torch.Generator().manual_seed(0))
    whole = restore(F.softmax(logits, 0).numpy(), prepared).argmax(0)
    assert np.array_equal(best_class_on_grid(logits, prepared), whole)


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
    monkeypatch.setattr("mim3d.inference.available_memory_bytes", lambda: 1000)
    with pytest.raises(DataError, match=r"scan.nii.gz: the scores of 3 classes .* GiB"):
        predict(case_of(tmp_path, ball_scan(2)[0]), Windows(patch_size=(12, 12, 12)))


@pytest.mark.parametrize("settings", [{"overlap": 1.0}, {"overlap": -0.1}, {"batch_size": 0}, {"mirror_axes": (3,)}])
def test_window_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError):
        Windows(patch_size=(8, 8, 8), **settings)
