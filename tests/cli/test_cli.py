"""The command line: words to arguments, files below flags, refusals in one line."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

import mim3d
from mim3d import cli
from mim3d.cli.arguments import Signature
from mim3d.core.errors import DataError
from mim3d.core.settings import write_yaml
from mim3d.core.types import Named, Spacing, Triple

CALLS: list[dict[str, Any]] = []


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Settings of the optimiser.

    Attributes:
        learning_rate: peak rate.
        betas: of AdamW.
    """

    learning_rate: float | None = None
    betas: tuple[float, float] | None = (0.9, 0.95)


def train(
    *,
    data: str,
    out: str,
    method: Named = "MiM",
    backbone: Named | None = None,
    size: Triple = (96, 96, 96),
    spacing_mm: Spacing | None = None,
    window: tuple[float, float] | None = None,
    names: tuple[str, ...] = (),
    learning_rate: float | None = None,
    max_steps: int | None = None,
    max_time: str | None = None,
    kind: Literal["CT", "MRI"] = "CT",
    optim: Optim = Optim(),
    resume: bool = False,
    strict: bool = True,
) -> None:
    """Train something.

    A second paragraph.

    Args:
        data: where the scans are.
        out: the run folder; 100 % of it.
    """
    CALLS.append(dict(locals()))


def fuse(*, runs: list[str], out: str) -> None:
    """Put runs together."""
    CALLS.append(dict(locals()))


def fail(*, how: str) -> None:
    """Fail in one of several ways."""
    if how == "interrupted":
        raise KeyboardInterrupt
    if how == "unexpected":
        raise ZeroDivisionError
    if how == "warning":
        warnings.warn_explicit("the window was adapted", UserWarning, str(Path(mim3d.__file__)), 1)
        return
    if how == "foreign":
        warnings.warn_explicit("old call", UserWarning, "elsewhere.py", 7)
        return
    raise DataError("scan.nii.gz is truncated; copy it again.")


@pytest.fixture(autouse=True)
def commands(monkeypatch):
    CALLS.clear()
    fakes = {
        "train": cli.Command(f"{__name__}:train", "Train.", ("data",)),
        "fuse": cli.Command(f"{__name__}:fuse", "Fuse.", ("runs",)),
        "fail": cli.Command(f"{__name__}:fail", "Fail."),
    }
    monkeypatch.setattr(cli, "COMMANDS", fakes)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def called(*words: str) -> dict[str, Any]:
    assert cli.main(list(words)) == 0
    return CALLS[-1]


def refused(capsys, *words: str) -> str:
    assert cli.main(list(words)) == cli.REFUSED
    error = capsys.readouterr().err
    assert error.startswith("mim3d: ") and error.count("\n") == 1
    assert not CALLS
    return error[len("mim3d: ") : -1]


def test_positional_words_may_stand_before_between_and_after_flags():
    for words in (
        ["D", "--out", "O", "--resume"],
        ["--out", "O", "D", "--resume"],
        ["--resume", "--out", "O", "D"],
        ["--data", "D", "--out=O", "--resume", "true"],
    ):
        arguments = called("train", *words)
        assert (arguments["data"], arguments["out"], arguments["resume"]) == ("D", "O", True)


def test_list_flags_take_their_words_and_negative_numbers_are_values():
    arguments = called(*"train D --out O --size 96 64 32 --spacing_mm 1.5 1.5 2 --window -175 250 --names a b".split())
    assert arguments["size"] == (96, 64, 32)
    assert arguments["spacing_mm"] == (1.5, 1.5, 2.0)
    assert arguments["window"] == (-175.0, 250.0)
    assert arguments["names"] == ("a", "b")


def test_a_fixed_list_flag_leaves_the_next_word_to_the_positional_argument():
    assert called(*"train --size 96 64 32 D --out O".split())["data"] == "D"


def test_lists_may_be_written_as_yaml_in_one_word():
    assert called("train", "D", "--out", "O", "--size", "[1, 2, 3]")["size"] == (1, 2, 3)


