"""Weights by the id of a Hugging Face repository, with a stand-in for huggingface_hub: tests have no network."""

import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

import mim3d
from mim3d.backbones import BACKBONES, create_recipe
from mim3d.core.errors import CheckpointError
from mim3d.core.settings import to_named
from mim3d.weights import folders, is_hub_id, load_into, read_card, read_state, save_network, weights_digest


class Site:
    """Repositories by (id, revision), and what was asked for."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.repositories: dict[tuple[str, str | None], Path] = {}
        self.calls: list[tuple[str, str | None]] = []

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append((repo_id, revision))
        if (repo_id, revision) not in self.repositories:
            raise ConnectionError(f"404 Client Error.\n\nRepository Not Found: {repo_id}")
        source = self.repositories[repo_id, revision]
        target = self.cache / f"{repo_id.replace('/', '--')}@{revision}"
        target.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (source / name).is_file():
                shutil.copy(source / name, target / name)
        return str(target)


@pytest.fixture
def site(tmp_path, monkeypatch):
    made = Site(tmp_path / "cache")
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = made.snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    folders._snapshot.cache_clear()
    yield made
    folders._snapshot.cache_clear()


@pytest.fixture
def encoder_folder(tmp_path):
    recipe = create_recipe({"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2})
    save_network(tmp_path / "stored", recipe.build(), {"backbone": to_named(recipe, BACKBONES)})
    (tmp_path / "stored" / "scans.nii.gz").write_bytes(b"large")
    return tmp_path / "stored"


@pytest.mark.parametrize("name", ["lab/encoder", "hf://lab/encoder", "hf:/lab/encoder"])
def test_every_reader_takes_an_id(site, encoder_folder, name):
    site.repositories["lab/encoder", None] = encoder_folder
    assert read_card(name) == read_card(encoder_folder)
    assert weights_digest(name) == weights_digest(encoder_folder)
    assert read_state(name).keys() == read_state(encoder_folder).keys()
    encoder = mim3d.load_encoder(name)
    assert load_into(encoder, name).coverage == 1
    # Card and weights are of one revision: the repository is looked up once.
    assert site.calls == [("lab/encoder", None)]
    assert not list(site.cache.rglob("*.nii.gz"))


def test_a_revision_is_asked_for(site, encoder_folder):
    site.repositories["lab/encoder", "v1.0"] = encoder_folder
    for name in ("hf://lab/encoder@v1.0", "lab/encoder@v1.0"):
        volume = torch.ones(1, 1, 8, 8, 8)
        given, own = (mim3d.load_encoder(path).feature_maps(volume) for path in (name, encoder_folder))
        assert all(torch.equal(a, b) for a, b in zip(given, own, strict=True))


def test_a_path_here_is_never_looked_up_elsewhere(site, encoder_folder, tmp_path):
    (tmp_path / "runs").mkdir()
    shutil.copytree(encoder_folder, tmp_path / "runs" / "pre")
    assert mim3d.load_encoder("runs/pre").recipe.widths == (8, 16)
    # A mistyped name among one's own folders is a mistyped name.
    with pytest.raises(CheckpointError, match=r"runs/pro does not exist"):
        mim3d.load_encoder("runs/pro")
    for path in ("runs/pre", "runs/pro", "/lab/encoder", "./lab/encoder", "lab", "lab/encoder/x", "../lab/encoder"):
        assert not is_hub_id(path), path
    assert is_hub_id("lab/encoder") and is_hub_id("hf://runs/pre")
    assert site.calls == []


def test_what_cannot_be_fetched_is_told_in_one_sentence(site):
    with pytest.raises(CheckpointError) as caught:
        mim3d.load_encoder("lab/none")
    assert "could not be fetched from Hugging Face (404 Client Error. Repository Not Found: lab/none)" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    folders._snapshot.cache_clear()
    with pytest.raises(CheckpointError, match=r"huggingface_hub; .* pip install 'mim3d\[hub\]'"):
        read_card("lab/encoder")
