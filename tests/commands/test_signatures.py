"""Every command as the command line and Python show it."""

import inspect

import pytest

import mim3d
from mim3d.cli import COMMANDS, overview
from mim3d.cli.arguments import RESERVED
from mim3d.cli.help import help_text


def test_the_commands_are_those_that_work():
    assert list(COMMANDS) == [
        "phantom",
        "cache",
        "pretrain",
        "finetune",
        "predict",
        "evaluate",
        "probe",
        "export",
        "report",
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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_the_python_function_of_its_name(name):
    assert getattr(mim3d, name) is COMMANDS[name].load()


def test_rooms_of_the_package_do_not_take_the_place_of_commands():
    import mim3d.reporting

    assert all(callable(getattr(mim3d, name)) for name in COMMANDS)
