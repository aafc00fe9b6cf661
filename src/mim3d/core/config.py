"""Settings as dataclasses, and their way from and to YAML."""

import dataclasses
import functools
import importlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mim3d.core.coercion import build_settings, coerce, describe, nearest, update_settings
from mim3d.core.errors import ConfigError

__all__ = [
    "build_settings",
    "coerce",
    "describe",
    "flat",
    "nearest",
    "parse_duration",
    "parse_yaml",
    "read_yaml",
    "resolve",
    "to_mapping",
    "to_named",
    "update_settings",
    "write_yaml",
]


def to_mapping(settings: Any) -> Any:
    """Settings as plain dicts, lists and scalars: what YAML and JSON can hold.

    Dataclasses become dicts by field, tuples and sets lists, paths text; NumPy scalars plain numbers.
    """
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {f.name: to_mapping(getattr(settings, f.name)) for f in dataclasses.fields(settings)}
    if isinstance(settings, Mapping):
        return {key: to_mapping(value) for key, value in settings.items()}
    if isinstance(settings, (set, frozenset)):
        return sorted(to_mapping(item) for item in settings)
    if isinstance(settings, Iterable) and not isinstance(settings, (str, bytes)):
        return [to_mapping(item) for item in settings]
    if isinstance(settings, os.PathLike):
        return os.fspath(settings)
    if hasattr(settings, "item") and callable(settings.item):
        return settings.item()
    return settings


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def to_named(settings: Any, registry: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as the mapping that :func:`resolve` turns back into them, with every field written out."""
    kind = type(settings)
    spelled = f"{kind.__module__}:{kind.__qualname__}"
    names = (name for name, entry in registry.items() if entry is kind or entry == spelled)
    return {"name": next(names, spelled.replace(":", ".")), **to_mapping(settings)}


def resolve(
    named: Any,
    registry: Mapping[str, Callable[..., Any] | Any],
    kind: str,
    *,
    allow_import: bool = True,
) -> Any:
    """The settings that a name stands for.

    Args:
        named: a registered name; a mapping ``{"name": ..., setting: value, ...}``; a dotted path to a
            dataclass (``my_lab.foo.Foo``); or a settings instance, which is returned as it is.
        registry: name -> dataclass type, preset instance, function of no arguments that gives one, or
            ``"module:attribute"``, imported only when asked for.
        kind: what is looked for, in the words of an error: ``method``, ``backbone``.
        allow_import: whether a dotted path may be imported; false for names read from a file that
            somebody else may have written, since an import runs code.

    Raises:
        ConfigError: an unknown name (the nearest known one is offered), setting or value.
    """
    if dataclasses.is_dataclass(named) and not isinstance(named, type):
        return named
    values = {"name": named} if isinstance(named, str) else named
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise ConfigError(f"{kind} is {named!r}, but it takes a name, or a mapping with a name and settings.")
    name = values["name"]
    settings = {key: value for key, value in values.items() if key != "name"}
    if name in registry:
        entry = registry[name]
        target = _import_attribute(*entry.split(":")) if isinstance(entry, str) else entry
    elif allow_import and "." in name and all(part.isidentifier() for part in name.split(".")):
        target = _import_dotted(name, kind)
    else:
        raise ConfigError(f"There is no {kind} '{name}'.{nearest(name, registry)}")
    if isinstance(target, type):
        return build_settings(target, settings, kind)
    preset = target if dataclasses.is_dataclass(target) else target()
    return update_settings(preset, settings, kind)


def _import_attribute(module: str, attribute: str) -> Any:
    return getattr(importlib.import_module(module), attribute)


def _import_dotted(path: str, kind: str) -> Any:
    module, _, attribute = path.rpartition(".")
    try:
        target = _import_attribute(module, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{kind} '{path}' cannot be imported: {error}.") from error
    # Only settings: calling any function that a path names would run code nobody meant.
    if not dataclasses.is_dataclass(target):
        raise ConfigError(f"{kind} '{path}' is no dataclass of settings; name one, such as my_lab.foo.Foo.")
    return target


class _Loader(yaml.SafeLoader):
    """Safe YAML in the 1.2 sense: 1e-3 is a number, and 12:30, no and 2024-01-01 stay text."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (dict, list)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
            if key in mapping:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes every text which a reader could take for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: Any) -> Any:
        # Control characters survive only in double quotes, where they are escaped.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')

    def represent_list(self, data: Any) -> Any:
        short = not any(isinstance(item, (dict, list)) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=short)


_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+|[-+]?(\d+\.\d*|\.\d+)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
for _tag, _pattern, _first in (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?(0|[1-9]\d*)"), list("-+0123456789")),
    ("float", _NUMBER, list("-+.0123456789")),
):
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, _first)
_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_NUMBER.pattern})$"), list("-+.0123456789"))


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file of settings; nothing in it can run code.

    Raises:
        ConfigError: missing, unreadable, no valid YAML, a key given twice, or no mapping of names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the path of a YAML file of settings.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a text file of settings: {error}.") from error
    content = parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path} holds no mapping of settings; write lines such as 'max_steps: 100'.")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """What a piece of YAML says: dicts, lists and scalars.

    Raises:
        ConfigError: no valid YAML; the sentence begins with ``where``.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply to be settings.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no valid YAML: {_one_line(error)}.") from error


def _one_line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return f"{getattr(error, 'problem', None) or str(error).splitlines()[0]}{place}"


def write_yaml(path: str | os.PathLike[str], mapping: Mapping[str, Any]) -> None:
    """Write settings as YAML, in their order; the file appears whole or not at all.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    target = Path(path)
    text = yaml.dump(to_mapping(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}.") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        # mkstemp makes files private; settings follow the user's umask like any other file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise ConfigError(f"{target} cannot be written: {error.strerror}.") from error


@functools.cache
def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def parse_duration(text: str) -> float:
    """Seconds in ``HH:MM`` or ``HH:MM:SS`` (hours may exceed 24).

    Raises:
        ConfigError: anything else, and a duration of nothing.
    """
    match = re.fullmatch(r"(\d+):([0-5]\d)(?::([0-5]\d))?", str(text).strip())
    if match is None:
        raise ConfigError(f"Duration {text!r} is not of the form HH:MM or HH:MM:SS; write 01:30 for 90 minutes.")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total_s = math.fsum((3600 * hours, 60 * minutes, seconds))
    if total_s == 0:
        raise ConfigError(f"Duration {text!r} is nothing; give at least 00:00:01.")
    return total_s