def test_several_positional_words_and_single_ones_make_a_list():
    assert called("fuse", "a", "b", "--out", "o")["runs"] == ["a", "b"]
    assert called("fuse", "--out", "o", "a")["runs"] == ["a"]
    assert called("fuse", "--runs", "a", "b", "--out", "o")["runs"] == ["a", "b"]


def test_numbers_in_scientific_notation_and_null_are_understood():
    arguments = called(*"train D --out O --learning_rate 1e-3 --max_steps 1e3 --window null".split())
    assert arguments["learning_rate"] == 0.001
    assert arguments["max_steps"] == 1000 and isinstance(arguments["max_steps"], int)
    assert arguments["window"] is None


def test_text_stays_text_whatever_it_looks_like():
    arguments = called(*"train 123 --out 1e3 --max_time 10:30 --names 1 true".split())
    assert (arguments["data"], arguments["out"], arguments["max_time"]) == ("123", "1e3", "10:30")
    assert arguments["names"] == ("1", "true")


def test_flags_false_and_bare():
    assert called(*"train D --out O --strict false".split())["strict"] is False
    assert called(*"train D --resume --out O".split())["resume"] is True


def test_nested_settings_keep_the_defaults_they_do_not_name():
    arguments = called(*"train D --out O --optim.learning_rate 1e-3".split())
    assert arguments["optim"] == Optim(learning_rate=1e-3, betas=(0.9, 0.95))


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("--method MAE", "MAE"),
        ("--method MiM --method.temperature 0.2", {"name": "MiM", "temperature": "0.2"}),
        ("--method.temperature 0.2 --method MiM", {"name": "MiM", "temperature": "0.2"}),
        ("--method.temperature 0.2", {"name": "MiM", "temperature": "0.2"}),
        ("--method.optim.betas 0.9 0.95", {"name": "MiM", "optim": {"betas": ["0.9", "0.95"]}}),
    ],
)
def test_named_choices_take_settings_below_them(words, method):
    assert called("train", "D", "--out", "O", *words.split())["method"] == method


def test_a_name_as_one_word_of_yaml():
    arguments = called("train", "D", "--out", "O", "--method", "{name: MAE, ratio: 0.5}")
    assert arguments["method"] == {"name": "MAE", "ratio": 0.5}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    write_yaml(
        path,
        {
            "command": "train",
            "data": "D",
            "out": "old",
            "method": {"name": "MiM", "temperature": 0.2, "ratio": 0.6},
            "optim": {"learning_rate": 0.5, "betas": [0.1, 0.2]},
            "size": [8, 8, 8],
        },
    )
    return str(path)


def test_a_saved_config_runs_again_with_another_out(config):
    arguments = called("train", "--config", config, "--out", "new")
    assert (arguments["data"], arguments["out"], arguments["size"]) == ("D", "new", (8, 8, 8))
    assert arguments["method"] == {"name": "MiM", "temperature": 0.2, "ratio": 0.6}
    assert arguments["optim"] == Optim(learning_rate=0.5, betas=(0.1, 0.2))


def test_flags_lie_on_top_of_the_file_key_by_key(config):
    arguments = called(*f"train --config {config} --method.ratio 0.7 --optim.learning_rate 1 --size 4 4 4".split())
    assert arguments["method"] == {"name": "MiM", "temperature": 0.2, "ratio": "0.7"}
    assert arguments["optim"] == Optim(learning_rate=1.0, betas=(0.1, 0.2))
    assert arguments["size"] == (4, 4, 4)


def test_another_name_drops_the_settings_of_the_one_in_the_file(config):
    assert called(*f"train --config {config} --method MAE".split())["method"] == "MAE"
    assert called(*f"train --config {config} --method MiM".split())["method"]["ratio"] == 0.6


def test_later_files_lie_on_top_of_earlier_ones(config, tmp_path):
    write_yaml(tmp_path / "b.yaml", {"method": "MiM", "out": "b"})
    arguments = called("train", "--config", config, str(tmp_path / "b.yaml"))
    assert arguments["out"] == "b" and arguments["method"]["temperature"] == 0.2


