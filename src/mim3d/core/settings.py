"""Settings are frozen dataclasses: built strictly from YAML or a command line, found by name, and written back."""

import dataclasses
import difflib
import importlib
import itertools
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from mim3d.core.errors import ConfigError, first_line
from mim3d.core.files import write_text
from mim3d.core.names import cut
from mim3d.core.own_code import how_to_find, is_dotted_path

_T = TypeVar("_T")

#: Beyond it whole numbers are no longer exact in other programs, and no setting means anything.
LARGEST_NUMBER = 2**53

#: File of the settings in the folder of a run.
CONFIG_NAME = "config.yaml"

_TRUE = {"true", "yes", "on"}
_FALSE = {"false", "no", "off"}
_NONE = {"null", "none", "~", ""}


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name.

    Args:
        name: The unknown name.
        known: All names that there are.

    Returns:
        `` Did you mean 'hybrid_base'?`` where a known name is close, else `` Known: a, b, c.``; empty where no name is
        known.
    """
    names = sorted(known)
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{by_lower[close[0]]}'?"
    return f" Known: {', '.join(names)}." if names else ""


def build_settings(cls: type[_T], values: Mapping[str, Any], where: str, kept: Mapping[str, Any] | None = None) -> _T:
    """Build a dataclass of settings from a mapping, strictly.

    Args:
        cls: A dataclass. Nested dataclasses and fields that are tuples, optional or literal are followed.
        values: Value of each field as YAML or the command line gives it: ``"1e-3"`` becomes a float.
        where: Beginning of the sentence of an error, such as ``method``.
        kept: Typed value of each field that ``values`` need not give.

    Raises:
        ConfigError: A key is unknown or missing, or a value is of another type. Key, value and remedy are named.
    """
    if not isinstance(values, Mapping):
        raise _wrong(values, Mapping, where)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(f"{where} has no setting '{cut(str(key))}'.{nearest(str(key), fields)}")
    typed = {**(kept or {}), **{key: coerce(value, hints[key], f"{where}.{key}") for key, value in values.items()}}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in typed:
            raise ConfigError(f"{where}.{name} is required; give it a value.")
    try:
        return cls(**typed)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def update_settings(settings: _T, values: Mapping[str, Any], where: str) -> _T:
    """Change some of the settings of a dataclass, as strictly as :func:`build_settings`.

    Args:
        settings: The settings to start from.
        values: New value of each field to change. A nested mapping changes only the keys that it names.
        where: Beginning of the sentence of an error, such as ``method``.

    Raises:
        ConfigError: A key is unknown, or a value is of another type.
    """
    changes: dict[str, Any] = {}
    for key, value in values.items():
        current = getattr(settings, key, None)
        nested = isinstance(value, Mapping) and dataclasses.is_dataclass(current) and not isinstance(current, type)
        changes[key] = update_settings(current, value, f"{where}.{key}") if nested else value
    kept = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.init}  # type: ignore[arg-type]
    return build_settings(type(settings), changes, where, kept)


def coerce(value: Any, hint: Any, where: str) -> Any:
    """Turn a loose value into what a type annotation asks for.

    Args:
        value: What YAML or the command line gives.
        hint: The annotation.
        where: Beginning of the sentence of an error, such as ``--max_steps``.

    Raises:
        ConfigError: The value is of another type. The sentence names the value and what was expected.
    """
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if kind is typing.Annotated:
        return coerce(value, arguments[0], where)
    if kind in (Union, types.UnionType):
        return _coerce_union(value, hint, where)
    if kind is Literal:
        exact = [choice for choice in arguments if type(choice) is type(value) and choice == value]
        spelled = [choice for choice in arguments if isinstance(value, str) and str(choice) == value]
        if not exact and not spelled:
            raise ConfigError(f"{where} is {cut(repr(value))}.{nearest(str(value), map(str, arguments))}")
        return (exact + spelled)[0]
    if kind is tuple or _is_list(kind):
        return _coerce_items(value, hint, where)
    if isinstance(kind, type) and issubclass(kind, Mapping):
        # A named choice may be settings already, see `resolve`.
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _finite(value, where)
        if not isinstance(value, Mapping):
            raise _wrong(value, hint, where)
        key_hint, value_hint = arguments or (Any, Any)
        return {coerce(k, key_hint, where): coerce(v, value_hint, f"{where}.{k}") for k, v in value.items()}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _finite(value, where) if isinstance(value, hint) else build_settings(hint, value, where)
    return _coerce_scalar(value, hint, where)


def _coerce_items(value: Any, hint: Any, where: str) -> list[Any] | tuple[Any, ...]:
    """A list or tuple, item by item; where any number is allowed, a single text counts as one item."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    is_fixed = kind is tuple and bool(arguments) and arguments[-1] is not Ellipsis
    items = [value] if isinstance(value, (str, os.PathLike)) and not is_fixed else value
    if not isinstance(items, (list, tuple)):
        raise _wrong(value, hint, where)
    if is_fixed and len(items) != len(arguments):
        raise ConfigError(f"{where} has {len(items)} values ({cut(repr(value))}), but it takes {len(arguments)}.")
    hints = arguments if is_fixed else [(arguments or (Any,))[0]] * len(items)
    typed = [coerce(item, h, f"{where}[{i}]") for i, (item, h) in enumerate(zip(items, hints, strict=True))]
    return tuple(typed) if kind is tuple else typed


