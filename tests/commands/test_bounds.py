"""Values beyond all bounds, and words that cannot work on the command line, each in one sentence."""

from pathlib import Path

import pytest

from mim3d import cli
from mim3d.core.settings import coerce


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_time", "9" * 5000 + ":00"], "Duration '999"),
        (["--memory_limit", "inf"], "memory_limit is 'inf', but it takes a finite number"),
        (["--config", "w" * 300], "w" * 100),
        (["--backbone.widths", f"[{'9' * 5000}]"], "no valid YAML"),
    ],
)
def test_values_beyond_all_bounds_get_one_sentence(
    words: list[str], said: str, ball_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pretrain", "--data", str(ball_set), "--out", str(tmp_path / "run"), *words]) == 2
    assert said in (shown := capsys.readouterr().err) and "set_int_max_str_digits" not in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--spacing_mm", "0", "1", "1"], "spacing_mm (0.0, 1.0, 1.0) must be three positive numbers"),
        (["--spacing_mm", "1e30", "1", "1"], "three positive numbers of at most 1000"),
        (["--min_coverage", "2"], "min_coverage is 2; it must lie between 0 and 1"),
        (["--fold", "0", "--split_seed", "-1"], "split_seed is -1; it must be zero or more"),
        (["--seed", "1e30"], "--seed is '1e30', but it takes a whole number of at most 9,007,199,254,740,992."),
        (["--seed", "nan"], "--seed is 'nan', but it takes a whole number."),
        (["--memory_limit", "nan"], "--memory_limit is 'nan', but it takes a finite number or null."),
        (["--method.alignment_weight", "-1"], "method.alignment_weight (-1.0) must be zero or more"),
        (["--method.alignment_dim", "0"], "method.alignment_dim (0) must be between 1 and"),
        (["--method.decoder_depth", "-1"], "method.decoder_depth (-1) must be between 1 and"),
        (["--method.decoder_num_heads", "0"], "method.decoder_num_heads (0) must be between 1 and"),
        (["--method.intensity_gain", "-1"], "method.intensity_gain (-1.0) must lie between 0 (none) and 1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_before_any_work(
    words: list[str], said: str, ball_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pretrain", "--data", str(ball_set), "--out", str(tmp_path / "run"), *words]) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.out == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num_workers", "-1"], "num_workers is -1; it must be 0 or more."),
        (["--timeout_s", "0"], "timeout_s is 0; it must be above 0"),
        (["--spacing_mm", "1e30", "1", "1"], "three positive numbers of at most 1000"),
    ],
)
def test_numbers_that_no_cache_can_be_made_with_are_refused(
    words: list[str], said: str, ball_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["cache", str(ball_set), "--out", str(tmp_path / "cache"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "cache").exists()


def test_a_task_refuses_voxels_of_no_size(ball_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["finetune", "--data", str(ball_set), "--out", str(tmp_path / "run"), "--task.spacing_mm", "0", "1", "1"]
    assert cli.main(words) == 2
    assert "spacing_mm (0.0, 1.0, 1.0) must be" in capsys.readouterr().err


def test_null_clears_a_setting_that_may_be_text() -> None:
    assert coerce("null", str | None, "max_time") is None and coerce("null", str, "name") == "null"


def test_going_on_where_there_is_no_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["finetune", "--out", str(tmp_path / "a b"), "--resume", "true"]) == 2
    assert "a b holds no run to go on with, and mim3d finetune needs --data" in capsys.readouterr().err


def test_a_name_that_is_too_long_for_the_machine_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--weights", "w" * 300, "--out", str(tmp_path / "out")]) == 2
    assert "is longer than names of files" in capsys.readouterr().err
