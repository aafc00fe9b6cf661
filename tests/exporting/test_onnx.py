"""ONNX files: run by ONNX Runtime with nothing but what lies beside them."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from mim3d.commands.export import export
from mim3d.core.errors import ConfigError
from mim3d.exporting.networks import load_exported
from mim3d.exporting.programs import described as described_network
from mim3d.exporting.programs import outputs_of

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("kind", ["encoder", "segmenter", "classifier"])
def test_onnx_runtime_computes_what_the_network_does_by_standard_operators(make, kind, tmp_path):
    run = make(kind, channels=2)
    export(str(run), str(tmp_path / "out"), format="onnx", patch_size=(8, 8, 8))
    described = json.loads((tmp_path / "out" / "metadata.json").read_text())
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"} and not model.functions
    session = onnxruntime.InferenceSession(model.SerializeToString())
    image = np.random.default_rng(0).normal(size=(3, *described["input"]["shape"][1:])).astype(np.float32)
    given = session.run([out["name"] for out in described["outputs"]], {described["input"]["name"]: image})
    with torch.no_grad():
        expected = outputs_of(load_exported(str(run)).form.program(torch.from_numpy(image)))
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(given, expected, strict=True))
    assert max(value["relative"] for value in described["parity"].values()) < 1e-4


def test_what_lies_beside_is_enough_to_use_it_from_elsewhere(make):
    network = load_exported(str(make("segmenter", task={"regions": {"organ": [2, 5], "tumour": [5]}})))
    described = described_network(network, {}, {"logits": ["batch", 2, 8, 8, 12]})
    assert described["channels"] == ["organ", "tumour"] and described["label_values"] == [2, 5]
    assert described["activation"] == "sigmoid" and "0.5" in described["label_map"]
    assert described["preprocessing"]["intensity_formula"] == "(clip(v, -160, 240) - (-160)) / 400"
    assert described["input"]["shape"] == ["batch", 1, 8, 8, 12] and "RAS" in described["input"]["axes"]


def test_a_missing_package_is_named_before_any_work(make, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ConfigError, match=r"the package onnxscript; install with: pip install 'mim3d\[onnx\]'"):
        export(str(tmp_path / "no_run"), str(tmp_path / "out"), format=["safetensors", "onnx"])
    assert not (tmp_path / "out").exists()