def _coerce_union(value: Any, hint: Any, where: str) -> Any:
    members = get_args(hint)
    if isinstance(value, str) and value == "null" and type(None) in members:
        return None
    for member in members:
        if isinstance(member, type) and type(value) is member and _is_bounded(value):
            return value
    # "null" typed by a user means none even where text is allowed too; a number comes before text.
    order = {type(None): 0, str: 2}
    problems = []
    for member in sorted(members, key=lambda member: order.get(member, 1)):
        try:
            return coerce(value, member, where)
        except ConfigError as error:
            problems.append((member, error))
    # Where one member alone takes values of this shape, its own error is the clearest.
    meant = [error for member, error in problems if _has_shape_of(value, member)]
    raise meant[0] if len(meant) == 1 else _wrong(value, hint, where)


def _has_shape_of(value: Any, member: Any) -> bool:
    """Whether a mapping or list is what a member of a union takes, whatever it holds."""
    kind = get_origin(member) or member
    if isinstance(value, Mapping):
        return dataclasses.is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, Mapping))
    return isinstance(value, (list, tuple)) and (kind is tuple or _is_list(kind))


def _coerce_scalar(value: Any, hint: Any, where: str) -> Any:
    text = value.strip().lower() if isinstance(value, str) else None
    if hint is bool:
        if isinstance(value, bool):
            return value
        if text in _TRUE | _FALSE:
            return text in _TRUE
    elif hint in (int, float):
        number = _number(value)
        # Whole numbers may be larger than any floating point number.
        with suppress(OverflowError):
            if number is not None and hint is float and math.isfinite(number):
                return float(number)
            if number is not None and float(number).is_integer() and abs(number) <= LARGEST_NUMBER:
                return int(number)
    elif hint in (None, type(None)):
        if value is None or text in _NONE:
            return None
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif not isinstance(hint, type) or isinstance(value, hint):
        return value
    raise _wrong(value, hint, where)


def _number(value: Any) -> Any:
    """A number, also one of NumPy or in a text; None for anything else, such as a truth value."""
    if isinstance(value, bool):
        return None
    for kind in (int, float) if isinstance(value, str) else ():
        with suppress(ValueError):
            value = kind(value)
    return value if isinstance(value, numbers.Real) else None


def _is_bounded(value: Any) -> bool:
    """Whether a value is no number beyond all bounds: no NaN and not infinite."""
    return not isinstance(value, float) or math.isfinite(value)