def test_resume_alone_goes_on_by_the_settings_of_the_run_below_what_is_given(config):
    out = str(Path(config).parent)
    arguments = called("train", "--out", out, "--resume", "true")
    assert (arguments["data"], arguments["out"], arguments["size"]) == ("D", out, (8, 8, 8))
    assert arguments["optim"] == Optim(learning_rate=0.5, betas=(0.1, 0.2))
    assert called("train", "--out", out, "--resume", "--size", "4", "4", "4")["size"] == (4, 4, 4)


def test_without_resume_or_without_a_run_no_settings_are_taken_from_the_folder(config, capsys):
    out = str(Path(config).parent)
    for words in (("--out", out), ("--out", out, "--resume", "false"), ("--out", f"{out}/none", "--resume")):
        assert "mim3d train needs DATA" in refused(capsys, "train", *words)
    Path(config).write_text("command: fuse\n")
    assert "holds the settings of mim3d fuse" in refused(capsys, "train", "--out", out, "--resume", "true")


def test_a_value_that_no_number_can_hold_is_one_sentence(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"max_steps: {'9' * 5000}\n")
    assert "a.yaml is no valid YAML" in refused(capsys, "train", "--config", f"{tmp_path}/a.yaml")
    assert "--max_steps" in refused(capsys, "train", "d", "--out", "o", "--max_steps", "9" * 5000)


def test_a_saved_config_is_refused_under_another_command(config, capsys):
    assert "holds the settings of mim3d train, not of mim3d fuse" in refused(capsys, "fuse", "--config", config)


