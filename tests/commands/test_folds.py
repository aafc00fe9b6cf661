"""All folds by one command: complete runs, kept when it is run again, and a summary that adds up."""

import json
import shutil
import warnings
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

from mim3d.backbones import BACKBONES, create_recipe
from mim3d.caching.build import build_cache
from mim3d.caching.cache import open_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.cli import main
from mim3d.commands.finetune import finetune
from mim3d.core.errors import CheckpointError, ConfigError, DataError
from mim3d.core.run_folder import read_run
from mim3d.core.settings import read_yaml, to_named
from mim3d.datasets.cases import read_cases
from mim3d.datasets.published.folds import fold_numbers
from mim3d.datasets.published.presets import find_preset
from mim3d.weights import read_card, save_network
from mim3d.workflows.finetune import folds as module
from mim3d.workflows.finetune.data import read_training_data
from mim3d.workflows.finetune.folds import finetune_folds
from mim3d.workflows.finetune.run import FinetuneResult, finetune_once
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.shared.leakage import SEEN_NAME, identities_of, seen_from, write_seen
from tests.commands.conftest import BACKBONE, TASK
from tests.miniatures import MINIATURES, Miniature
from tests.training.toy_training import comparable

SETTINGS = {
    "task": TASK,
    "backbone": BACKBONE,
    "fold": "all",
    "num_folds": 3,
    "max_steps": 2,
    "batch_size": 2,
    "num_workers": 0,
    "intensity": None,
}