def _finite(value: Any, where: str) -> Any:
    """Settings that somebody built, once no number in them is NaN or infinite unless that is its default.

    Raises:
        ConfigError: A number is.
    """
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if (part := getattr(value, field.name)) is not field.default:
                _finite(part, f"{where}.{field.name}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _finite(item, where)
    elif not _is_bounded(value):
        raise _wrong(value, float, where)
    return value


def _wrong(value: Any, hint: Any, where: str) -> ConfigError:
    takes, number = describe(hint), _number(value)
    if number is not None and not _is_bounded(number):
        takes = takes.replace("a number", "a finite number")
    elif number is not None and abs(number) > LARGEST_NUMBER:
        takes = takes.replace("a whole number", f"a whole number of at most {LARGEST_NUMBER:,}")
    return ConfigError(f"{where} is {cut(repr(value))}, but it takes {takes}.")


def describe(hint: Any) -> str:
    """A type annotation in a user's words: ``tuple[int, int]`` is ``2 values, each a whole number``."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if hint in (None, type(None)):
        return "null"
    if isinstance(hint, type) and hint in plain:
        return plain[hint]
    if kind in (Union, types.UnionType):
        # What only Python can give is none of a user's words.
        words = [describe(argument) for argument in arguments if argument is not Any]
        return (", or " if any("each" in word for word in words) else " or ").join(words)
    if kind is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"{len(arguments)} values, each {describe(arguments[0])}"
    if kind is tuple or _is_list(kind):
        return f"a list, each {describe(arguments[0])}" if arguments else "a list"
    return "a mapping of settings"


def _is_list(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Sequence) and kind not in (str, bytes, tuple)


def to_mapping(settings: Any) -> Any:
    """Turn settings into plain dicts, lists and scalars: what YAML and JSON can hold.

    Dataclasses become dicts by field. Tuples and sets become lists, paths become text, NumPy scalars plain numbers.
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


def spelled(value: Any) -> str:
    """A plain value as the words that stand behind a flag."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return " ".join(map(spelled, value)) if isinstance(value, list) else str(value)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into one level, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def overlay(below: Any, above: Any) -> Any:
    """Merge mappings by key; another ``name`` takes none of the settings of the one below it."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    if "name" in above and "name" in below and above["name"] != below["name"]:
        return dict(above)
    return {**below, **{key: overlay(below.get(key), value) for key, value in above.items()}}


def to_named(settings: Any, registry: Mapping[str, Any]) -> dict[str, Any]:
    """Turn settings into the mapping that :func:`resolve` turns back into them, with every field written out."""
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
    """Find the settings that a name stands for.

    Args:
        named: A registered name; a mapping ``{"name": ..., setting: value, ...}``; a dotted path to a dataclass
            (``my_lab.foo.Foo``); or an instance of settings, which is returned as it is.
        registry: What each name stands for: a dataclass, an instance of one, a function of no arguments that gives
            one, or ``"module:attribute"``, which is imported only when asked for.
        kind: What is looked for, in the words of an error: ``method``, ``backbone``.
        allow_import: Whether a dotted path may be imported. It is false for names read from a file that somebody else
            may have written, since an import runs code.

    Raises:
        ConfigError: The name is unknown (the nearest known one is offered), or a setting or a value is wrong.
    """
    if dataclasses.is_dataclass(named) and not isinstance(named, type):
        return _finite(named, kind)
    values = {"name": named} if isinstance(named, str) else named
    if not isinstance(values, Mapping) or not isinstance(values.get("name"), str):
        raise ConfigError(f"{kind} is {cut(repr(named))}, but it takes a name, or a mapping with a name and settings.")
    target = find_named(values["name"], registry, kind, allow_import=allow_import)
    settings = {key: value for key, value in values.items() if key != "name"}
    if isinstance(target, type):
        return build_settings(target, settings, kind)
    preset = target if dataclasses.is_dataclass(target) else target()
    return update_settings(preset, settings, kind)


def require_kind(settings: Any, kind: type[Any], named: str) -> Any:
    """Settings that a name stood for, once they are known to be of the right kind.

    Args:
        settings: What was found.
        kind: The class that it must extend.
        named: What was looked for, in the words of an error: ``method``, ``backbone``.

    Raises:
        ConfigError: They are of another kind.
    """
    if isinstance(settings, kind):
        return settings
    own = type(settings)
    raise ConfigError(
        f"{named} '{own.__module__}.{own.__qualname__}' does not extend {kind.__module__}.{kind.__qualname__}."
    )


def find_named(name: str, registry: Mapping[str, Any], kind: str, *, allow_import: bool = True) -> Any:
    """Find what a registered name or a dotted path stands for, before it is given any settings.

    Args:
        name: A registered name, or a dotted path to a dataclass.
        registry: What each name stands for, see :func:`resolve`.
        kind: What is looked for, in the words of an error: ``method``, ``backbone``.
        allow_import: Whether a dotted path may be imported, see :func:`resolve`.

    Raises:
        ConfigError: The name is unknown (the nearest known one is offered), or cannot be imported.
    """
    if name in registry:
        target = registry[name]
        if isinstance(target, str):
            module, attribute = target.split(":")
            target = getattr(importlib.import_module(module), attribute)
        return target
    if allow_import and is_dotted_path(name):
        return imported(name, kind)
    raise ConfigError(f"There is no {kind} '{cut(name)}'.{nearest(name, registry)}")


def imported(path: str, kind: str) -> Any:
    """Import the dataclass, or the instance of one, that a dotted path names.

    Args:
        path: Dotted path, such as ``my_lab.foo.Foo``.
        kind: What is looked for, in the words of an error.

    Raises:
        ConfigError: The path cannot be imported, or leads to something else.
    """
    module, _, attribute = path.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # Somebody's own code may raise anything.
        said = f"{type(error).__name__}: {error}" if not isinstance(error, (ImportError, AttributeError)) else error
        beside = how_to_find(error.name) if isinstance(error, ModuleNotFoundError) else ""
        raise ConfigError(f"{kind} '{cut(path)}' cannot be imported: {said}.{beside}") from error
    # Only settings: calling any function that a path names would run code nobody meant.
    if not dataclasses.is_dataclass(target):
        raise ConfigError(f"{kind} '{path}' is no dataclass of settings; name one, such as my_lab.foo.Foo.")
    return target


#: What a value in a file of settings can be, and how many of them a file can have.
_PLAIN = {"map": yaml.MappingNode, "seq": yaml.SequenceNode} | dict.fromkeys(
    ("str", "int", "float", "bool", "null"), yaml.ScalarNode
)
_MOST_VALUES = 1_000_000


class _Loader(yaml.SafeLoader):
    """Safe YAML in the 1.2 sense: 1e-3 is a number, and 12:30, no and 2024-01-01 stay text."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (PyYAML's own attribute)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and self._num_values(node, {}) > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "values are repeated too often", node.start_mark)
        return node

    def _num_values(self, node: Any, known: dict[int, float]) -> float:
        """Number of values in a node, those behind an alias counted each time; without end where it holds itself."""
        if id(node) not in known:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            if not isinstance(node, _PLAIN.get(kind, ())):
                problem = f"the tag '{cut(kind, 40)}' is none that settings have there"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            known[id(node)] = math.inf
            held: Iterable[Any] = node.value if isinstance(node, yaml.SequenceNode) else ()
            if isinstance(node, yaml.MappingNode):
                held = itertools.chain.from_iterable(node.value)
            known[id(node)] = 1 + sum(self._num_values(part, known) for part in held)
        return known[id(node)]

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
        ConfigError: The file is missing, unreadable or no valid YAML, gives a key twice, or holds no mapping of names.
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
    """Read a piece of YAML into dicts, lists and scalars.

    Args:
        text: The YAML.
        where: Beginning of the sentence of an error, such as a path.

    Raises:
        ConfigError: The text is no valid YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply to be settings.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where} is no valid YAML: {problem}{place}.") from error
    except (ValueError, KeyError, OverflowError) as error:
        # PyYAML's own of what a tag calls a number or a truth value, and of numbers of thousands of digits.
        raise ConfigError(f"{where} is no valid YAML: {cut(first_line(error).partition(';')[0])}.") from error


def write_yaml(path: str | os.PathLike[str], mapping: Mapping[str, Any]) -> None:
    """Write settings as YAML, in their order; the file appears whole or not at all.

    Raises:
        DataError: The folder cannot be written to, or the disk is full.
    """
    text = yaml.dump(to_mapping(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    write_text(path, text)


def parse_duration(text: str) -> float:
    """Turn ``HH:MM`` or ``HH:MM:SS`` into seconds; hours may exceed 24.

    Raises:
        ConfigError: The text is of another form, or the duration is zero.
    """
    match = re.fullmatch(r"(\d{1,9}):([0-5]\d)(?::([0-5]\d))?", str(text).strip())
    if match is None:
        raise ConfigError(
            f"Duration {cut(repr(text))} is not of the form HH:MM or HH:MM:SS; write 01:30 for 90 minutes."
        )
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total_s = float(3600 * hours + 60 * minutes + seconds)
    if total_s == 0:
        raise ConfigError(f"Duration {text!r} is zero; give at least 00:00:01.")
    return total_s
