"""One scan as an encoder takes it: as in training, in whole or in parts, from files or from a cache."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import mim3d
from mim3d.backbones import Hybrid, create_model
from mim3d.caching.build import build_cache
from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.warned import UnlikeTrainingWarning, WeightsWarning
from mim3d.datasets.cases import Case, read_cases
from mim3d.scans.intensity import Intensity
from mim3d.weights import save_network
from tests.nifti import affine_of, noise, write_nifti

RECIPE = Hybrid(widths=(8, 16), depths=(1, 1), num_heads=2)
CARD = {
    "backbone": {"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2},
    "spacing_mm": None,
    "intensity": {"kind": "window", "window": [-200, 300]},
}


@pytest.fixture
def weights(tmp_path) -> Path:
    folder = tmp_path / "encoder"
    save_network(folder, RECIPE.build(), CARD)
    return folder


@pytest.fixture
def scan(tmp_path) -> Path:
    return write_nifti(tmp_path / "scans" / "a.nii.gz", noise((22, 20, 18)), affine_of((1.0, 1.0, 2.0)))


def with_card(folder: Path, **entries) -> Path:
    (folder / "card.json").write_text(json.dumps({"format": 1, **CARD, **entries}))
    return folder


def test_a_scan_is_mapped_as_in_training_and_padded_to_whole_tokens(weights, scan):
    found = mim3d.load_scan(scan, weights)
    whole = prepare(Case(id="a", images=(str(scan),)), Preprocessing())
    expected = Intensity(window=(-200, 300)).apply(whole.image, whole.statistics)
    assert found.shape == (22, 20, 18) and found.image.shape == (1, 1, 24, 20, 20)
    np.testing.assert_array_equal(found.image[0, :, :22, :20, :18], expected)
    # Nothing is there beyond the scan: air.
    assert not found.image[..., 22:, :, :].any() and not found.image[..., 18:].any()
    np.testing.assert_array_equal(found.affine, affine_of((1.0, 1.0, 2.0)))
    maps = mim3d.load_encoder(weights)(found.image)
    assert [tuple(each.shape) for each in maps] == [(1, 8, 12, 10, 10), (1, 16, 6, 5, 5)]


def test_a_scan_is_resampled_to_the_voxel_size_of_the_card(weights, scan):
    found = mim3d.load_scan(str(scan), with_card(weights, spacing_mm=[2.0, 2.0, 2.0]))
    assert found.shape == (11, 10, 18) and found.spacing_mm == (2.0, 2.0, 2.0)


def test_windows_cover_the_scan_once_and_join_to_the_whole(weights, scan):
    found = mim3d.load_scan(scan, weights)
    joined = torch.full((1, 1, 24, 24, 24), float("nan"))
    for (x, y, z), window in found.windows((8, 8, 8)):
        joined[..., x : x + 8, y : y + 8, z : z + 8] = window
    assert torch.equal(joined[..., :24, :20, :20], found.image)
    assert [origin for origin, _ in found.windows((16, 20, 20), (8, 20, 20))] == [(0, 0, 0), (8, 0, 0)]
    with pytest.raises(ConfigError, match=r"size axis X \(9\) is not a multiple of stride 4; use 8 or 12"):
        next(found.windows((9, 8, 8)))


def test_a_crop_may_reach_beyond_the_scan_but_not_lie_outside(weights, scan):
    found = mim3d.load_scan(scan, weights)
    crop = found.crop((-4, -4, 16), (8, 8, 8))
    assert torch.equal(crop[..., 4:, 4:, :2], found.image[..., :4, :4, 16:18]) and not crop[..., :4, :, :].any()
    with pytest.raises(ConfigError, match=r"A crop of 8 x 8 x 8 voxels from \[24, 0, 0\] lies outside"):
        found.crop((24, 0, 0), (8, 8, 8))


def test_a_scan_of_a_cache_is_the_same_and_read_window_by_window(weights, scan, tmp_path):
    preprocessing = Preprocessing(intensities="lossless")
    cached = build_cache(read_cases(scan.parent), tmp_path / "cache", preprocessing)[0]
    found, file = mim3d.load_scan(cached, weights), mim3d.load_scan(scan, weights)
    assert torch.equal(found.image, file.image)
    assert torch.equal(found.crop((12, 8, 4), (8, 8, 8)), file.crop((12, 8, 4), (8, 8, 8)))
    other = with_card(weights, spacing_mm=[2.0, 2.0, 2.0])
    with pytest.raises(DataError, match=r"voxels of 1 1 2 mm.*--spacing_mm 2 2 2"):
        mim3d.load_scan(cached, other)
    assert mim3d.load_scan(replace(cached, spacing_mm=(2.0, 2.0, 2.001)), other).shape == (22, 20, 18)


def test_channels_are_given_as_a_list_and_counted(scan, tmp_path):
    folder = tmp_path / "two"
    save_network(
        folder, replace(RECIPE, in_channels=2).build(), CARD | {"backbone": CARD["backbone"] | {"in_channels": 2}}
    )
    other = write_nifti(tmp_path / "b.nii.gz", noise((22, 20, 18), 1), affine_of((1.0, 1.0, 2.0)))
    assert mim3d.load_scan([scan, other], folder).image.shape == (1, 2, 24, 20, 20)
    with pytest.raises(DataError, match=r"a scan of 1 channel, but .* learned from 2"):
        mim3d.load_scan(scan, folder)


def test_several_scans_are_refused_by_their_names(weights, scan):
    write_nifti(scan.parent / "b.nii.gz", noise((22, 20, 18), 1))
    with pytest.raises(DataError, match=r"2 scans in here \(a, b\); give one of them"):
        mim3d.load_scan(scan.parent, weights)


def test_a_scan_unlike_those_of_training_is_told(weights, scan):
    channel = {"modality": "MR", "low": [0, 1], "mean": [2, 3], "high": [4, 5], "width": 4.0}
    learned = {"channels": [channel], "spacing_mm": [[1, 1, 2], [1, 1, 2]]}
    with pytest.warns(UnlikeTrainingWarning, match=r"a\.nii\.gz: the network learned from MR, and this scan is"):
        mim3d.load_scan(scan, with_card(weights, input_range=learned), modality="CT")


def test_weights_that_say_nothing_get_the_window_of_ct_and_a_warning(scan, tmp_path):
    torch.save(create_model("hybrid_nano").state_dict(), tmp_path / "state.pt")
    with pytest.warns(WeightsWarning, match="does not say how scans were prepared; the window of CT"):
        found = mim3d.load_scan(scan, tmp_path / "state.pt", backbone="hybrid_nano")
    assert found.intensity == Intensity() and found.multiple == (8, 8, 8)
