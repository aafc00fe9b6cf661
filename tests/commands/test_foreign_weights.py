"""Training from weights of others: what their network expects becomes the plan, and stays with what comes of it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mim3d.caching.cache import open_cache
from mim3d.commands.cache import cache
from mim3d.commands.export import export
from mim3d.commands.finetune import finetune
from mim3d.commands.pretrain import pretrain
from mim3d.core.run_folder import read_run
from mim3d.core.warned import LicenceWarning
from mim3d.inference.scan_input import LearnedInput
from mim3d.scans.intensity import Intensity
from mim3d.training.schedule import Optimisation
from mim3d.weights import describe, load_encoder, opened, read_card
from mim3d.workflows import pretrain as workflow
from mim3d.workflows.shared.initialisation import initialise
from tests.commands.conftest import TASK
from tests.weights.test_families import PlainTransformer, nnunet_file, resenc_unet, saved, three_dino_file

METHOD = {"name": "VoCo", "crop_size": [8, 8, 8], "cells": [2, 2, 1], "dim": 8}

#: What nnunet_file says of its network's voxels, along X, Y, Z.
SPACING = (0.8, 1.0, 3.0)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of nnU-Net, whose plan has a voxel size and z-scores."""
    return saved(tmp_path_factory.mktemp("weights") / "checkpoint_final.pth", nnunet_file(resenc_unet().state_dict()))


def learn(data: Path, out: Path, weights: str, **changes: object) -> Path:
    settings = {"method": METHOD, "max_steps": 1, "num_workers": 0, "log_every": 1}
    optim = Optimisation(learning_rate=1e-3)
    return Path(pretrain(str(data), str(out), **{"optim": optim, "weights": weights, **settings, **changes}))


def said(run: Path) -> str:
    return " ".join(row["text"] for row in read_run(run).manifest.get("warnings", []))


