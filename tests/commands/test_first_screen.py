"""What a run prints before it works: few lines; the rest is in its manifest, and printed where that is asked for."""

import json
import re

import pytest

from mim3d.cli import main
from mim3d.core.names import number_of
from tests.labelled import write_ball_set

BACKBONE = ["--backbone", "hybrid", "--backbone.widths", "8", "16", "--backbone.depths", "1", "1"]
BACKBONE += ["--backbone.num_heads", "2"]
FINETUNE = [*BACKBONE, "--task.patch_size", "16", "16", "16", "--max_steps", "1", "--num_workers", "0"]
FINETUNE += ["--intensity.kind", "zscore", "--batch_size", "1"]


@pytest.fixture
def lines(ball_set, tmp_path, capsys):
    """The lines that fine-tuning prints, on both streams."""

    def run(name, *words):
        assert main(["finetune", "--data", str(ball_set), "--out", str(tmp_path / name), *FINETUNE, *words]) == 0
        said = capsys.readouterr()
        return (said.out + said.err).splitlines()

    return run


def test_a_run_says_what_it_learns_from_and_what_it_does_in_a_few_lines(lines, tmp_path):
    found = lines("run", "--num_folds", "3", "--train_cases", "1", "--train_seed", "4")
    told = [line for line in found if not line.startswith("mim3d: warning")]
    assert told[0].startswith("precision: 32-true (auto; ")
    assert told[1] == "fold 0 of 3: 4 cases to learn from, 2 held out"
    assert told[2] == "few-shot: 1 of 4 cases, 1 of 4 patients (train_cases 1, train_seed 4)"
    assert any(line == "network: segmentation on hybrid with tokens of 4 x 4 x 4 voxels, from scratch" for line in told)
    assert any(line.startswith("training: 1 step of 1 sample, 1 pass over 1 sample; learning rate ") for line in told)
    assert sum(not line.startswith(("step", "all", "kept", "segmenter")) for line in told) <= 10
    derived = json.loads((tmp_path / "run" / "manifest.json").read_text())["derived"]
    assert any("weight decay acts on" in line for line in derived["derivations"])
    assert any("crops are mirrored" in line for line in derived["details"])


def test_verbose_prints_the_rest_and_may_be_asked_for_on_resume(lines):
    short = lines("run", "--fold", "null")
    assert short[1] == "no fold: 6 cases to learn from, none held out"
    assert not any("weight decay" in line for line in short)
    # Samples per second may be 0.1.
    assert not any(
        re.search(r"(?<![\d.,])1 (scans|steps|samples|volumes|cases|processes|micro-batches)\b(?!/)", x) for x in short
    )
    long = lines("run", "--fold", "null", "--resume", "true", "--verbose", "true")
    assert any("weight decay acts on" in line for line in long)
    assert any("crops are mirrored" in line for line in long)
    assert any(line.startswith("memory: about") and "activations" in line for line in long)


def test_prediction_says_what_it_is_about_to_do(segmenter_run, tmp_path, capsys):
    assert main(["predict", "--weights", str(segmenter_run), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == "input: 2 scans that the run held out; segmentation by 1 network, on cpu"


def test_a_number_stands_with_its_noun_in_the_right_form():
    pairs = [(1, "scan"), (2, "scan"), (0, "step"), (1200, "class"), (2, "copy"), (2, "series"), (2, "micro-batch")]
    assert [number_of(*pair) for pair in pairs] == [
        "1 scan",
        "2 scans",
        "0 steps",
        "1,200 classes",
        "2 copies",
        "2 series",
        "2 micro-batches",
    ]


def test_a_declared_split_is_said(tmp_path, capsys):
    data = write_ball_set(tmp_path / "set", 4)
    rows = [f"imagesTr/ball_{i}.nii.gz,labelsTr/ball_{i}.nii.gz,{'val' if i == 3 else 'train'}" for i in range(4)]
    (data / "list.csv").write_text("\n".join(["image,label,split", *rows]))
    words = ["finetune", "--data", str(data / "list.csv"), "--out", str(tmp_path / "run"), *FINETUNE]
    assert main(words) == 0
    assert "split that the data set declares: 3 cases to learn from, 1 held out" in capsys.readouterr().out
