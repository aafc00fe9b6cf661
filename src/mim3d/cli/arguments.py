"""From the words of a command line to the keyword arguments of a command.

A flag takes as many words as its parameter's type says, so positional words may stand anywhere and negative numbers are
values. Files of settings lie below, flags on top, and one strict coercer serves both.
"""

import dataclasses
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from mim3d.core.errors import BothSetError, ConfigError
from mim3d.core.files import load_json
from mim3d.core.own_code import own_code_in
from mim3d.core.run_folder import MANIFEST_NAME, how_to_resume
from mim3d.core.settings import CONFIG_NAME, coerce, describe, nearest, overlay, parse_yaml, read_yaml, update_settings

_FLAG = re.compile(r"--[A-Za-z]")
_SHORT_FLAG = re.compile(r"-[A-Za-z]+")

#: Flags of the command line itself, with their types.
_OWN_FLAGS = {"config": tuple[str, ...], "allow_code": bool, "debug": bool, "help": bool}

#: Flags that somebody who gives a word without one means most likely.
_USUAL_FLAGS = ("data", "input", "predictions", "references", "weights", "out")

#: Settings that name a file or folder.
PATH_SETTINGS = ("data", "weights", "like", "cache", "plan", "train_list", "held_out_list", "probe")

#: Names that no parameter of a command may have.
RESERVED = (*_OWN_FLAGS, "command")


@dataclass(frozen=True)
class Signature:
    """What the command line knows of a command.

    Attributes:
        function: The function of the command, with a Google-style docstring.
        command: Name of the command.
        positional: Parameters that may be given without a flag, in order. The last takes all words that are left when
            its type is a list.
        hints: Type of each parameter.
        defaults: Default of each parameter that has one.
    """

    function: Callable[..., Any]
    command: str
    positional: tuple[str, ...]
    hints: Mapping[str, Any]
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Any], command: str, positional: tuple[str, ...]) -> "Signature":
        """Read the signature of a function."""
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
        defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
        return cls(function, command, positional, {name: hints[name] for name in parameters}, defaults)

    @property
    def required(self) -> list[str]:
        """Parameters without a default."""
        return [name for name in self.hints if name not in self.defaults]

    def hint_of(self, key: str) -> Any:
        """Look up the type of a dotted key; it is ``Any`` below a named choice, whose settings depend on the name.

        Raises:
            ConfigError: There is no such flag. The nearest one is offered.
        """
        name, *parts = key.split(".")
        hint = self.hints.get(name)
        for part in parts:
            settings = settings_type(hint)
            if settings is not None:
                hint = typing.get_type_hints(settings).get(part)
            else:
                hint = Any if hint is not None and (hint is Any or takes_mapping(hint)) else None
        if hint is None:
            known = [f"--{name}" for name in (*self.hints, *_OWN_FLAGS)]
            for name, settings in self.groups().items():
                known += [f"--{name}.{field.name}" for field in dataclasses.fields(settings) if field.init]
            raise ConfigError(f"mim3d {self.command} has no flag --{key}.{nearest('--' + key, known)}")
        return hint

    def groups(self) -> dict[str, Any]:
        """Parameters that are dataclasses of settings, each with its dataclass."""
        kinds = {name: settings_type(hint) for name, hint in self.hints.items()}
        return {name: kind for name, kind in kinds.items() if kind is not None}


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
    """The dataclass of settings among the members of a type; None where there is none, and for a named choice."""
    if hint is None or is_named(hint):
        return None
    kinds = (member for member in _members(hint) if isinstance(member, type) and dataclasses.is_dataclass(member))
    return next(kinds, None)


def word_limit(hint: Any) -> int | None:
    """The most words that a flag of this type takes; None where any number may follow."""
    limits = [1]
    for member in _members(hint):
        kind, arguments = get_origin(member) or member, get_args(member)
        if kind is tuple and arguments and arguments[-1] is not Ellipsis:
            limits.append(len(arguments))
        elif member is Any or (isinstance(kind, type) and issubclass(kind, Sequence) and kind not in (str, bytes)):
            return None
    return max(limits)


