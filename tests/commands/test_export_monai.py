"""MONAI bundles: MONAI's own runner gives the label maps that ``mim3d predict`` gives."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from mim3d.caching.foreground import threshold_of
from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.caching.resampling import plan_axis
from mim3d.commands.export import export
from mim3d.commands.predict import predict
from mim3d.core.errors import CheckpointError
from mim3d.datasets.cases import Case
from mim3d.exporting.carried import carried_source
from mim3d.exporting.monai_scans import PrepareScand, WindowsInferer
from mim3d.inference.windows import body_windows, window_weights
from tests.labelled import ball_scan, write_scan

#: Of the specification, https://docs.monai.io/en/stable/mb_specification.html (its schema is behind the network).
METADATA_KEYS = """version monai_version pytorch_version numpy_version required_packages_version task description
authors copyright network_data_format""".split()
TENSOR_KEYS = """type format num_channels spatial_shape dtype value_range is_patch_data channel_def""".split()


def share_that_differs(first: Path, second: Path) -> float:
    """Share of the voxels in which two label maps differ; they must lie on one grid and show something."""
    a, b = nibabel.load(first), nibabel.load(second)
    assert a.shape == b.shape and np.allclose(a.affine, b.affine)
    x, y = np.asarray(a.dataobj), np.asarray(b.dataobj)
    assert len(np.unique(x)) > 1
    return float((x != y).mean())


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Windows of 16 voxels fit none of these scans. One is turned, one is small, one has air around a body."""
    folder = tmp_path / "scans"
    write_scan(folder / "plain.nii.gz", ball_scan(50, (27, 22, 35))[0])
    write_scan(folder / "small.nii.gz", ball_scan(51, (24, 16, 13))[0])
    image = nibabel.Nifti1Image(ball_scan(52, (24, 32, 24))[0], np.diag([1.0, 1.0, 1.2, 1.0]))
    to = nibabel.orientations.axcodes2ornt("PIL")
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), to)
    nibabel.save(image.as_reoriented(turn), folder / "turned.nii.gz")
    inside = ball_scan(53, (24, 24, 24))[0]
    write_scan(folder / "body.nii.gz", np.pad(inside, ((14, 5), (3, 0), (9, 12)), constant_values=inside.min()))
    return folder


def test_monais_runner_segments_as_mim3d_does(segmenter_run, scans, tmp_path):
    bundle = tmp_path / "bundle"
    export(str(segmenter_run), str(bundle), format="monai")
    words = ["--config_file", "configs/inference.json", "--bundle_root", ".", "--sw_batch_size", "3"]
    places = ["--dataset_dir", str(scans), "--output_dir", str(tmp_path / "monai")]
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", *words, *places]
    subprocess.run(command, check=True, cwd=bundle, capture_output=True, timeout=300)
    own = predict(str(segmenter_run), str(tmp_path / "own"), input=str(scans))
    for path in sorted(scans.iterdir()):
        assert share_that_differs(tmp_path / "monai" / path.name, Path(own) / path.name) == 0, path.name


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
    intensity = {"kind": "window", "window": [60.0, 300.0]}
    network = exported_with(segmenter_run, tmp_path / "net", spacing_mm=[1.2, 0.9, 1.4], intensity=intensity)
    bundle = tmp_path / "bundle"
    export(str(network), str(bundle), format="monai")
    run_in_process(bundle, scans, tmp_path / "monai")
    own = predict(str(network), str(tmp_path / "own"), input=str(scans))
    for path in sorted(scans.iterdir()):
        assert share_that_differs(tmp_path / "monai" / path.name, Path(own) / path.name) == 0, path.name


def test_regions_paint_their_label_values_and_windows_are_mirrored():
    """Of a network that is wrong by as much at one end of Z as at the other, in the other direction."""
    scan = MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.eye(4, dtype=torch.float64))
    scan[0, 0], scan[0, 1] = 1.0, 0.6
    prepared = PrepareScand("image", spacing_mm=None, kind="window", window=(0, 1))({"image": scan})["image"]
    ramp = torch.tensor([9.0, 1.0, -1.0, -9.0])
    inferer = WindowsInferer(
        (4, 4, 4),
        overlap=0.5,
        sw_batch_size=1,
        mirror_axes=[2],
        body_only=False,
        activation="sigmoid",
        channels=["ball", "core"],
        label_values=[2, 5],
    )
    labels = inferer(prepared[None], lambda image: torch.cat([image - 0.5 + ramp, image - 0.8 + ramp], dim=1))
    assert labels[0, 0].reshape(4, -1).unique(dim=1).flatten().tolist() == [5, 2, 0, 0]


def test_whole_numbers_are_rounded_where_the_file_of_a_channel_holds_integers(tmp_path):
    """As predict does: fractions that happen to be whole stay fractions when they are resampled."""
    voxels = ball_scan(54, (8, 8, 8))[0]
    case = Case(id="a", images=(str(tmp_path / "0.nii.gz"), str(tmp_path / "1.nii.gz")))
    for path, dtype in zip(case.images, (np.int16, np.float32), strict=True):
        write_scan(Path(path), np.rint(voxels).astype(dtype))
    wanted = prepare(case, Preprocessing(spacing_mm=(1.3, 1.3, 1.3)))
    step = PrepareScand("image", spacing_mm=[1.3, 1.3, 1.3], kind="window", window=(-500, 500))
    stacked = torch.from_numpy(np.stack([np.rint(voxels)] * 2))
    scan = MetaTensor(stacked, affine=torch.from_numpy(nibabel.load(case.images[0]).affine))
    found = step({"image": scan, "files": list(case.images)})["image"].as_tensor().numpy()
    assert np.array_equal(found, step.intensity.apply(wanted.image, wanted.statistics))
    assert not np.array_equal(found[0], found[1])


def test_what_a_bundle_carries_is_the_code_of_predict():
    carried = carried_source("mim3d.exporting.monai_scans")
    compile(carried, "scans.py", "exec")
    for used in (plan_axis, threshold_of, body_windows, window_weights):
        assert inspect.getsource(used) in carried
    assert not re.search(r"^\s*(import|from) mim3d", carried, re.MULTILINE)


def test_the_folder_is_a_bundle_by_the_specification(segmenter_run, tmp_path):
    bundle = tmp_path / "bundle"
    export(str(segmenter_run), str(bundle), format="monai", license="cc-by-4.0", modality="MR")
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert {
        "configs/metadata.json",
        "scripts/scans.py",
        "models/model.pt",
        "docs/README.md",
        "docs/license.txt",
    } <= found
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