def test_an_unknown_setting_in_a_file_names_the_file_and_the_nearest(tmp_path, capsys):
    write_yaml(tmp_path / "a.yaml", {"max_step": 3})
    sentence = refused(capsys, "train", "--config", str(tmp_path / "a.yaml"))
    assert "a.yaml" in sentence and "Did you mean 'max_steps'?" in sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("trane", "There is no command 'trane'. Did you mean 'train'?"),
        ("train --dat D", "mim3d train has no flag --dat. Did you mean '--data'?"),
        ("train --max-steps 3", "mim3d train has no flag --max-steps. Did you mean '--max_steps'?"),
        ("train --optim.lerning_rate 3", "Did you mean '--optim.learning_rate'?"),
        ("train --out.x 3", "mim3d train has no flag --out.x."),
        ("train -d D", "mim3d train has no flag -d; flags begin with two dashes."),
        ("train D", "mim3d train needs --out; see mim3d train --help."),
        ("train --out O", "mim3d train needs DATA; see mim3d train --help."),
        ("train D E --out O", "mim3d train cannot place 'E'"),
        ("train D --out O --resume maybe", "--resume is 'maybe', but it takes true or false."),
        ("train D --out O --resume yes", "--resume is 'yes', but it takes true or false."),
        ("train D --out", "mim3d train --out has no value"),
        ("train D --out O --max_steps many", "--max_steps is 'many', but it takes a whole number or null."),
        ("train D --out O --size 1 2", "--size has 2 values"),
        ("train D --out O --kind XR", "--kind is 'XR'. Known: CT, MRI."),
        ("train D --out O --optim.betas 1 x", "--optim.betas"),
        ('train D --out O --backbone {"name":3}', "--backbone has settings but no name"),
        ("train D --out O --config absent.yaml", "absent.yaml does not exist"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(words, sentence, capsys):
    assert sentence in refused(capsys, *words.split())


def test_settings_without_a_name_are_the_commands_to_place_where_no_name_is_the_default():
    assert called("train", "D", "--out", "O", "--backbone.depth", "3")["backbone"] == {"depth": "3"}


def test_an_error_of_ours_is_one_line_and_a_traceback_only_when_asked(capsys):
    assert refused(capsys, "fail", "--how", "data") == "scan.nii.gz is truncated; copy it again."
    with pytest.raises(DataError):
        cli.main(["fail", "--how", "data", "--debug", "true"])
    assert cli.main(["fail", "--how", "data", "--debug", "false"]) == cli.REFUSED


def test_the_unexpected_stays_a_traceback_and_an_interrupt_has_its_code(capsys):
    with pytest.raises(ZeroDivisionError):
        cli.main(["fail", "--how", "unexpected"])
    assert cli.main(["fail", "--how", "interrupted"]) == 130


def test_warnings_of_ours_are_one_plain_line(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["fail", "--how", "warning"]) == 0
    assert capsys.readouterr().err == "mim3d: warning: the window was adapted\n"


def test_warnings_of_others_are_left_as_they_are(capsys):
    with pytest.warns(UserWarning, match="old call"):
        assert cli.main(["fail", "--how", "foreign"]) == 0
    assert "mim3d: warning" not in capsys.readouterr().err


def test_help_is_complete(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: mim3d train DATA --out VALUE [flags]")
    assert "A second paragraph." in text and "where the scans are." in text and "100 % of it" in text
    for name in (
        "--size VALUE VALUE VALUE",
        "--optim.learning_rate",
        "peak rate.",
        "one of CT, MRI",
        "--config",
    ):
        assert name in text
    for name in Signature.of(train, "train", ("data",)).hints:
        assert f"--{name}" in text


@dataclass(frozen=True, kw_only=True)
class WarmOptim(Optim):
    """Settings of an optimiser that warms up.

    Attributes:
        warmup_steps: steps of a linear rise, of which there may be so many that the sentence about them needs more
            than one line.
    """

    warmup_steps: int = 0


def rise(*, optim: WarmOptim | None = None) -> None:
    """Rise.

    Args:
        optim: The optimiser; planned if not given.
    """


@pytest.mark.parametrize("columns", [80, 160])
def test_help_is_as_wide_as_the_terminal_and_describes_inherited_settings(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setitem(cli.COMMANDS, "rise", cli.Command(f"{__name__}:rise", "Rise."))
    assert cli.main(["rise", "--help"]) == 0
    text = capsys.readouterr().out
    assert columns - 20 < max(map(len, text.splitlines())) <= columns
    assert "\nThe optimiser; planned if not given:\n  --optim.learning_rate VALUE " in text
    assert "\n  --optim.warmup_steps VALUE " in text and "default 0.9 0.95)" in text
    assert "more than one line. (a whole number; default 0)" in " ".join(text.split())
    assert "\x1b" not in text


def test_the_overview_lists_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name:<5}  {command.summary}" in text for name, command in cli.COMMANDS.items())
    assert cli.main([]) == cli.REFUSED
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mim3d {mim3d.__version__}\n"


def test_a_closed_pipe_is_quiet():
    code = "import sys; sys.stdin.read(); from mim3d.cli import main; sys.exit(main(['--help']))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-c", code], env=unbuffered, **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == cli.BROKEN_PIPE


def test_python_m_mim3d_is_the_command():
    words = [sys.executable, "-m", "mim3d", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, f"mim3d {mim3d.__version__}\n")


def test_resume_from_another_folder_finds_what_the_run_was_started_on(config, tmp_path, monkeypatch):
    out = Path(config).parent
    (out / "manifest.json").write_text(json.dumps({"working_folder": str(tmp_path / "began")}))
    (tmp_path / "began" / "D").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert called("train", "--out", str(out), "--resume", "true")["data"] == str(tmp_path / "began" / "D")
    monkeypatch.chdir(tmp_path / "began")
    assert called("train", "--out", str(out), "--resume", "true")["data"] == "D"


def test_a_user_whom_the_machine_has_no_name_for_gets_one(monkeypatch):
    def unknown() -> str:
        if name := os.environ.get("USER"):
            return name
        raise KeyError("getpwuid(): uid not found: 10001")

    monkeypatch.setenv("USER", "")
    monkeypatch.setattr("getpass.getuser", unknown)
    cli.main(["--help"])
    assert os.environ["USER"] == "user"
