"""The text of ``mim3d COMMAND --help``, read from the signature and docstring of the command's function."""

import dataclasses
import inspect
import re
import shutil
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mim3d.cli.arguments import Signature, is_named, word_limit
from mim3d.core.command import documented
from mim3d.core.settings import describe, spelled, to_mapping

#: Widest column of flags on a narrow terminal; what is longer has a line of its own.
FLAG_COLUMN = 30


@dataclass(frozen=True)
class FlagHelp:
    """One flag as the help shows it.

    Attributes:
        usage: The flag with what stands after it, such as ``--optim.betas VALUE VALUE``.
        meaning: What the docstring says of it.
        facts: Its type in words, its default as in YAML, and whether it is required or needs no flag.
    """

    usage: str
    meaning: str
    facts: tuple[str, ...] = ()


#: Flags that no command has as a parameter.
EVERY_COMMAND = (
    FlagHelp("--config FILE.yaml", "Settings from a file, such as the config.yaml of a run; flags win."),
    FlagHelp(
        "--allow_code true|false",
        "Import code that the files of --config name by a dotted path, such as task my_lab.foo.MyTask (default false).",
    ),
    FlagHelp("--debug true|false", "Show the traceback of a refusal."),
)


def help_text(signature: Signature, words: Sequence[str] = ()) -> str:
    """The help of a command, as wide as the terminal; 80 columns and no colours where there is none.

    Args:
        signature: The command.
        words: The other words of the line: a task, backbone or method among them is the one whose settings are listed.

    Raises:
        ConfigError: There is no task, backbone or method of a name among the words.
    """
    groups = {**_flag_groups(signature), **_chosen_groups(signature, words), "every command": EVERY_COMMAND}
    console = Console(width=shutil.get_terminal_size().columns, highlight=False)
    longest = max(len(flag.usage) for flags in groups.values() for flag in flags)
    column = min(longest, max(FLAG_COLUMN, console.width // 4))
    several = {name: " ..." if word_limit(signature.hints[name]) is None else "" for name in signature.positional}
    places = [name.upper() + dots for name, dots in several.items()]
    required = [f"--{name} {_values(signature.hints[name])}" for name in signature.required if name not in several]
    usage = " ".join(["usage: mim3d", signature.command, *places, *required, "[flags]"])
    description = re.split(r"\n(?:Args|Returns|Raises):\n", inspect.getdoc(signature.function) or "")[0].strip()
    with console.capture() as capture:
        console.print(Text(usage))
        for paragraph in re.split(r"\n\s*\n", description):
            console.print("", Text(" ".join(paragraph.split())), sep="\n")
        for title, flags in groups.items():
            console.print("", Text(f"{title}:", style="bold"), sep="\n")
            for flag in flags:
                facts = Text(f"({'; '.join(flag.facts)})" if flag.facts else "", "dim")
                table = Table.grid(padding=(0, 2, 0, 0))
                table.add_column(width=column, overflow="fold")
                place = Text(flag.usage, style="bold")
                # A flag that is too long has a line of its own, so that it can be copied as a whole.
                if len(flag.usage) > column:
                    console.print(Padding(place, (0, 0, 0, 2)))
                    place = Text()
                table.add_row(place, Text(" ").join(filter(None, (Text(flag.meaning.replace("``", "`")), facts))))
                console.print(Padding(table, (0, 0, 0, 2)))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _flag_groups(signature: Signature) -> dict[str, list[FlagHelp]]:
    """Title -> flags: first those of the command, then those of each parameter that is a dataclass of settings."""
    meanings = documented(signature.function, "Args")
    nested = signature.groups()
    groups = {
        "flags": [
            _flag_help(name, meanings.get(name, ""), signature.defaults.get(name), signature)
            for name in signature.hints
            if name not in nested
        ]
    }
    for name, settings in nested.items():
        described = documented(settings, "Attributes")
        # Settings that are left to the command as a whole still have the defaults of their own class.
        defaults = signature.defaults.get(name) or settings
        groups[meanings.get(name, name).rstrip(".")] = [
            _flag_help(f"{name}.{key}", described.get(key, ""), getattr(defaults, key, None), signature)
            for key in (field.name for field in dataclasses.fields(settings) if field.init)
        ]
    return groups


def _chosen_groups(signature: Signature, words: Sequence[str]) -> dict[str, list[FlagHelp]]:
    """Title -> settings of the task, backbone and method that are chosen, by the words or by default."""
    from mim3d.backbones import BACKBONES, create_recipe
    from mim3d.methods import METHODS, create_method
    from mim3d.tasks import TASKS, create_task
    from mim3d.workflows.shared.initialisation import DEFAULT_BACKBONE

    known: dict[str, tuple[Iterable[str], Callable[[str], Any], str | None]] = {
        "task": (TASKS, create_task, None),
        "method": (METHODS, create_method, None),
        # Commands that train may leave it open.
        "backbone": (BACKBONES, create_recipe, DEFAULT_BACKBONE if "optim" in signature.hints else None),
    }
    groups = {}
    for kind, (names, create, otherwise) in known.items():
        if kind not in signature.hints:
            continue
        said = re.findall(rf"(?:^|\n)--{kind}[=\n]([^-\n{{][^\n]*)", "\n".join(words))
        name = said[-1] if said else signature.defaults.get(kind) or otherwise
        if isinstance(name, str):
            others = ", ".join(other for other in names if other != name)
            title = f"settings of {kind} {name}" + (f" (others: {others}; --{kind} NAME --help)" if others else "")
            groups[title] = _settings_help(create(name), kind)
    return groups


def _settings_help(settings: Any, prefix: str) -> list[FlagHelp]:
    """The settings of a dataclass, and of those in it, under their dotted keys."""
    hints, meanings = typing.get_type_hints(type(settings)), documented(type(settings), "Attributes")
    found = []
    for field in dataclasses.fields(settings):
        value, key = getattr(settings, field.name), f"{prefix}.{field.name}"
        if not field.init:
            continue
        if dataclasses.is_dataclass(value):
            found += _settings_help(value, key)
            continue
        hint = hints[field.name]
        plain = to_mapping(value)
        facts = [describe(hint), *([] if plain is None else [f"default {spelled(plain) or 'none'}"])]
        found.append(FlagHelp(f"--{key} {_values(hint)}", meanings.get(field.name, ""), tuple(facts)))
    return found


def _flag_help(key: str, meaning: str, default: Any, signature: Signature) -> FlagHelp:
    """Describe one flag: as many values as it takes, its type in words, and its default as in YAML."""
    hint = signature.hint_of(key)
    facts = [f"a name; its settings as --{key}.SETTING VALUE" if is_named(hint) else describe(hint)]
    if key in signature.required:
        facts.append("required")
    shown = to_mapping(default)
    if shown is not None:
        # A named choice is known by its name.
        name = shown.get("name", shown) if isinstance(shown, dict) else shown
        facts.append(f"default {spelled(name) or 'none'}")
    if key in signature.positional:
        facts.append("needs no flag")
    return FlagHelp(f"--{key} {_values(hint)}", meaning, tuple(facts))


def _values(hint: Any) -> str:
    """What stands after a flag."""
    limit = word_limit(hint)
    if describe(hint).startswith("true or false"):
        return "true|false"
    if limit is None:
        return "VALUE ..."
    return "NAME" if is_named(hint) else " ".join(["VALUE"] * limit)
