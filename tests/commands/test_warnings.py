"""What changes how a result is to be read is kept with run, network, predictions and scores, and is said last."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from mim3d import cli
from mim3d.commands.export import export
from mim3d.commands.finetune import finetune
from mim3d.commands.pretrain import pretrain
from mim3d.commands.report import report
from mim3d.core.errors import TO_BE_CONTINUED
from mim3d.core.run_folder import Run, read_manifest
from mim3d.core.warned import (
    LeakWarning,
    LearningWarning,
    ResultWarning,
    UnfinishedWarning,
    checked_rows,
    keep_recorded,
    merged,
    published,
    record_said,
    recording,
)
from mim3d.methods import create_method
from mim3d.training.schedule import Optimisation
from mim3d.weights import read_card
from mim3d.workflows.finetune.folds import _write_summary, say_scores
from mim3d.workflows.finetune.run import FinetuneResult
from mim3d.workflows.probe.monitor import EncoderKeeper
from tests.commands.conftest import BACKBONE, TASK
from tests.commands.test_pretrain import METHOD, pretrain_module
from tests.labelled import write_ball_set

KINDS = [each.kind for each in ResultWarning.__subclasses__()]


def kinds(rows: Any) -> set[str]:
    return {row["kind"] for row in rows}


def test_recordings_hold_each_warning_once_and_pass_it_on() -> None:
    kept: list[Any] = []
    with pytest.warns(UserWarning) as shown, recording() as outer:
        warnings.warn("before", category=LeakWarning, stacklevel=1)
        with recording() as inner:
            record_said("leak", "said")
            keep_recorded(lambda rows: kept.append(list(rows)))
            for _ in range(2):
                warnings.warn("within", category=LeakWarning, stacklevel=1)
            warnings.warn("of another package", stacklevel=1)
    assert [row["text"] for row in outer.rows] == ["before", "said", "within"]
    assert [row["text"] for row in inner.rows] == ["said", "within"]
    assert kept == [inner.rows[:1], inner.rows]
    assert [str(each.message) for each in shown].count("of another package") == 1


def test_what_is_published_names_nothing() -> None:
    rows = [{"kind": kind, "text": "patient Smith"} for kind in KINDS]
    assert "Smith" not in str(published(rows))
    assert kinds(published(rows)) == {
        "leak",
        "weights",
        "unlike weights",
        "licence",
        "learning",
        "unchosen",
        "unfinished",
        "left out",
    }
    assert len(set(KINDS)) == len(KINDS)


def test_rows_of_others_are_typed_and_bounded() -> None:
    good = {"kind": "leak", "text": "a"}
    for content in (None, "a", {"kind": "leak"}, [good, 1, {"kind": 1, "text": "a"}, {"kind": "b"}]):
        assert checked_rows(content) in ([], [good])
    assert len(checked_rows([{"kind": "k" * 99, "text": "t" * 9999}])[0]["text"]) == 2000
    assert merged([good], [good, {"kind": "leak", "text": "b"}]) == [good, {"kind": "leak", "text": "b"}]


@pytest.fixture(scope="module")
def leaking(ball_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set in which two patients are copies of two others, and a run that was stopped early on it."""
    root = tmp_path_factory.mktemp("leaking")
    data = root / "balls"
    shutil.copytree(ball_set, data)
    content = json.loads((data / "dataset.json").read_text())
    first = [dict(row) for row in content["training"]]
    for row in first:
        copied = {key: value.replace(".nii.gz", "_again.nii.gz") for key, value in row.items()}
        for key, value in row.items():
            shutil.copyfile(data / value, data / copied[key])
        content["training"].append(copied)
    (data / "dataset.json").write_text(json.dumps(content))
    with pytest.warns(LeakWarning):
        finetune(
            str(data),
            str(root / "run"),
            task=TASK,
            backbone=BACKBONE,
            num_folds=3,
            max_steps=4,
            optim=Optimisation(learning_rate=1e-9),
            num_workers=0,
            accelerator="cpu",
        )
    return data, root / "run"


def test_a_leak_is_in_the_run_its_network_its_predictions_its_scores_and_the_report(
    leaking: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = leaking
    assert {"leak", "learning"} <= kinds(read_manifest(run / "manifest.json")["warnings"])
    card = read_card(run)
    assert {"leak", "learning"} <= kinds(card["warnings"]) and "_again" not in str(card["warnings"])
    out, scores = tmp_path / "predictions", tmp_path / "scores.json"
    assert cli.main(["predict", "--weights", str(run), "--out", str(out), "--accelerator", "cpu"]) == 0
    assert "leak" in kinds(json.loads((out / "predictions.json").read_text())["network_warnings"])
    assert "of the network: Some of the held-out cases were learned from" in capsys.readouterr().err
    words = ["evaluate", "--predictions", str(out), "--references", str(data), "--out", str(scores)]
    assert cli.main(words) == 0
    assert "leak" in kinds(json.loads(scores.read_text())["warnings"])
    assert "Some of the held-out cases were learned from" in capsys.readouterr().err.splitlines()[-2:][0]
    for ending in (".md", ".tex"):
        assert "Some of the held-out cases were learned from" in scores.with_suffix(ending).read_text()
    page = tmp_path / "report.html"
    report([str(run)], str(page), scores=[str(scores)])
    assert "see Warnings" in page.read_text()
    export(str(run), str(tmp_path / "exported"))
    assert "Some of the held-out cases were learned from" in (tmp_path / "exported" / "README.md").read_text()


def test_a_run_that_was_stopped_says_so_until_it_is_finished(ball_set: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"task": TASK, "backbone": BACKBONE}))
    words = ["finetune", "--config", f"{tmp_path}/tiny.yaml", "--data", str(ball_set), "--out", str(out)]
    words += ["--num_folds", "3", "--max_steps", "4000", "--max_time", "00:00:01", "--num_workers", "0"]
    assert cli.main([*words, "--accelerator", "cpu", "--validate_every", "4000", "--log_every", "1"]) == TO_BE_CONTINUED
    rows = read_manifest(out / "manifest.json")["warnings"]
    assert "unfinished" in kinds(rows) and "unfinished" in kinds(read_card(out)["warnings"])
    assert re.fullmatch(r"stopped after step \d+ of 4000, because the time limit .*", rows[-1]["text"])
    report([str(out)], str(tmp_path / "page.html"))
    assert " of 4000</td>" in (tmp_path / "page.html").read_text()
    # Short enough now to come to its end.
    manifest = json.loads((out / "manifest.json").read_text())
    run = Run(out, "finetune")
    run.drop_warnings(UnfinishedWarning)
    assert "unfinished" not in kinds(run.warnings) and len(run.warnings) == len(manifest["warnings"]) - 1


