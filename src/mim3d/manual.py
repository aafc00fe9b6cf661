"""The text of ``mim3d COMMAND --help``, read from the function's signature and docstring."""

import argparse
import inspect
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

from mim3d.arguments import Signature, is_named, settings_type, word_limit
from mim3d.config import describe, to_mapping


def manual(function: Callable[..., Any], name: str, positional: tuple[str, ...]) -> str:
    """The help of a command: usage, description, and every flag with its meaning, type and default."""
    signature = Signature.of(function, name, positional)
    parser = ArgumentParser(
        prog=f"mim3d {name}",
        usage=_usage(signature),
        description=_description(function),
        formatter_class=_Formatter,
        exit_on_error=False,
        add_help=False,
    )
    nested = {key: kind for key, hint in signature.hints.items() if (kind := settings_type(hint)) is not None}
    parser.add_function_arguments(function, skip=set(nested), sub_configs=False)
    for key, kind in nested.items():
        parser.add_class_arguments(kind, key, sub_configs=False)
    for group in parser._action_groups:
        group._group_actions = [action for action in group._group_actions if action.dest not in nested]
        if any(action.dest in signature.hints for action in group._group_actions):
            group.title = "flags"
        for action in group._group_actions:
            _reword(action, signature)
    common = parser.add_argument_group("every command")
    common.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="Settings from a file, such as the config.yaml of a run; flags win.",
    )
    common.add_argument("--debug", metavar="true|false", help="Show the traceback of a refusal.")
    return parser.format_help().rstrip()


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Plain argparse, wide enough to read."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)


def _usage(signature: Signature) -> str:
    places = [
        name.upper() + (" ..." if word_limit(signature.hints[name]) is None else "") for name in signature.positional
    ]
    required = [
        f"--{name} {_values(signature.hints[name])}"
        for name in signature.hints
        if name not in signature.defaults and name not in signature.positional
    ]
    return " ".join(["mim3d", signature.command, *places, *required, "[flags]"])


def _description(function: Callable[..., Any]) -> str:
    text = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:"):
        text = text.split(f"\n{section}")[0]
    return text.rstrip()


def _values(hint: Any) -> str:
    """What stands after a flag in the help."""
    limit = word_limit(hint)
    if describe(hint).startswith("true or false"):
        return "true|false"
    if limit is None:
        return "VALUE ..."
    return "NAME" if is_named(hint) else " ".join(["VALUE"] * limit)


def _reword(action: argparse.Action, signature: Signature) -> None:
    """One flag in our own syntax: as many values as it takes, its type in words, its default as in YAML."""
    name = action.dest
    hint = signature.hint_of(name)
    action.option_strings = [f"--{name}"]
    action.metavar = _values(hint)
    facts = [describe(hint)]
    if is_named(hint):
        facts = ["a name; its settings as --" + name + ".SETTING VALUE"]
    if name in signature.hints and name not in signature.defaults:
        facts.append("required")
    default = to_mapping(_default_of(name, signature))
    if default is not None:
        facts.append(f"default {_shown(default)}")
    if name in signature.positional:
        facts.append("needs no flag")
    text = (action.help or "").strip()
    action.help = f"{text} ({'; '.join(facts)})".strip().replace("%", "%%")


def _default_of(key: str, signature: Signature) -> Any:
    """The default of a dotted key; a setting of an optional group has its own class's default."""
    name, *parts = key.split(".")
    value = signature.defaults.get(name)
    if parts and value is None:
        value = settings_type(signature.hints[name])
    for part in parts:
        value = getattr(value, part, None)
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value.get("name", value)) if isinstance(value, dict) else str(value)
