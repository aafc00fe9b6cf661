"""Rule of the house: an outsider's backbone, methods, task and preset go all the way by the command line alone."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from mim3d.cli import main
from mim3d.core.run_folder import Run, read_run
from mim3d.training.checkpoint import read_checkpoint
from mim3d.weights import load_encoder, read_card

PLAIN = "--backbone my_lab.plain.Plain"
TASK = "--task my_lab.task.MySeg"


def run(words: str) -> None:
    """Run a command as a shell would."""
    assert main(shlex.split(words)) == 0


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_run(out).metrics if "loss" in line]


def pretrain(my_lab: Path, out: Path, words: str) -> Path:
    run(
        f"pretrain --data {my_lab}/balls --out {out} --num_workers 0 --batch_size 2 --log_every 1 --checkpoint_every 2 "
        f"--pictures_every 4 --accelerator cpu {words}"
    )
    return out


@pytest.fixture(scope="module")
def views(my_lab: Path) -> Path:
    """An own backbone, pre-trained by an own method."""
    words = f"--method my_lab.views.TwoViews --method.dim 4 {PLAIN} --backbone.depth 1 --max_steps 4"
    return pretrain(my_lab, my_lab / "views", words)


@pytest.fixture(scope="module")
def tuned(my_lab: Path, views: Path) -> Path:
    """That encoder, fine-tuned on an own task with an own preset; its depth comes from the card."""
    run(
        f"finetune --preset my_lab.preset.BALLS --data {my_lab}/balls --out {my_lab}/tuned --weights {views} {PLAIN} "
        f"{TASK} --task.weight 2 --task.patch_size 16 16 16 --task.feature_dim 8 --fold 1 --max_steps 3 --batch_size 2 "
        "--num_workers 0 --accelerator cpu --optim.layer_decay 0.8"
    )
    return my_lab / "tuned"


def test_own_views_on_an_own_backbone_learn_and_the_run_holds_its_settings(views: Path) -> None:
    config = read_run(views).config
    assert config["backbone"] == {
        "name": "my_lab.plain.Plain",
        "in_channels": 1,
        "token_edge": 8,
        "width": 24,
        "depth": 1,
        "num_heads": 4,
    }
    assert config["method"] == {"name": "my_lab.views.TwoViews", "size": [16, 16, 16], "dim": 4, "temperature": 0.2}
    assert len(losses(views)) == 4
    assert read_card(views)["input_multiple"] == [8, 8, 8]


def test_a_run_with_views_of_its_own_goes_on_to_the_same_losses(my_lab: Path, views: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = f"--config {views}/config.yaml --out {out} --checkpoint_every 2"
    run(f"pretrain {config} --method my_lab.views.TwoViews {PLAIN}")
    checkpoints = sorted((out / "checkpoints").glob("step_*.pt"))
    checkpoints[-1].unlink()
    run(Run(out, "pretrain").how_to_resume.removeprefix("mim3d "))
    assert losses(out) == losses(views)


@pytest.mark.parametrize("backbone", [PLAIN, "--backbone hybrid_nano --backbone.widths 8 16 --backbone.depths 1 1"])
def test_an_own_teacher_learns_on_an_own_backbone_and_on_a_registered_one(
    my_lab: Path, tmp_path: Path, backbone: str
) -> None:
    out = pretrain(my_lab, tmp_path / "places", f"--method my_lab.places.Places {backbone} --max_steps 4")
    (newest, *_) = sorted((out / "checkpoints").glob("step_*.pt"), reverse=True)
    state = read_checkpoint(newest)["objective"]
    student = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    teacher = {name.removeprefix("teacher."): value for name, value in state.items() if name.startswith("teacher.")}
    assert student.keys() == teacher.keys()
    assert any(not torch.equal(value, teacher[name]) for name, value in student.items())
    assert list(read_run(out).pictures) == [4]
    # The student alone is taken away.
    name = read_run(out).config["backbone"]["name"]
    assert load_encoder(out, name).state_dict().keys() == student.keys()


def test_the_tuned_network_predicts_is_scored_and_is_exported(
    my_lab: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_run(tuned)
    assert record.config["backbone"]["depth"] == 1 and record.config["num_folds"] == 3
    assert record.config["task"]["name"] == "my_lab.task.MySeg" and record.config["task"]["weight"] == 2
    held_out = {row["id"] for row in json.loads((tuned / "split.json").read_text())["val"]}
    assert len(held_out) == 2
    own = f"{TASK} {PLAIN}"
    run(f"predict --weights {tuned} --out {tmp_path}/predicted --accelerator cpu {own}")
    assert {row["id"] for row in json.loads((tmp_path / "predicted" / "predictions.json").read_text())["cases"]} == (
        held_out
    )
    run(f"evaluate --predictions {tmp_path}/predicted --references {my_lab}/balls --out {tmp_path}/scores.json")
    assert json.loads((tmp_path / "scores.json").read_text())["num_cases"] == 2
    run(f"export --weights {tuned} --out {tmp_path}/hub {own}")
    run(f"export --weights {tuned} --out {tmp_path}/pt2 --format torch-export {own}")
    run(f"export --weights {tuned} --out {tmp_path}/encoder --network encoder {own}")
    run(f"predict --weights {tmp_path}/hub --out {tmp_path}/again --input {my_lab}/balls/imagesTr {own}")
    encoder = load_encoder(tmp_path / "encoder", "my_lab.plain.Plain")
    assert len(encoder.blocks) == 1 and encoder.strides == (8,)
    capsys.readouterr()


def test_all_folds_of_an_own_preset_are_those_that_it_names(my_lab: Path, tmp_path: Path) -> None:
    run(
        f"finetune --preset my_lab.preset.BALLS --data {my_lab}/balls --out {tmp_path}/all --fold all {PLAIN} "
        "--task.patch_size 16 16 16 --task.feature_dim 8 --max_steps 1 --batch_size 2 --num_workers 0 --accelerator cpu"
    )
    splits = [json.loads((tmp_path / "all" / f"fold_{fold}" / "split.json").read_text()) for fold in range(3)]
    held_out = [sorted(row["id"] for row in split["val"]) for split in splits]
    assert held_out == [["ball_0", "ball_1"], ["ball_2", "ball_3"], ["ball_4", "ball_5"]]
    assert not (tmp_path / "all" / "fold_3").exists()


def test_the_readme_of_an_export_names_the_code_that_its_commands_need(
    views: Path, tuned: Path, tmp_path: Path
) -> None:
    run(f"export --weights {views} --out {tmp_path}/views {PLAIN}")
    text = (tmp_path / "views" / "README.md").read_text()
    assert 'mim3d.load_encoder("PATH_OR_OWNER/NAME", backbone="my_lab.plain.Plain")' in text
    assert f"--weights PATH_OR_OWNER/NAME {PLAIN}\n" in text
    run(f"export --weights {tuned} --out {tmp_path}/tuned {PLAIN} {TASK}")
    assert f"--out predictions {TASK} {PLAIN}\n" in (tmp_path / "tuned" / "README.md").read_text()


def test_code_of_a_backbone_is_imported_only_when_the_user_names_it(
    my_lab: Path, views: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "which is none of mim3d's own and is imported only when you name it; if you trust its code, use --backbone"
    for words in (
        f"export --weights {views} --out {tmp_path}/out",
        f"predict --weights {tuned} --out {tmp_path}/out {TASK}",
        f"finetune --data {my_lab}/balls --weights {views} --out {tmp_path}/out --fold 0",
    ):
        capsys.readouterr()
        assert main(shlex.split(words)) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_method_and_a_backbone_that_do_not_suit_each_other_are_refused_in_a_sentence(
    my_lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(f"pretrain --data {my_lab}/balls --out {tmp_path}/out --method MiM {PLAIN}")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "method MiM needs a VisibleEncoder, which the encoder of backbone my_lab.plain.Plain is not; use a backbone "
        "such as hybrid, hybrid_nano" in said
    )
    assert not (tmp_path / "out").exists()


def test_an_own_encoder_is_probed(my_lab: Path, views: Path, tmp_path: Path) -> None:
    run(
        f"probe --data {my_lab}/balls --weights {views} --out {tmp_path}/probe.json {PLAIN} --fold 0 --num_folds 3 "
        "--probing.clear_ratio 0.5 --probing.crop_size 16"
    )
    assert (tmp_path / "probe.json").is_file()