def split_line(words: Sequence[str], signature: Signature) -> dict[str, Any]:
    """Give each flag its words, and the words without a flag to the positional parameters.

    Returns:
        Value of each flag, by its dotted key.

    Raises:
        ConfigError: A flag is unknown or has no value, or there are more words than positional parameters.
    """
    found: dict[str, Any] = {}
    loose: list[str] = []
    # Words that stand behind a flag of true or false and are neither: the flag alone means true.
    beside: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if _SHORT_FLAG.fullmatch(word):
            raise ConfigError(f"mim3d {signature.command} has no flag {word}; flags begin with two dashes.")
        if not _FLAG.match(word):
            loose.append(word)
            continue
        key, equals, attached = word[2:].partition("=")
        hint = _OWN_FLAGS.get(key) or signature.hint_of(key)
        values = [attached] if equals else _values_at(rest, hint)
        if not equals:
            del rest[: len(values)]
            if not values and rest:
                beside[rest[0]] = key
        found[key] = _value_of(key, values, hint, signature.command)
    for name in signature.positional:
        limit = word_limit(signature.hints[name])
        taken, loose = loose[:limit], loose[len(loose) if limit is None else limit :]
        if taken:
            found[name] = taken if limit is None or len(taken) > 1 else taken[0]
    if loose and loose[0] in beside:
        key = beside[loose[0]]
        raise ConfigError(f"--{key} is {loose[0]!r}, but it takes {describe(signature.hint_of(key))}.")
    if loose:
        flag = next((name for name in _USUAL_FLAGS if name in signature.hints and name not in found), None)
        offer = f"put a flag before it, such as --{flag} {loose[0]}, or" if flag else "put the flag before it, or"
        raise ConfigError(
            f"mim3d {signature.command} cannot place '{loose[0]}'; {offer} see mim3d {signature.command} --help."
        )
    return found


def _values_at(words: Sequence[str], hint: Any) -> list[str]:
    """The words at the front that belong to a flag of this type."""
    if _members(hint) == (bool,):
        return list(words[:1]) if words and words[0].lower() in ("true", "false") else []
    values: list[str] = []
    for word in words[: word_limit(hint)]:
        if _FLAG.match(word) or _SHORT_FLAG.fullmatch(word):
            break
        values.append(word)
    return values


def _value_of(key: str, values: list[str], hint: Any, command: str) -> Any:
    if not values and _members(hint) == (bool,):
        return True
    if not values:
        raise ConfigError(f"mim3d {command} --{key} has no value; write it after the flag.")
    if len(values) > 1:
        return values
    # A list or mapping may be written as one word of YAML: --method '{name: MiM, temperature: 0.2}'.
    structured = hint is Any or word_limit(hint) != 1 or settings_type(hint) or takes_mapping(hint)
    return parse_yaml(values[0], f"--{key}") if values[0][:1] in ("[", "{") and structured else values[0]


def command_arguments(flags: Mapping[str, Any], signature: Signature) -> dict[str, Any]:
    """Turn flags into the keyword arguments of the command: files of settings below, flags on top, all of them typed.

    Args:
        flags: What :func:`split_line` returns.
        signature: Signature of the command.

    Raises:
        ConfigError: A setting is unknown, missing or of another type, a file belongs to another command, or it names
            code that the flags do not.
    """
    own = _settings_of_run(flags, signature)
    files = [*own, *coerce(flags.get("config", ()), _OWN_FLAGS["config"], "--config")]
    layers = []
    for path in files:
        content = read_yaml(path)
        if path in own:
            content = _as_from_its_folder(content, path)
        command = content.pop("command", signature.command)
        if command != signature.command:
            raise ConfigError(
                f"{path} holds the settings of mim3d {command}, not of mim3d {signature.command}; "
                f"run mim3d {command} --config {path}."
            )
        for key in content:
            if key not in signature.hints:
                raise ConfigError(f"{path}: mim3d {command} has no setting '{key}'.{nearest(key, signature.hints)}")
        layers.append(content)
    layers.append(_nested({key: value for key, value in flags.items() if key not in RESERVED}))
    merged = _merged(layers, signature)
    below = getattr(signature.function, "below", None)
    if below is not None and not own and (lowest := below(merged)):
        from_run = merged.get("like") or os.path.join(str(merged.get("out")), CONFIG_NAME)
        files, layers = [str(from_run), *files], [lowest, *layers]
        merged = _merged(layers, signature)
    missing = [name for name in signature.required if name not in merged]
    if missing:
        words = [name.upper() if name in signature.positional else f"--{name}" for name in missing]
        going_on = "resume" in signature.hints and coerce(flags.get("resume", False), bool, "--resume")
        no_run = f"{flags['out']} holds no run to go on with, and " if going_on and "out" in flags else ""
        raise ConfigError(
            f"{no_run}mim3d {signature.command} needs {' and '.join(words)}; see mim3d {signature.command} --help."
        )
    if not coerce(flags.get("allow_code", False), bool, "--allow_code"):
        _require_typed_code(merged, layers, files)
    return {name: _typed(name, value, signature) for name, value in merged.items()}