def test_pre_training_takes_network_voxel_size_and_intensities_of_foreign_weights_and_keeps_whose(
    ball_set: Path, tmp_path: Path, foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = learn(ball_set, tmp_path / "run", foreign)
    assert "nnU-Net residual encoder" in (shown := capsys.readouterr().out)
    assert "the plan follows what is known, flags such as --spacing_mm change it" in shown
    assert open_cache(run / "cache").preprocessing.spacing_mm == SPACING
    manifest, card = read_run(run).manifest, read_card(run)
    assert manifest["settings"]["spacing_mm"] == card["spacing_mm"] == list(SPACING)
    assert manifest["settings"]["backbone"]["name"] == "resenc"
    assert manifest["derived"]["intensity"]["kind"] == card["intensity"]["kind"] == "zscore"
    for kept in (manifest["derived"], card):
        assert kept["weights_origin"]["family"].startswith("nnU-Net residual encoder")
    # It goes on as it began, with the flags of the first time or without.
    learn(ball_set, tmp_path / "run", foreign, resume=True)


def test_what_contradicts_the_weights_is_said_once_and_kept(ball_set: Path, tmp_path: Path, foreign: str) -> None:
    own = Path(cache(str(ball_set), str(tmp_path / "cache"), num_workers=0))
    with pytest.warns(UserWarning, match="learned at spacing_mm 0.8 1 3, but the scans are prepared at each scan's"):
        run = learn(own, tmp_path / "run", foreign, intensity=Intensity())
    assert "prepared at each scan's own" in said(run)
    assert "mapped by z-score, but the window -1000 to 1000 was asked for" in said(run)
    assert read_card(run)["intensity"]["kind"] == "window"


def test_a_run_of_before_goes_on_as_it_began(
    ball_set: Path, tmp_path: Path, foreign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_before(*arguments: object, **named: object) -> object:
        return replace(initialise(*arguments, **named), own_spacing_mm=None, own_intensity=None)

    monkeypatch.setattr(workflow, "initialise", as_before)
    run = learn(ball_set, tmp_path / "run", foreign)
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["derived"]["intensity"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    card = json.loads((run / "encoder" / "card.json").read_text())
    (run / "encoder" / "card.json").write_text(json.dumps({**card, "intensity": {"kind": "window", "window": [0, 9]}}))
    monkeypatch.undo()
    learn(ball_set, run, foreign, resume=True)
    derived = read_run(run).manifest["derived"]
    assert read_run(run).manifest["settings"]["spacing_mm"] is None
    assert derived["intensity"]["window"] == [0, 9]


@pytest.mark.filterwarnings("ignore:.*may have lost")
def test_terms_that_are_not_commercial_go_with_whatever_is_learned_from_the_weights(
    ball_set: Path, tmp_path: Path
) -> None:
    file = saved(tmp_path / "dino.pth", three_dino_file(PlainTransformer()))
    method = {"name": "MAE", "size": [16, 16, 16], "decoder_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}
    terms = r"3DINO.*not for commercial use.*CC BY-NC-ND 4\.0.*may be bound by these terms"
    with pytest.warns(LicenceWarning, match=terms):
        run = learn(ball_set, tmp_path / "pre", file, backbone={"num_heads": 4}, method=method)
    assert re.search(terms, said(run))
    small = {"task": TASK, "max_steps": 1, "num_workers": 0, "optim": Optimisation(learning_rate=1e-3)}
    with pytest.warns(LicenceWarning, match=terms):
        tuned = finetune(str(ball_set), str(tmp_path / "tuned"), weights=str(run), **small)
    out = tmp_path / "out"
    with pytest.warns(LicenceWarning, match=f"tuned: .*{terms}, which the export says"):
        export(tuned, str(out), license="cc-by-4.0")
    with pytest.warns(LicenceWarning, match=terms):
        again = learn(ball_set, tmp_path / "again", str(out), method=method)
    for place in (run, tuned, out, again):
        card = read_card(place)
        assert card["weights_origin"]["family"].startswith("3DINO")
        assert not card["weights_origin"]["commercial"]
        assert [row["kind"] for row in card["warnings"]].count("licence") == 1
    readme = " ".join((out / "README.md").read_text().split())
    assert re.search(rf"Licence of the weights: cc-by-4\.0\. Training began with weights of {terms}", readme)
    assert "licence: not for commercial use" in describe(out).rows["began with"]


def test_an_export_of_foreign_weights_says_whose_they_are_and_plans_as_they_do(tmp_path: Path, foreign: str) -> None:
    out = tmp_path / "out"
    export(foreign, str(out))
    card = read_card(out)
    assert card["weights_origin"]["family"].startswith("nnU-Net residual encoder")
    assert (card["spacing_mm"], card["intensity"]["kind"]) == (list(SPACING), "zscore")
    assert "Training began with weights of nnU-Net residual encoder" in (out / "README.md").read_text()


def test_foreign_weights_are_read_once(foreign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    original = opened.read_weights
    monkeypatch.setattr(opened, "read_weights", lambda *given: read.append(given) or original(*given))
    for begin in (
        lambda: initialise(None, foreign, 1),
        lambda: load_encoder(foreign),
        lambda: LearnedInput.of(foreign),
    ):
        read.clear()
        begin()
        assert len(read) == 1


def test_what_weights_do_not_fill_is_drawn_by_the_seed(ball_set: Path, tmp_path: Path) -> None:
    state = resenc_unet().state_dict()
    part = {key: value for key, value in state.items() if "stages.2" not in key}
    file = saved(tmp_path / "part.pth", part)
    encoders = []
    for number in range(2):
        torch.manual_seed(number)
        with pytest.warns(UserWarning, match="start anew"):
            backbone = {"name": "resenc", "widths": [4, 8, 16], "depths": [1, 2, 1]}
            optim = Optimisation(learning_rate=1e-3)
            out, small = str(tmp_path / f"{number}"), {"task": TASK, "max_steps": 1, "num_workers": 0, "optim": optim}
            finetune(str(ball_set), out, weights=file, backbone=backbone, min_coverage=0.1, fold=None, **small)
        encoders.append(load_encoder(out + "/segmenter").state_dict())
    assert all(torch.equal(encoders[0][name], value) for name, value in encoders[1].items())
