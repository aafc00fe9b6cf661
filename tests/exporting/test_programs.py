"""Exported programs: plain operators, any number of samples, any device, the same numbers as the network."""

import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import mim3d
from mim3d.commands.export import export
from mim3d.core.errors import CheckpointError
from mim3d.exporting import programs
from mim3d.exporting.networks import EncoderProgram, load_exported
from mim3d.exporting.programs import difference, outputs_of, traced
from tests.exporting.conftest import BACKBONE


def test_operators_of_our_own_become_the_librarys(make):
    network = load_exported(str(make("segmenter")))
    graph = traced(network.form.program, network.num_channels, network.patch_size)
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "mim3d" in name]
    assert {"aten.conv3d.default", "aten.gelu.default", "aten.layer_norm.default"} <= called


def test_a_program_takes_any_number_of_samples_and_moves_to_another_device(make):
    network = load_exported(str(make("encoder")), patch_size=(8, 8, 8))
    module = torch.export.unflatten(traced(network.form.program, 1, (8, 8, 8)))
    for number in (1, 3):
        image = torch.randn(number, 1, 8, 8, 8)
        with torch.no_grad():
            expected = network.form.program(image)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(module(image), expected, strict=True))
    # No memory lies behind this device, but every operator checks that its tensors are on one.
    moved = module.to("meta")(torch.zeros(1, 1, 8, 8, 8, device="meta"))
    assert [tuple(features.shape) for features in moved] == [(1, 8, 4, 4, 4), (1, 16, 2, 2, 2)]


def test_the_way_a_projection_is_computed_ties_no_program_to_a_number_of_samples():
    # Its weight has as many values as the features of four samples: training computes three in another way than five.
    encoder = mim3d.create_model({**BACKBONE, "widths": [16, 32]}).eval()
    module = torch.export.unflatten(traced(EncoderProgram(encoder), 1, (8, 8, 8)))
    for number in (1, 3, 5):
        image = torch.randn(number, 1, 8, 8, 8)
        with torch.no_grad():
            assert difference(encoder.feature_maps(image), list(module(image))).relative < 1e-5
    assert "forward" not in vars(encoder.patch_embed1.proj)


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_a_pt2_archive_computes_what_its_network_does(make, kind, tmp_path, capsys):
    run = make(kind)
    export(str(run), str(tmp_path / "out"), format="torch-export", license="mit", modality="CT")
    described = json.loads((tmp_path / "out" / "metadata.json").read_text())
    network = load_exported(str(run))
    image = torch.randn(3, *described["input"]["shape"][1:])
    module = torch.export.load(tmp_path / "out" / "model.pt2").module()
    with torch.no_grad():
        given, expected = outputs_of(module(image)), outputs_of(network.form.program(image))
    assert difference(expected, given).relative < 1e-5
    assert [["batch", *tensor.shape[1:]] for tensor in expected] == [out["shape"] for out in described["outputs"]]
    assert (described["license"], described["modality"]) == ("mit", "CT")
    assert "random input: largest difference" in capsys.readouterr().out


def test_a_pt2_archive_runs_without_mim3d(make, tmp_path):
    run = make("segmenter")
    export(str(run), str(tmp_path / "out"), format="torch-export")
    image = torch.randn(1, 1, 8, 8, 12)
    with torch.no_grad():
        expected = load_exported(str(run)).form.program(image)
    np.save(tmp_path / "image.npy", image.numpy())
    code = """
import sys
import numpy, torch
network = torch.export.unflatten(torch.export.load(sys.argv[1] + "/out/model.pt2")).eval()
image = torch.from_numpy(numpy.load(sys.argv[1] + "/image.npy"))
numpy.save(sys.argv[1] + "/logits.npy", network(image).detach().numpy())
assert not [name for name in sys.modules if name.startswith("mim3d")]
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True, cwd=tmp_path)
    assert np.allclose(np.load(tmp_path / "logits.npy"), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["torch-export", "onnx"])
def test_a_program_names_no_folder_of_the_machine_that_made_it(make, name, tmp_path):
    if name == "onnx":
        pytest.importorskip("onnxscript")
    export(str(make("segmenter")), str(tmp_path / "out"), format=name)
    (path,) = (tmp_path / "out").glob("model.*")
    contents = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            contents = [archive.read(member) for member in archive.namelist()]
    for folder in (os.path.dirname(mim3d.__file__), os.path.dirname(torch.__file__), str(tmp_path)):
        assert not [content for content in contents if folder.encode() in content]


def test_a_program_that_computes_something_else_is_refused_and_deleted(make, tmp_path, monkeypatch):
    def without_gelu(features, norm_weight, norm_bias, weight, bias, out_weight, out_bias, eps, products):
        normed = torch.nn.functional.layer_norm(features, norm_weight.shape, norm_weight, norm_bias, eps)
        hidden = torch.nn.functional.linear(normed, weight, bias)
        return features + torch.nn.functional.linear(hidden, out_weight, out_bias)

    monkeypatch.setattr(programs, "plain_residual_mlp", without_gelu)
    with pytest.raises(CheckpointError, match=r"model.pt2 does not compute what its network does .* deleted"):
        export(str(make("segmenter")), str(tmp_path / "out"), format="torch-export")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_differences_are_told_apart():
    one = torch.tensor([1.0, 2.0])
    assert difference([one], [one + 0.5]).relative == pytest.approx(0.25)
    assert difference([one], [one[:1]]) is None
    assert difference([one], [one, one]) is None
    assert not difference([one], [one * float("nan")]).relative <= 1e9
