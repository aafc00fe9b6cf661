"""Values beyond all bounds, and words that cannot work on the command line, each in one sentence."""

from pathlib import Path

import pytest

from mim3d import cli
from mim3d.core.settings import coerce


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max_time", "9" * 5000 + ":00"], "Duration '999"),
        (["--memory_limit", "inf"], "memory_limit is inf"),
        (["--config", "w" * 300], "w" * 100),
        (["--backbone.widths", f"[{'9' * 5000}]"], "no valid YAML"),
    ],
)
def test_values_beyond_all_bounds_get_one_sentence(
    words: list[str], said: str, ball_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pretrain", "--data", str(ball_set), "--out", str(tmp_path / "run"), *words]) == 2
    assert said in (shown := capsys.readouterr().err) and "set_int_max_str_digits" not in shown


def test_null_clears_a_setting_that_may_be_text() -> None:
    assert coerce("null", str | None, "max_time") is None and coerce("null", str, "name") == "null"


def test_going_on_where_there_is_no_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["finetune", "--out", str(tmp_path / "a b"), "--resume", "true"]) == 2
    assert "a b holds no run to go on with, and mim3d finetune needs --data" in capsys.readouterr().err


def test_a_name_that_is_too_long_for_the_machine_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--weights", "w" * 300, "--out", str(tmp_path / "out")]) == 2
    assert "is longer than names of files" in capsys.readouterr().err
