"""MONAI bundles: MONAI's own runner gives the label maps that ``mim3d predict`` gives."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from mim3d.commands.export import export
from mim3d.commands.predict import predict
from mim3d.core.errors import CheckpointError
from mim3d.exporting.monai_bundle import inference_config
from mim3d.exporting.networks import load_exported
from tests.labelled import ball_scan, write_scan

#: Of the specification, https://docs.monai.io/en/stable/mb_specification.html (its schema is behind the network).
METADATA_KEYS = """version monai_version pytorch_version numpy_version required_packages_version task description
authors copyright network_data_format""".split()
TENSOR_KEYS = """type format num_channels spatial_shape dtype value_range is_patch_data channel_def""".split()


def mean_dice(first: Path, second: Path) -> float:
    """Mean over the labels of two label maps, which must lie on one grid."""
    a, b = nibabel.load(first), nibabel.load(second)
    assert a.shape == b.shape and np.allclose(a.affine, b.affine)
    x, y = np.asarray(a.dataobj), np.asarray(b.dataobj)
    labels = sorted(set(np.unique(x)) | set(np.unique(y)) - {0})
    assert len(labels) > 1
    return float(np.mean([2 * ((x == v) & (y == v)).sum() / ((x == v).sum() + (y == v).sum()) for v in labels]))


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Windows of 16 voxels, 8 apart, fit these scans: both programs cover them alike. One is turned, one is small."""
    folder = tmp_path / "scans"
    write_scan(folder / "plain.nii.gz", ball_scan(50, (24, 24, 32))[0])
    write_scan(folder / "small.nii.gz", ball_scan(51, (24, 16, 13))[0])
    image = nibabel.Nifti1Image(ball_scan(52, (24, 32, 24))[0], np.diag([1.0, 1.0, 1.2, 1.0]))
    to = nibabel.orientations.axcodes2ornt("PIL")
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), to)
    nibabel.save(image.as_reoriented(turn), folder / "turned.nii.gz")
    return folder


def test_monais_runner_segments_as_mim3d_does(segmenter_run, scans, tmp_path):
    bundle = tmp_path / "bundle"
    export(str(segmenter_run), str(bundle), format="monai")
    words = ["--config_file", "configs/inference.json", "--bundle_root", ".", "--sw_batch_size", "3"]
    places = ["--dataset_dir", str(scans), "--output_dir", str(tmp_path / "monai")]
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", *words, *places]
    subprocess.run(command, check=True, cwd=bundle, capture_output=True, timeout=300)
    own = predict(str(segmenter_run), str(tmp_path / "own"), input=str(scans), body_only=False)
    for path in sorted(scans.iterdir()):
        assert mean_dice(tmp_path / "monai" / path.name, Path(own) / path.name) > 0.999, path.name


def run_in_process(bundle: Path, scans: Path, out: Path) -> None:
    from monai.bundle import run

    config = str(bundle / "configs" / "inference.json")
    run(config_file=config, bundle_root=str(bundle), dataset_dir=str(scans), output_dir=str(out))
    assert torch.is_grad_enabled(), "a program that runs a bundle may train afterwards"


def exported_with(run: Path, folder: Path, **changes: object) -> Path:
    """The network of a run as an exported folder, with other entries in its card."""
    export(str(run), str(folder))
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, **changes}))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_scans_are_resampled_windowed_and_brought_back(segmenter_run, scans, tmp_path):
    # Both differ in where new voxels lie, by less than a voxel: see the list in the bundle's README.
    intensity = {"kind": "window", "window": [60.0, 300.0]}
    network = exported_with(segmenter_run, tmp_path / "net", spacing_mm=[1.2, 1.2, 1.2], intensity=intensity)
    bundle = tmp_path / "bundle"
    export(str(network), str(bundle), format="monai")
    run_in_process(bundle, scans, tmp_path / "monai")
    own = predict(str(network), str(tmp_path / "own"), input=str(scans), body_only=False)
    for path in sorted(scans.iterdir()):
        assert mean_dice(tmp_path / "monai" / path.name, Path(own) / path.name) > 0.85, path.name


@pytest.mark.filterwarnings("ignore")
def test_regions_paint_their_label_values(segmenter_run, tmp_path):
    """Label values of probabilities, by the bundle's own expression."""
    import torch
    from monai.bundle import ConfigParser
    from monai.data import MetaTensor

    network = load_exported(str(segmenter_run))
    regions = replace(
        network, form=replace(network.form, activation="sigmoid", label_values=(2, 5), channels=("ball", "core"))
    )
    parser = ConfigParser(inference_config(regions))
    steps = parser.get_parsed_content("postprocessing").transforms
    scores = MetaTensor(torch.tensor([[0.9, 0.9, 0.2, 0.1], [0.1, 0.8, 0.7, 0.5]]).reshape(2, 4, 1, 1))
    assert steps[2]({"pred": scores})["pred"].flatten().tolist() == [2, 5, 5, 0]
    assert torch.equal(steps[0]({"pred": scores})["pred"].as_tensor(), torch.sigmoid(scores.as_tensor()))


def test_the_folder_is_a_bundle_by_the_specification(segmenter_run, tmp_path):
    bundle = tmp_path / "bundle"
    export(str(segmenter_run), str(bundle), format="monai", license="cc-by-4.0", modality="MR")
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert {"configs/metadata.json", "models/model.pt", "docs/README.md", "docs/license.txt"} <= found
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert not set(METADATA_KEYS) - metadata.keys()
    formats = metadata["network_data_format"]
    image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
    assert not set(TENSOR_KEYS) - image.keys() and not set(TENSOR_KEYS) - pred.keys()
    assert image["modality"] == "MR" and image["spatial_shape"] == [16, 16, 16]
    assert pred["channel_def"] == {"0": "background", "1": "ball", "2": "core"}
    assert metadata["label_values"] == {"background": 0, "ball": 2, "core": 5}
    assert "cc-by-4.0" in (bundle / "docs" / "license.txt").read_text()
    assert str(tmp_path) not in "".join(path.read_text() for path in bundle.rglob("*.json"))


def test_a_card_without_intensities_makes_no_bundle(segmenter_run, tmp_path):
    network = exported_with(segmenter_run, tmp_path / "net")
    card = json.loads((network / "card.json").read_text())
    del card["intensity"]
    (network / "card.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=r"incomplete or damaged .*intensity"):
        export(str(network), str(tmp_path / "bundle"), format="monai")
    assert not (tmp_path / "bundle").exists()
