"""No setting of any command takes NaN or infinity: one sentence names it, before any work."""

import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mim3d import cli
from mim3d.backbones import BACKBONES, create_recipe
from mim3d.cli.arguments import Signature
from mim3d.core.errors import ConfigError
from mim3d.core.settings import coerce, resolve, to_named, update_settings
from mim3d.methods import METHODS, create_method
from mim3d.tasks import TASKS, create_task

WORDS = ("nan", "inf", "-inf", "1e400")


def numbers_in(hint: Any) -> Iterator[Any]:
    """Forms that values of a type with numbers have: a number, or as many as it takes."""
    arguments = typing.get_args(hint)
    if hint in (int, float):
        yield lambda word: word
    elif typing.get_origin(hint) is tuple and {int, float} & set(arguments):
        yield lambda word: [word] * (1 if arguments[-1] is Ellipsis else len(arguments))
    elif typing.get_origin(hint) not in (tuple, list, dict, Mapping):
        for member in arguments:
            yield from numbers_in(member)


def numeric(settings: type[Any] | Any) -> dict[str, list[Any]]:
    """Names of the numeric fields of a dataclass, with the forms of their values."""
    hints = typing.get_type_hints(settings if isinstance(settings, type) else type(settings))
    return {f.name: forms for f in fields(settings) if f.init and (forms := list(numbers_in(hints[f.name])))}


def parts(settings: Any) -> Iterator[Any]:
    """Settings, and those inside of them."""
    yield settings
    for field in fields(settings):
        value = getattr(settings, field.name)
        for part in value if isinstance(value, tuple) else (value,):
            if is_dataclass(part) and not isinstance(part, type):
                yield from parts(part)


CHOSEN = [
    *((f"method {name}", create_method(name)) for name in METHODS),
    *((f"task {name}", create_task(name)) for name in TASKS),
    *((f"backbone {name}", create_recipe(name)) for name in BACKBONES),
]


@pytest.mark.parametrize(("name", "settings"), CHOSEN, ids=[name for name, _ in CHOSEN])
def test_no_setting_of_a_method_task_or_backbone_is_infinite(name: str, settings: Any) -> None:
    for part in parts(settings):
        for field, forms in numeric(part).items():
            for word in WORDS:
                for form in forms:
                    with pytest.raises(ConfigError, match=rf"{name.split()[0]}\.{field}.*takes"):
                        update_settings(part, {field: form(word)}, name.split()[0])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_no_flag_is_infinite(command: str) -> None:
    signature: Signature = cli.COMMANDS[command].signature(command)
    for name, hint in signature.hints.items():
        for form in numbers_in(hint):
            for word in WORDS:
                for value in (word, float(word)):
                    with pytest.raises(ConfigError, match=rf"--{name}.*takes"):
                        coerce(form(value), hint, f"--{name}")
        default = signature.defaults.get(name)
        for part in parts(default) if is_dataclass(default) else ():
            for field, forms in numeric(part).items():
                with pytest.raises(ConfigError, match=rf"{field}.*takes"):
                    update_settings(part, {field: forms[0]("nan")}, name)


def test_settings_that_somebody_built_are_no_exception() -> None:
    method = replace(create_method("MiM"), temperature=math.inf)
    with pytest.raises(ConfigError, match=r"method\.temperature is inf, but it takes a finite number\."):
        resolve(method, METHODS, "method")
    assert resolve(to_named(create_method("MiM"), METHODS), METHODS, "method") == create_method("MiM")


def test_a_file_of_settings_is_no_exception(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("method: {name: MiM, temperature: 1e400}\n")
    words = [
        "pretrain",
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--config",
        str(tmp_path / "run.yaml"),
    ]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == "mim3d: method.temperature is inf, but it takes a finite number.\n"
    assert not (tmp_path / "out").exists()
