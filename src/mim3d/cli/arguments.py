"""From the words of a command line to the keyword arguments of a command.

A flag takes as many words as its parameter's type says, so positional words may stand anywhere and
negative numbers are values. Files of settings lie below, flags on top, and one strict coercer serves both.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin

from mim3d.core.errors import ConfigError
from mim3d.core.settings import coerce, nearest, parse_yaml, read_yaml, update_settings

_FLAG = re.compile(r"--[A-Za-z]")
_SHORT_FLAG = re.compile(r"-[A-Za-z]+")
_TRUTHS = {"true", "false"}
_PATHS = tuple[str, ...]

#: Flags of the command line itself: no command may have a parameter of these names.
RESERVED = ("config", "debug", "help", "command")


@dataclass(frozen=True)
class Signature:
    """What the command line has to know of a command's function.

    Attributes:
        command: the command's name.
        positional: parameters that may be given without a flag, in order; the last takes all words left
            when its type is a list.
        hints: parameter -> its type.
        defaults: parameter -> its default, for those that have one.
    """

    command: str
    positional: tuple[str, ...]
    hints: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Any], command: str, positional: tuple[str, ...]) -> "Signature":
        """Read it from the function."""
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
        defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
        return cls(command, positional, {name: hints[name] for name in parameters}, defaults)

    def known_flags(self) -> list[str]:
        """Every flag with its dashes, those of nested settings included."""
        flags = [f"--{name}" for name in (*self.hints, "config", "debug", "help")]
        for name, hint in self.hints.items():
            settings = settings_type(hint)
            if settings is not None:
                flags += [f"--{name}.{field.name}" for field in dataclasses.fields(settings) if field.init]
        return flags

    def hint_of(self, key: str) -> Any:
        """The type of a dotted key, ``Any`` below a named choice (its settings depend on the name).

        Raises:
            ConfigError: there is no such flag; the nearest one is offered.
        """
        name, *parts = key.split(".")
        hint = self.hints.get(name)
        for part in parts:
            if settings_type(hint) is not None:
                hint = typing.get_type_hints(settings_type(hint)).get(part)
            else:
                hint = Any if hint is not None and (hint is Any or takes_mapping(hint)) else None
        if hint is None:
            raise ConfigError(f"mim3d {self.command} has no flag --{key}.{nearest('--' + key, self.known_flags())}")
        return hint


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union without None, or the type itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for member in get_args(hint) if member is not type(None))
    return (hint,)


def takes_mapping(hint: Any) -> bool:
    """Whether a mapping is among the values of a type."""
    kinds = [get_origin(member) or member for member in _members(hint)]
    return any(isinstance(kind, type) and issubclass(kind, Mapping) for kind in kinds)


def is_named(hint: Any) -> bool:
    """Whether a type is a named choice: a name, or a mapping with a name and settings."""
    return str in _members(hint) and takes_mapping(hint)


def settings_type(hint: Any) -> Any | None:
    """The settings dataclass of a type, if it has one and is no named choice."""
    if hint is None or is_named(hint):
        return None
    found = [member for member in _members(hint) if isinstance(member, type) and dataclasses.is_dataclass(member)]
    return found[0] if found else None


def word_limit(hint: Any) -> int | None:
    """How many words a flag of this type takes at most; None is any number."""
    limits: list[int | None] = []
    for member in _members(hint):
        kind, arguments = get_origin(member) or member, get_args(member)
        if member is Any:
            return None
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            limits.append(len(arguments))
        elif isinstance(kind, type) and issubclass(kind, Sequence) and kind not in (str, bytes):
            return None
        else:
            limits.append(1)
    return max(limit for limit in limits if limit is not None)


@dataclass
class Line:
    """A command line taken apart: flags by dotted key, in order, and the words without a flag."""

    flags: dict[str, Any]
    loose: list[str]


def split_line(words: Sequence[str], signature: Signature) -> Line:
    """Give each flag its words.

    Raises:
        ConfigError: an unknown flag, or a flag without a value.
    """
    line = Line(flags={}, loose=[])
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not _FLAG.match(word):
            if _SHORT_FLAG.fullmatch(word):
                raise ConfigError(f"mim3d {signature.command} has no flag {word}; flags begin with two dashes.")
            line.loose.append(word)
            continue
        key, equals, attached = word[2:].partition("=")
        hint = _reserved_hint(key) or signature.hint_of(key)
        values = [attached] if equals else _values_after(words[position:], hint)
        position += 0 if equals else len(values)
        line.flags[key] = _value_of(key, values, hint, signature)
    return line


def _reserved_hint(key: str) -> Any:
    return {"config": _PATHS, "debug": bool, "help": bool}.get(key)


def _values_after(words: Sequence[str], hint: Any) -> list[str]:
    if _members(hint) == (bool,):
        return list(words[:1]) if words and words[0].lower() in _TRUTHS else []
    limit = word_limit(hint)
    values: list[str] = []
    for word in words:
        if _FLAG.match(word) or _SHORT_FLAG.fullmatch(word) or (limit is not None and len(values) == limit):
            break
        values.append(word)
    return values


def _value_of(key: str, values: list[str], hint: Any, signature: Signature) -> Any:
    if not values and _members(hint) == (bool,):
        return True
    if not values:
        raise ConfigError(f"mim3d {signature.command} --{key} has no value; write it after the flag.")
    if len(values) > 1:
        return values
    # A list or mapping may be written as one word of YAML: --method '{name: MiM, temperature: 0.2}'.
    if values[0][:1] in ("[", "{") and (
        hint is Any or word_limit(hint) != 1 or settings_type(hint) or takes_mapping(hint)
    ):
        return parse_yaml(values[0], f"--{key}")
    return values[0]


def command_arguments(line: Line, signature: Signature) -> dict[str, Any]:
    """The keyword arguments of the command: its files of settings, the flags on top, typed and complete.

    Raises:
        ConfigError: an unknown or missing setting, a value of another type, a file for another command.
    """
    layers = [_read_settings(path, signature) for path in coerce(line.flags.get("config", ()), _PATHS, "--config")]
    flags = {key: value for key, value in line.flags.items() if key not in RESERVED}
    layers.append(_nested(flags | _positional(line, signature)))
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            signature.hint_of(name)
            merged[name] = _overlay(merged.get(name), _named(value, signature.hints[name]))
    missing = [name for name in signature.hints if name not in signature.defaults and name not in merged]
    if missing:
        words = [name.upper() if name in signature.positional else f"--{name}" for name in missing]
        raise ConfigError(
            f"mim3d {signature.command} needs {' and '.join(words)}; see mim3d {signature.command} --help."
        )
    return {name: _typed(name, value, signature) for name, value in merged.items()}


def _read_settings(path: str, signature: Signature) -> dict[str, Any]:
    content = read_yaml(path)
    command = content.pop("command", signature.command)
    if command != signature.command:
        raise ConfigError(
            f"{path} holds the settings of mim3d {command}, not of mim3d {signature.command}; "
            f"run mim3d {command} --config {path}."
        )
    for key in content:
        if key not in signature.hints:
            raise ConfigError(f"{path}: mim3d {command} has no setting '{key}'.{nearest(key, signature.hints)}")
    return content


def _positional(line: Line, signature: Signature) -> dict[str, Any]:
    words, found = list(line.loose), {}
    for name in signature.positional:
        if not words:
            break
        limit = word_limit(signature.hints[name])
        taken, words = (words, []) if limit is None else (words[:limit], words[limit:])
        found[name] = taken if limit is None or len(taken) > 1 else taken[0]
    if words:
        raise ConfigError(f"mim3d {signature.command} cannot place '{words[0]}'; see mim3d {signature.command} --help.")
    return found


def _nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    """``{"method": "MiM", "method.heads": "2"}`` as ``{"method": {"name": "MiM", "heads": "2"}}``."""
    nested: dict[str, Any] = {}
    for key, value in sorted(flags.items(), key=lambda item: item[0].count(".")):
        *path, last = key.split(".")
        place = nested
        for part in path:
            below = place.setdefault(part, {})
            place[part] = place = below if isinstance(below, dict) else {"name": below}
        place[last] = value
    return nested


def _named(value: Any, hint: Any) -> Any:
    return {"name": value} if is_named(hint) and isinstance(value, str) else value


def _overlay(below: Any, above: Any) -> Any:
    """Merge mappings by key; another ``name`` takes none of the settings of the one below."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "name" in above and "name" in below and above["name"] != below["name"]:
        return dict(above)
    return {**below, **{key: _overlay(below.get(key), value) for key, value in above.items()}}


def _typed(name: str, value: Any, signature: Signature) -> Any:
    hint, default = signature.hints[name], signature.defaults.get(name)
    where = f"--{name}"
    if isinstance(value, Mapping) and dataclasses.is_dataclass(default) and not isinstance(default, type):
        return update_settings(default, value, where)
    if is_named(hint) and isinstance(value, Mapping):
        value = _overlay(_named(default, hint), value) if "name" not in value else dict(value)
        # Where nothing is the default, the command knows best what settings without a name belong to.
        nameless = default is None and name in signature.defaults and "name" not in value
        if not nameless and not isinstance(value.get("name"), str):
            raise ConfigError(f"{where} has settings but no name; write {where} NAME.")
        return value if nameless or len(value) > 1 else value["name"]
    return coerce(value, hint, where)