def test_what_is_known_at_the_end_of_pretraining_is_in_its_card(
    ball_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    settings: dict[str, Any] = {"method": METHOD, "backbone": BACKBONE, "num_workers": 0, "log_every": 1}
    settings |= {"optim": Optimisation(learning_rate=1e-3), "accelerator": "cpu", "max_steps": 3}
    # What a kill would leave, too.
    saved: list[set[str]] = []
    keep = EncoderKeeper.save

    def noted(self: EncoderKeeper, *rest: Any) -> None:
        keep(self, *rest)
        saved.append(kinds(read_card(out)["warnings"]))

    monkeypatch.setattr(EncoderKeeper, "save", noted)
    pretrain(str(ball_set), str(out), checkpoint_every=1, **settings)
    assert saved == [{"unfinished"}, {"unfinished"}, set()] and read_card(out)["warnings"] == []
    for name in ("LEAST_STEPS", "LEAST_LINES"):
        monkeypatch.setattr(pretrain_module, name, 1)
    monkeypatch.setattr(type(create_method(METHOD, BACKBONE)), "idle_parts", lambda *_: ["level fine is idle"])
    with pytest.warns(LearningWarning, match="fine is idle"):
        pretrain(str(ball_set), str(out), resume=True, **settings)
    assert kinds(read_card(out)["warnings"]) == {"learning"}
    (out / "encoder" / "card.json").unlink()
    assert kinds(read_card(out)["warnings"]) == {"learning"}


@pytest.mark.parametrize(("max_steps", "log_every", "is_judged"), [(20, 5, True), (19, 1, False), (20, 10, False)])
def test_what_learned_nothing_is_judged_by_the_last_of_few_lines_too(
    ball_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_steps: int, log_every: int, is_judged: bool
) -> None:
    judged: list[dict[str, float]] = []
    monkeypatch.setattr(type(create_method(METHOD, BACKBONE)), "idle_parts", lambda _, logs: judged.append(logs) or [])
    settings: dict[str, Any] = {"method": METHOD, "backbone": BACKBONE, "num_workers": 0, "accelerator": "cpu"}
    pretrain(str(ball_set), str(tmp_path / "run"), max_steps=max_steps, log_every=log_every, **settings)
    assert [logs["step"] for logs in judged] == ([20] if is_judged else [])


def test_the_summary_of_folds_marks_those_whose_scores_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [FinetuneResult(tmp_path / f"fold_{number}", True, 4, {"dice": 0.5}) for number in range(2)]
    row = {"kind": "leak", "text": "1 of 2 held-out cases is among the training cases too"}
    for run, rows in zip(runs, ([], [row]), strict=True):
        run.path.mkdir()
        manifest = {"command": "finetune", "settings": {}, "inputs": {}, "warnings": rows}
        (run.path / "manifest.json").write_text(json.dumps(manifest))
    say_scores(runs, {"dice": [0.5, 0.5]})
    shown = capsys.readouterr().out
    assert "  fold_0  fold_1*  " in shown and shown.splitlines()[-1].startswith("* Some of the held-out cases")
    assert re.search(r"dice +0\.5000 +0\.5000 +0\.5000 +0\.0000\n", shown)
    _write_summary(tmp_path, runs, num_folds=2)
    first, second = json.loads((tmp_path / "summary.json").read_text())["folds"]
    assert "warnings" not in first and second["warnings"] == [row]
    (runs[1].path / "manifest.json").unlink()
    say_scores(runs, {"dice": [0.5, 0.5]})
    assert "*" not in capsys.readouterr().out


def test_scores_of_scans_unlike_those_of_training_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_ball_set(tmp_path / "balls", 2)
    row = {"id": "ball_0", "prediction": "ball_0.nii.gz", "warnings": ["this scan is CT"]}
    cases = [row, {"id": "ball_1", "prediction": "ball_1.nii.gz"}]
    listing, scores = data / "labelsTr" / "predictions.json", tmp_path / "scores.json"
    listing.write_text(json.dumps({"cases": cases}))
    words = ["evaluate", "--predictions", str(listing.parent), "--references", str(data), "--out", str(scores)]
    assert cli.main(words) == 0
    said = "1 of 2 predicted scans is unlike those that the network learned from: ball_0"
    assert [said in row["text"] for row in json.loads(scores.read_text())["warnings"]] == [True]
    assert said in " ".join(capsys.readouterr().err.split())
