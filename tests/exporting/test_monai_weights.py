"""Encoders as weights of MONAI's own networks: loaded there by name, they give equal features."""

import json
import re
from pathlib import Path

import monai.networks.nets
import pytest
import torch

import mim3d
from mim3d.commands.export import export
from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.exporting import named_for_monai

SWIN = {"name": "swin", "feature_size": 12, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 3}
VIT = {"name": "vit", "width": 24, "depth": 2, "num_heads": 2, "token_edge": 8}


pytest.importorskip("einops")


def network_of(folder: Path, file: str):
    """MONAI's network as the index describes it, filled by name."""
    entry = json.loads((folder / "networks.json").read_text())[file]
    others = {} if entry["network"] == "ViT" else {"out_channels": 2}
    network = getattr(monai.networks.nets, entry["network"])(**entry["arguments"], **others).eval()
    found = network.load_state_dict(torch.load(folder / file, weights_only=True), strict=False)
    assert not found.unexpected_keys
    return network, found.missing_keys


@pytest.mark.parametrize("v2", [False, True])
def test_a_swin_is_the_encoder_of_swin_unetr(make, tmp_path, v2):
    run = make("encoder", backbone={**SWIN, "v2": v2}, channels=2)
    export(str(run), str(tmp_path / "out"), format="monai-weights", patch_size=(32, 32, 32))
    network, missing = network_of(tmp_path / "out", "swinunetr.pt")
    assert missing and not [key for key in missing if key.startswith("swinViT.")]
    image = torch.randn(1, 2, 32, 32, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for ours, theirs in zip(mim3d.load_encoder(run).feature_maps(image), network.swinViT(image), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "size", "files"),
    [({}, (16, 16, 24), ["vit.pt"]), ({"depth": 12, "token_edge": 16}, (32, 16, 48), ["unetr.pt", "vit.pt"])],
)
def test_a_vit_is_monais(make, tmp_path, changes, size, files):
    run = make("encoder", backbone={**VIT, **changes})
    export(str(run), str(tmp_path / "out"), format="monai-weights", patch_size=size)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.pt")) == files
    image = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(1))
    (ours,) = mim3d.load_encoder(run).feature_maps(image)
    for file in files:
        network, missing = network_of(tmp_path / "out", file)
        vit = network if file == "vit.pt" else network.vit
        assert not [key for key in missing if file == "vit.pt" or key.startswith("vit.")]
        for module in vit.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-6
        with torch.no_grad():
            torch.testing.assert_close(ours.flatten(2).transpose(1, 2), vit(image)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", [SWIN, {**VIT, "depth": 12, "token_edge": 16}])
def test_the_lines_of_the_readme_load_the_file(make, tmp_path, monkeypatch, backbone):
    export(str(make("encoder", backbone=backbone)), str(tmp_path / "out"), format="monai-weights", patch_size=(32,) * 3)
    monkeypatch.chdir(tmp_path / "out")
    for code in re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S):
        names: dict = {}
        exec(code if "import torch" in code else "import torch\nnet = torch.nn.Identity()\n" + code, names)
        assert "found" not in names or names["net"].state_dict()


@pytest.mark.parametrize(
    "backbone",
    [
        {**SWIN, "depths": [1, 1], "num_heads": [1, 1]},
        {**SWIN, "downsample": "published"},
        {**VIT, "positions": "rotary"},
        {**VIT, "num_registers": 2},
        {**VIT, "mlp": "swiglu"},
        {**VIT, "layer_scale": 0.1},
        None,
    ],
)
def test_what_monai_has_no_network_for_is_refused(make, tmp_path, backbone):
    run = make("encoder", backbone=backbone)
    with pytest.raises(CheckpointError, match=r"none of MONAI's networks computes the same"):
        export(str(run), str(tmp_path / "out"), format="monai-weights")
    assert not (tmp_path / "out").exists()


def test_a_missing_package_of_monai_is_named(make, tmp_path, monkeypatch):
    monkeypatch.setattr(named_for_monai, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"einops; install with: pip install 'mim3d\[monai\]'"):
        export(str(make("encoder", backbone=SWIN)), str(tmp_path / "out"), format="monai-weights")
