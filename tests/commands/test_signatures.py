"""Every command as the command line and Python show it."""

import importlib
import inspect

import numpy as np
import pytest

import mim3d
from mim3d.cli import COMMANDS, main, overview
from mim3d.cli.arguments import RESERVED
from mim3d.cli.help import help_text
from mim3d.core.errors import REFUSED, ConfigError


def test_the_commands_are_those_that_work():
    assert list(COMMANDS) == [
        "phantom",
        "cache",
        "pretrain",
        "finetune",
        "predict",
        "embed",
        "evaluate",
        "probe",
        "compare",
        "export",
        "report",
        "weights",
        "models",
    ]
    listed = [line.split()[0] for line in overview().splitlines() if line.startswith("  ")]
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_put_on_a_command_line(name):
    command = COMMANDS[name]
    signature = command.signature(name)
    assert not set(signature.hints) & set(RESERVED)
    assert set(command.positional) <= set(signature.hints)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_describes_every_flag(name):
    signature = COMMANDS[name].signature(name)
    text = help_text(signature)
    assert inspect.getdoc(signature.function).splitlines()[0] in " ".join(text.split())
    entries = text.replace("\n  --", "\0--").split("\0")[1:]
    words = {entry.split()[0]: entry.split("(")[0] for entry in entries}
    for flag in signature.hints:
        described = [entry for key, entry in words.items() if key == f"--{flag}" or key.startswith(f"--{flag}.")]
        assert described, f"--{flag} is missing"
        for entry in described:
            prose = [word for word in entry.split()[1:] if word not in ("VALUE", "...", "NAME", "true|false")]
            assert prose, f"the docstring of {name} says nothing of {entry.split()[0]}"


#: Commands of which Python has the room of that name in their place.
ROOMS = {"weights"}


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - ROOMS))
def test_every_command_is_the_python_function_of_its_name(name):
    assert getattr(mim3d, name) is COMMANDS[name].load()


def test_rooms_of_the_package_do_not_take_the_place_of_commands():
    import mim3d.reporting

    assert all(callable(getattr(mim3d, name)) for name in COMMANDS.keys() - ROOMS)
    assert mim3d.weights.describe is importlib.import_module("mim3d.weights.description").describe


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("pretrain", {"data": "D", "out": "O", "seed": "abc"}, "seed is 'abc', but it takes a whole number."),
        ("pretrain", {"data": "D", "out": "O", "spacing_mm": (1.0, 2.0)}, r"spacing_mm has 2 values"),
        (
            "finetune",
            {"data": "D", "out": "O", "max_steps": "many"},
            "max_steps is 'many', but it takes a whole number",
        ),
        ("predict", {"weights": "W", "out": 3}, "out is 3, but it takes text."),
        (
            "evaluate",
            {"predictions": "P", "references": "R", "out": "o.json", "tables": 2},
            "tables is 2, but it takes",
        ),
        ("export", {"weights": ["W"], "out": "O"}, r"weights is \['W'\], but it takes text."),
        ("probe", {"weights": "W", "data": "D", "probing": 3}, "probing is 3"),
        ("cache", {"data": "D", "out": "O", "num_levels": "all"}, "num_levels is 'all', but it takes a whole number."),
        ("phantom", {"out": "O", "num_cases": None}, "num_cases is None, but it takes a whole number."),
        ("report", {"runs": 3, "out": "o.html"}, "runs is 3, but it takes a list, each text."),
    ],
)
def test_a_python_call_refuses_a_value_of_another_type_in_one_sentence(name, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        getattr(mim3d, name)(**settings)


def test_a_python_call_takes_paths_and_numbers_of_numpy(tmp_path):
    made = mim3d.phantom(tmp_path / "set", num_cases=np.int64(1), size=[32, 32, 32])
    assert made == str(tmp_path / "set")


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - ROOMS))
def test_only_what_a_command_is_about_may_be_given_by_position_in_python(name):
    parameters = inspect.signature(getattr(mim3d, name)).parameters.values()
    by_position = [p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    natural = {
        "predict": ["weights", "out", "input"],
        "embed": ["scans", "weights", "out"],
        "probe": ["weights", "data", "out"],
    }
    assert by_position == natural.get(name, [p.name for p in parameters if p.default is inspect.Parameter.empty])


def help_of(capsys, *words):
    assert main([*words, "--help"]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_the_settings_of_what_is_chosen_and_names_the_rest(capsys):
    text = help_of(capsys, "finetune")
    assert "settings of task segmentation (others: classification;" in text and "--task.patch_size" in text
    assert "settings of backbone hybrid_base (others: hybrid, hybrid_nano," in text
    assert "--task.augmentation.flip_axes" in text and "--task.cube_mm" not in text
    text = help_of(capsys, "finetune", "--task", "classification", "--backbone=hybrid_small")
    assert "settings of task classification (others: segmentation;" in text and "--task.cube_mm" in text
    assert "settings of backbone hybrid_small" in text and "default 24 48 96 192" in text
    assert "settings of method MiM (others: " in help_of(capsys, "pretrain", "--method", "MiM")
    assert "settings of" not in help_of(capsys, "evaluate")
    assert main(["finetune", "--task", "clasification", "--help"]) == REFUSED
    assert "Did you mean 'classification'?" in capsys.readouterr().err


def test_models_lists_backbones_with_their_size_methods_and_tasks(capsys):
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    base = next(line for line in lines if line.startswith("  hybrid_base"))
    assert base.split() == "hybrid_base 33.9 M 48 96 192 384 2 2 2 11 16 x 16 x 16".split()
    assert any(line.startswith("  MiM  ") for line in lines) and any(line.startswith("  segm") for line in lines)
    assert max(map(len, lines)) <= 120


def test_no_flag_is_cut_however_narrow_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys, "finetune", "--task", "classification")
    assert "\u2026" not in text and "max_bad_steps" in text