@pytest.fixture(scope="module")
def folds(ball_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folds") / "all"
    return Path(finetune(str(ball_set), str(out), **SETTINGS))


def test_every_fold_is_a_complete_run_and_every_case_validates_once(folds: Path) -> None:
    held_out = []
    for fold in range(3):
        run = folds / f"fold_{fold}"
        assert read_card(run, ("segmenter",))["scores"]["dice"] >= 0
        held_out += [case["id"] for case in json.loads((run / "split.json").read_text())["val"]]
        assert not (run / "cache").exists()
    assert sorted(held_out) == [f"ball_{index}" for index in range(6)]
    assert (folds / "cache").is_dir()


def test_the_summary_holds_mean_and_deviation_over_the_folds(folds: Path) -> None:
    summary = json.loads((folds / "summary.json").read_text())
    scores = [read_card(folds / f"fold_{fold}", ("segmenter",))["scores"]["dice"] for fold in range(3)]
    assert [fold["scores"]["dice"] for fold in summary["folds"]] == scores
    assert summary["mean"]["dice"] == pytest.approx(fmean(scores))
    assert summary["standard_deviation"]["dice"] == pytest.approx(stdev(scores))


def test_all_folds_have_the_plan_of_the_first(folds: Path) -> None:
    configs = [json.loads((folds / f"fold_{fold}" / "manifest.json").read_text())["settings"] for fold in range(3)]
    assert all(config["intensity"] == configs[0]["intensity"] for config in configs)
    assert configs[0]["intensity"] is not None


def test_run_again_it_keeps_what_is_finished_and_makes_what_is_missing(folds: Path, capsys) -> None:
    lines = {fold: (folds / f"fold_{fold}" / "metrics.jsonl").read_text() for fold in (0, 1)}
    shutil.rmtree(folds / "fold_2")
    assert main(["finetune", "--config", str(folds / "config.yaml"), "--out", str(folds), "--resume", "true"]) == 0
    told = capsys.readouterr().out
    assert "fold 2 of 3" in told and f"mim3d predict --weights {folds}/fold_*" in told
    assert "standard\n" in told and "deviation\n" in told
    assert (folds / "fold_2" / "segmenter" / "model.safetensors").is_file()
    assert lines == {fold: (folds / f"fold_{fold}" / "metrics.jsonl").read_text() for fold in (0, 1)}


@pytest.mark.parametrize("place", [shutil.copytree, shutil.move])
def test_folds_go_on_wherever_their_folder_is(folds: Path, tmp_path: Path, place) -> None:
    shutil.copytree(folds, tmp_path / "first")
    for file in [*(tmp_path / "first").rglob("*.yaml"), *(tmp_path / "first").glob("*/manifest.json")]:
        file.write_text(file.read_text().replace(str(folds), str(tmp_path / "first")))
    lines = (folds / "fold_2" / "metrics.jsonl").read_text().splitlines()
    place(tmp_path / "first", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "fold_2")
    assert main(["finetune", "--out", str(tmp_path / "other"), "--resume", "true"]) == 0
    again = (tmp_path / "other" / "fold_2" / "metrics.jsonl").read_text().splitlines()
    assert comparable([json.loads(line) for line in again]) == comparable([json.loads(line) for line in lines])
    # One fold alone finds the cache that has moved with it.
    assert main(["finetune", "--out", str(tmp_path / "other" / "fold_1"), "--resume", "true"]) == 0
    assert not (tmp_path / "other" / "fold_1" / "cache").exists()


def test_one_fold_on_top_of_all_of_them_is_told_how_they_go_on(folds: Path, capsys) -> None:
    assert main(["finetune", "--out", str(folds), "--resume", "true", "--fold", "0"]) == 2
    said = f"{folds} holds the runs of all folds, each in a folder of its own; go on with all of them by mim3d finetune"
    assert said in capsys.readouterr().err


def test_existing_folds_are_refused_without_resume(ball_set: Path, folds: Path) -> None:
    with pytest.raises(ConfigError, match=r"fold_0 holds a run already; go on by --resume true"):
        finetune(str(ball_set), str(folds), **SETTINGS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_folds": 7}, DataError, "6 patients cannot be split into 7 folds"),
        ({"num_folds": 1}, ConfigError, "num_folds >= 2"),
        ({"num_folds": 0}, ConfigError, "num_folds is 0, but fold all needs num_folds >= 2"),
        ({"devices": 2}, ConfigError, "one device"),
        ({"train_cases": 5}, DataError, "no more than 4 patients"),
        ({"task": "segmentatoin"}, ConfigError, "segmentation"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_fold(ball_set, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        finetune(str(ball_set), str(tmp_path / "out"), **{**SETTINGS, **changes})
    assert not (tmp_path / "out").exists()


def test_a_declared_split_is_no_set_of_folds(ball_set: Path, tmp_path: Path) -> None:
    rows = ["image,label,split"]
    for index in range(6):
        part = "val" if index == 0 else "train"
        rows.append(f"{ball_set}/imagesTr/ball_{index}.nii.gz,{ball_set}/labelsTr/ball_{index}.nii.gz,{part}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    with pytest.raises(ConfigError, match="all folds would be the same"):
        finetune(str(tmp_path / "list.csv"), str(tmp_path / "out"), **SETTINGS)


def settings(data: Path, out: Path, **changes: object) -> FinetuneSettings:
    return FinetuneSettings(str(data), str(out), **{"fold": "all", "num_folds": 3, **changes})


def test_a_fold_that_stops_ends_the_session_and_later_folds_wait(
    ball_set: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    seen = []

    def stopped(given, every_fold) -> FinetuneResult:
        seen.append(given.fold)
        return FinetuneResult(Path(given.out), finished=given.fold == 0, step=1, scores={"dice": 0.5})

    monkeypatch.setattr(module, "finetune_once", stopped)
    finetune_folds(settings(ball_set, tmp_path / "out"))
    assert seen == [0, 1]
    assert "1 of 3 folds is finished; go on with: mim3d finetune --out" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["standard_deviation"] == {"dice": None}


def test_the_longest_time_is_that_of_all_folds_together(ball_set: Path, tmp_path: Path, monkeypatch) -> None:
    now = iter([0.0, 0.0, 40.0, 61.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    seen = []

    def quick(given, every_fold) -> FinetuneResult:
        seen.append(given.max_time)
        return FinetuneResult(Path(given.out), finished=True, step=1, scores={})

    monkeypatch.setattr(module, "finetune_once", quick)
    finetune_folds(settings(ball_set, tmp_path / "out", max_time="00:01:00"))
    assert seen == ["00:01:00", "00:00:20"]


#: One case of every published fold of BTCV, in the order of the folds.
CASES = ("35", "29", "23", "7", "1")

PRESET = {
    "preset": "BTCV",
    "task": {**TASK, "patch_size": [16, 16, 8]},
    "fold": "all",
    "max_steps": 2,
    "batch_size": 1,
    "num_workers": 0,
    "pictures_every": None,
    "strict": False,
}


def write_encoder(folder: Path, seen=(), seed: int = 1) -> Path:
    """A run of pre-training, as far as fine-tuning looks at it, that learned from some scans."""
    torch.manual_seed(seed)
    recipe = create_recipe(BACKBONE)
    folder.mkdir(parents=True)
    write_seen(folder, seen_from(list(seen), None))
    card = {"backbone": to_named(recipe, BACKBONES), "spacing_mm": None}
    save_network(folder / "encoder", recipe.build(), card, beside=[folder / SEEN_NAME])
    return folder


@pytest.fixture(scope="module")
def btcv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of BTCV in which every fold holds one case out."""
    folder = tmp_path_factory.mktemp("btcv")
    mini = MINIATURES["BTCV"]
    mini.write(Miniature(mini.name, CASES[1:], CASES[:1], mini.write), folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(btcv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that learned from the cases that fold 0 trains on, stored as pre-training does."""
    root = tmp_path_factory.mktemp("pretrained")
    cases = read_cases(str(btcv / "imagesTr"), recursive_images_only=True)
    scans = build_cache(cases, root / "cache", Preprocessing(intensities="8-bit"))
    seen = [scan for scan in identities_of(scans) if "0035" not in scan.id]
    assert len(seen) == len(CASES) - 1
    return write_encoder(root / "run", seen)


@pytest.fixture(scope="module")
def preset_folds(btcv: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory):
    """All folds of the preset from the encoder, killed between fold 2 and fold 3, and the warnings of each fold."""
    out = tmp_path_factory.mktemp("preset") / "all"
    told: dict[int, list[str]] = {}

    def killed(given, every_fold) -> FinetuneResult:
        if given.fold == 3:
            raise KeyboardInterrupt
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = finetune_once(given, every_fold=every_fold)
        told[given.fold] = [str(warning.message) for warning in caught]
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "finetune_once", killed)
        finetune(str(btcv), str(out), weights=str(pretrained), **PRESET)
    return out, told


def test_each_fold_of_a_preset_holds_out_its_published_cases_and_starts_from_the_weights(preset_folds):
    out, _ = preset_folds
    for fold in range(3):
        split = json.loads((out / f"fold_{fold}" / "split.json").read_text())
        assert [case["id"][-4:] for case in split["val"]] == [CASES[fold].zfill(4)]
        assert CASES[fold] in fold_numbers(find_preset("BTCV"))[fold] and len(split["train"]) == len(CASES) - 1
        config = read_run(out / f"fold_{fold}").config
        assert config["intensity"]["window"] == [-175.0, 250.0] and config["spacing_mm"] == [1.5, 1.5, 2.0]
        assert config["backbone"]["widths"] == BACKBONE["widths"]
    assert {scan.case.id[-4:] for scan in open_cache(out / "cache")} == {number.zfill(4) for number in CASES}


def test_every_fold_but_the_one_that_pretraining_left_out_says_that_its_case_was_seen(preset_folds, pretrained):
    _, told = preset_folds
    seen = {fold: [line for line in lines if "in the pre-training data of" in line] for fold, lines in told.items()}
    assert [len(seen[fold]) for fold in range(3)] == [0, 1, 1]
    for fold in (1, 2):
        expected = f"1 of 1 held-out cases is in the pre-training data of {pretrained}: img{CASES[fold].zfill(4)} ("
        assert seen[fold][0].startswith(expected)


def test_what_is_missing_is_told_by_its_fold_alone(preset_folds):
    _, told = preset_folds
    for fold, lines in told.items():
        missing = [line for line in lines if "not here, the first" in line]
        assert len(missing) == 2 and all(f"fold {fold} of BTCV" in line for line in missing)


def test_killed_between_two_folds_it_has_a_summary_and_goes_on_to_the_end(preset_folds, capsys):
    out, _ = preset_folds
    before = json.loads((out / "summary.json").read_text())
    assert [fold["fold"] for fold in before["folds"]] == [0, 1, 2] and before["num_folds"] == 5
    metrics = {fold: (out / f"fold_{fold}" / "metrics.jsonl").read_text() for fold in range(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["finetune", "--config", str(out / "config.yaml"), "--out", str(out), "--resume", "true"]) == 0
    told = capsys.readouterr().out
    assert told.count("preset BTCV (published folds): 4 cases to train on, 1 held out") == 5
    assert f"mim3d predict --weights {out}/fold_*" in told
    summary = json.loads((out / "summary.json").read_text())
    assert summary["folds"][:3] == before["folds"] and [fold["path"] for fold in summary["folds"][3:]] == [
        "fold_3",
        "fold_4",
    ]
    scores = [read_card(out / f"fold_{fold}", ("segmenter",))["scores"]["dice"] for fold in range(5)]
    assert summary["mean"]["dice"] == pytest.approx(fmean(scores))
    assert metrics == {fold: (out / f"fold_{fold}" / "metrics.jsonl").read_text() for fold in range(3)}


def test_resumed_from_other_weights_it_is_refused_and_can_still_go_on_as_it_was(preset_folds, btcv, tmp_path):
    out, _ = preset_folds
    config = read_yaml(out / "config.yaml")
    other = write_encoder(tmp_path / "other", seed=2)
    with pytest.raises(ConfigError, match="other weights: its content has changed"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        finetune(str(btcv), str(out), weights=str(other), resume=True, **PRESET)
    assert read_yaml(out / "config.yaml") == config


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_folds": 3}, ConfigError, "the 5 folds of preset BTCV are fixed"),
        ({"split_seed": 1}, ConfigError, "split_seed is 1"),
        ({"strict": None}, DataError, "5 of the 6 cases that fold 0 of BTCV holds out"),
        ({"preset": "BCTV"}, ConfigError, "Did you mean 'BTCV'"),
    ],
)
def test_what_a_preset_is_not_for_is_refused_before_the_first_of_all_folds(btcv, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        finetune(str(btcv), str(tmp_path / "out"), **{**PRESET, **changes})
    assert not (tmp_path / "out").exists()


def test_a_preset_of_which_a_fold_has_no_case_is_refused_before_the_first_fold(tmp_path):
    mini = MINIATURES["BTCV"]
    mini.write(mini, tmp_path / "set")
    with pytest.raises(DataError, match="6 of the 6 cases that fold 2 of BTCV holds out"):
        finetune(str(tmp_path / "set"), str(tmp_path / "out"), **PRESET)
    assert not (tmp_path / "out").exists()


def test_a_cache_of_a_preset_serves_all_folds(btcv, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = read_training_data(FinetuneSettings(str(btcv), "", preset="BTCV", fold=None)).source
        build_cache(source, tmp_path / "cache", Preprocessing(spacing_mm=(1.5, 1.5, 2.0)))
        seen = []

        def quick(given, every_fold) -> FinetuneResult:
            seen.append((given.fold, every_fold))
            return FinetuneResult(Path(given.out), finished=True, step=1, scores={"dice": 0.1 * given.fold})

        monkeypatch.setattr(module, "finetune_once", quick)
        finetune_folds(settings(tmp_path / "cache", tmp_path / "out", num_folds=5, preset="BTCV", strict=False))
    assert seen == [(0, True), (1, False), (2, False), (3, False), (4, False)]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["mean"]["dice"] == pytest.approx(0.2)


def test_strict_refuses_weights_that_saw_what_a_later_fold_holds_out_before_the_first_is_trained(ball_set, tmp_path):
    scans = build_cache(read_cases(str(ball_set)), tmp_path / "cache", Preprocessing())
    held_out = {"ball_0", "ball_5"}
    encoder = write_encoder(tmp_path / "pre", [scan for scan in identities_of(scans) if scan.id in held_out])
    given = {**SETTINGS, "backbone": None, "weights": str(encoder), "strict": True}
    with pytest.raises(DataError, match=r"2 of 6 held-out cases are in the pre-training data .*strict: refused"):
        finetune(str(ball_set), str(tmp_path / "out"), **given)
    assert not (tmp_path / "out" / "fold_0" / "segmenter").exists()
    assert not (tmp_path / "out" / "fold_1").exists()


def test_weights_that_are_not_there_are_refused_before_a_fold_is_made(ball_set, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        finetune(str(ball_set), str(tmp_path / "out"), **{**SETTINGS, "weights": str(tmp_path / "nowhere")})
    assert not (tmp_path / "out" / "fold_0").exists()
