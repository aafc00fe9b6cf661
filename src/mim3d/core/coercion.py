"""Turn loose values (YAML, command line) into what a type annotation asks for, or say what is wrong."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from mim3d.core.errors import ConfigError

_T = TypeVar("_T")

_TRUE = {"true", "yes", "on"}
_FALSE = {"false", "no", "off"}
_NONE = {"null", "none", "~", ""}


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an error sentence about an unknown name.

    Returns:
        `` Did you mean 'hybrid_base'?`` when something known is close, else `` Known: a, b, c.``
        (empty when nothing is known).
    """
    names = sorted(known)
    by_lower = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{by_lower[close[0]]}'?"
    return f" Known: {', '.join(names)}." if names else ""


def build_settings(cls: type[_T], values: Mapping[str, Any], where: str) -> _T:
    """Build a settings dataclass from a mapping, strictly.

    Args:
        cls: a dataclass type; nested dataclasses, tuples, Optional and Literal fields are followed.
        values: field name -> value, as YAML or the command line gives it (``"1e-3"`` becomes a float).
        where: what the sentence of an error starts with, such as ``method``.

    Raises:
        ConfigError: an unknown or missing key, or a value of another type; names key, value and remedy.
    """
    return _construct(cls, coerce_fields(cls, values, where), where)


def update_settings(settings: _T, values: Mapping[str, Any], where: str) -> _T:
    """The same settings with ``values`` on top; a nested mapping changes only the keys it names."""
    merged: dict[str, Any] = {}
    for key, value in values.items():
        current = getattr(settings, key, None)
        if isinstance(value, Mapping) and _is_settings(current):
            value = update_settings(current, value, f"{where}.{key}")
        merged[key] = value
    cls = type(settings)
    kept = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.init}  # type: ignore[arg-type]
    return _construct(cls, {**kept, **coerce_fields(cls, merged, where)}, where)


def coerce_fields(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the keys of ``values`` against the fields of ``cls``; coerce each value to its field's type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {values!r}, but it takes a mapping of settings.")
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} has no setting '{key}'.{nearest(str(key), known)}")
    return {key: coerce(value, hints[key], f"{where}.{key}") for key, value in values.items()}


def _construct(cls: type[_T], fields: Mapping[str, Any], where: str) -> _T:
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in fields:
            raise ConfigError(f"{where}.{field.name} is required; give it a value.")
    try:
        return cls(**fields)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def coerce(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotation ``hint`` asks for.

    Raises:
        ConfigError: it cannot be; the sentence gives ``where``, the value and what was expected.
    """
    origin = get_origin(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if origin is typing.Annotated:
        return coerce(value, get_args(hint)[0], where)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, hint, where)
    if origin is Literal:
        return _coerce_literal(value, hint, where)
    if origin is tuple or hint is tuple:
        return _coerce_tuple(value, hint, where)
    if _is_sequence(origin or hint):
        item_hint = (get_args(hint) or (Any,))[0]
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise _wrong(value, hint, where)
        return [coerce(item, item_hint, f"{where}[{index}]") for index, item in enumerate(items)]
    if isinstance(origin or hint, type) and issubclass(origin or hint, Mapping):
        return _coerce_mapping(value, hint, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build_settings(hint, value, where)
    return _coerce_scalar(value, hint, where)


def _coerce_scalar(value: Any, hint: Any, where: str) -> Any:
    text = value.strip() if isinstance(value, str) else None
    if hint is bool:
        if isinstance(value, bool):
            return value
        if text is not None and text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
    elif hint in (int, float):
        number = _number(value)
        if number is not None and hint is float:
            return float(number)
        if number is not None and float(number).is_integer():
            return int(number)
    elif hint in (None, type(None)):
        if value is None or (text is not None and text.lower() in _NONE):
            return None
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif not isinstance(hint, type) or isinstance(value, hint):
        return value
    raise _wrong(value, hint, where)


def _number(value: Any) -> int | float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, str):
        return None
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return None


def _coerce_union(value: Any, hint: Any, where: str) -> Any:
    members = get_args(hint)
    for member in members:
        if isinstance(member, type) and type(value) is member:
            return value
    # "null" typed by a user means none even where text is allowed too; a number comes before text.
    last = [member for member in members if member is str]
    first = [member for member in members if member is type(None)]
    others = [member for member in members if member not in (str, type(None))]
    problems = []
    for member in first + others + last:
        try:
            return coerce(value, member, where)
        except ConfigError as error:
            problems.append((member, error))
    followed = [e for m, e in problems if isinstance(value, (Mapping, list, tuple)) and _takes(m, value)]
    raise followed[0] if len(followed) == 1 else _wrong(value, hint, where)


def _takes(member: Any, value: Any) -> bool:
    """Whether a value of this shape means this member of a union: then its own error is the clearest."""
    kind = get_origin(member) or member
    if isinstance(value, Mapping):
        return dataclasses.is_dataclass(kind) or (isinstance(kind, type) and issubclass(kind, Mapping))
    return kind is tuple or _is_sequence(kind)


def _coerce_literal(value: Any, hint: Any, where: str) -> Any:
    choices = get_args(hint)
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
    for choice in choices:
        if isinstance(value, str) and str(choice) == value:
            return choice
    raise ConfigError(f"{where} is {value!r}.{nearest(str(value), map(str, choices))}")


def _coerce_tuple(value: Any, hint: Any, where: str) -> tuple[Any, ...]:
    arguments = get_args(hint) or (Any, ...)
    open_ended = len(arguments) == 2 and arguments[1] is Ellipsis
    if open_ended and isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise _wrong(value, hint, where)
    if not open_ended and len(value) != len(arguments):
        raise ConfigError(f"{where} has {len(value)} values ({value!r}), but it takes {len(arguments)}.")
    hints = [arguments[0]] * len(value) if open_ended else arguments
    return tuple(coerce(item, h, f"{where}[{i}]") for i, (item, h) in enumerate(zip(value, hints, strict=True)))


def _coerce_mapping(value: Any, hint: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(value, hint, where)
    key_hint, value_hint = get_args(hint) or (Any, Any)
    return {coerce(k, key_hint, where): coerce(v, value_hint, f"{where}.{k}") for k, v in value.items()}


def _wrong(value: Any, hint: Any, where: str) -> ConfigError:
    return ConfigError(f"{where} is {value!r}, but it takes {describe(hint)}.")


def describe(hint: Any) -> str:
    """A type annotation in a user's words: ``tuple[int, int]`` is ``2 values, each a whole number``."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    if hint in (None, type(None)):
        return "null"
    if isinstance(hint, type) and hint in plain:
        return plain[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        words = [describe(argument) for argument in arguments]
        return (", or " if any("each" in word for word in words) else " or ").join(words)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"{len(arguments)} values, each {describe(arguments[0])}"
    if _is_sequence(origin or hint) or (origin or hint) is tuple:
        return f"a list, each {describe(arguments[0])}" if arguments else "a list"
    return "a mapping of settings"


def _is_sequence(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Sequence) and kind not in (str, bytes, tuple)


def _is_settings(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