def _merged(layers: Sequence[Mapping[str, Any]], signature: Signature) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            merged[name] = overlay(merged.get(name), _named(value, signature.hint_of(name)))
    return merged


def _settings_of_run(flags: Mapping[str, Any], signature: Signature) -> list[str]:
    """The file of settings in ``--out``, below all others, where a run is to go on there; none where there is none."""
    if "resume" not in signature.hints or not coerce(flags.get("resume", False), bool, "--resume"):
        return []
    config = os.path.join(str(flags.get("out", "")), CONFIG_NAME)
    return [config] if "out" in flags and os.path.isfile(config) else []


@contextmanager
def refused_with_how_to_resume(flags: Mapping[str, Any], signature: Signature) -> Iterator[None]:
    """Say how a run goes on where what is given on top of its own settings excludes one of them.

    Args:
        flags: What :func:`split_line` returns.
        signature: Signature of the command.
    """
    try:
        yield
    except BothSetError as error:
        if not _settings_of_run(flags, signature):
            raise
        again = how_to_resume(signature.command, Path(flags["out"]))
        raise ConfigError(
            f"{error} {flags['out']} has settings of its own; to go on with those alone, leave these out: {again}. "
            "For a new run, choose another --out."
        ) from None


def _as_from_its_folder(settings: dict[str, Any], path: str) -> dict[str, Any]:
    """The settings of a run; paths that are found only from the folder where it was started begin there.

    A cache that has moved together with the run is where it was as seen from the run.
    """
    folder, before, here = None, settings.get("out"), os.path.dirname(path)
    with suppress(OSError, ValueError, AttributeError):
        folder = load_json(os.path.join(here, MANIFEST_NAME)).get("working_folder")
    if not isinstance(folder, str):
        return settings
    cache = settings.get("cache")
    if isinstance(before, str) and isinstance(cache, str):
        from_run = os.path.relpath(os.path.join(folder, cache), os.path.join(folder, before))
        moved_cache = os.path.normpath(os.path.join(here, from_run))
        if not os.path.lexists(os.path.join(folder, cache)) and os.path.lexists(moved_cache):
            settings = {**settings, "cache": moved_cache}
    named = {name: value for name, value in settings.items() if name in PATH_SETTINGS and isinstance(value, str)}
    there = {name: os.path.join(folder, value) for name, value in named.items()}
    moved = {name: full for name, full in there.items() if not os.path.lexists(named[name]) and os.path.lexists(full)}
    return {**settings, **moved}


def _require_typed_code(merged: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], files: Sequence[str]) -> None:
    """Refuse code of the user's own that a file names and the flags, the last of the layers, do not."""
    typed = own_code_in(layers[-1])
    for name, code in own_code_in(merged).items():
        if typed.get(name) != code:
            naming = (
                path for path, layer in zip(files, layers[:-1], strict=True) if own_code_in(layer).get(name) == code
            )
            raise ConfigError(
                f"{next(naming)} names the {name} '{code}', whose code is imported only when you name it; if you trust "
                f"it, use --{name} {code}, or --allow_code true for whatever the file names."
            )


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


def _typed(name: str, value: Any, signature: Signature) -> Any:
    hint, default = signature.hints[name], signature.defaults.get(name)
    where = f"--{name}"
    if isinstance(value, Mapping) and dataclasses.is_dataclass(default) and not isinstance(default, type):
        return update_settings(default, value, where)
    if is_named(hint) and isinstance(value, Mapping):
        value = overlay(_named(default, hint), value) if "name" not in value else dict(value)
        # Where nothing is the default, the command knows best what settings without a name belong to.
        nameless = default is None and name in signature.defaults and "name" not in value
        if not nameless and not isinstance(value.get("name"), str):
            raise ConfigError(f"{where} has settings but no name; write {where} NAME.")
        return value if nameless or len(value) > 1 else value["name"]
    return coerce(value, hint, where)
