"""Commands as functions: their arguments are typed, and may be written once as the fields of a class of settings."""

import errno
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from mim3d.core.errors import ConfigError
from mim3d.core.names import cut
from mim3d.core.settings import coerce, nearest, overlay
from mim3d.core.warned import recording

P = ParamSpec("P")
Settings = TypeVar("Settings")
Result = TypeVar("Result")


def typed(function: Callable[P, Result]) -> Callable[P, Result]:
    """Let a function turn its arguments into what their annotations ask for, as the command line and YAML do.

    The function then raises ConfigError for a value of another type; the sentence names argument, value and type.

    Args:
        function: A function with annotations.
    """
    signature, hints = inspect.signature(function), typing.get_type_hints(function)

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() {error}") from None
        for name, value in given.arguments.items():
            given.arguments[name] = coerce(value, hints[name], name)
        try:
            return function(*given.args, **given.kwargs)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            named = cut(str(error.filename))
            raise ConfigError(f"{named} is longer than names of files and folders can be here; shorten it.") from None

    return called


def command(settings: Callable[P, Settings]) -> Callable[[Callable[[Settings], Result]], Callable[P, Result]]:
    """Let a function of settings be called with the fields of the settings as its arguments.

    The fields, their types, defaults and meanings are written once, in the class; classes may inherit those that they
    share. The command line, ``help()`` and type checkers see them as the parameters of the function.

    Where the class has a function ``below``, it is given what the user gave, and returns the settings that lie below.

    Args:
        settings: A frozen dataclass whose docstring has an ``Attributes`` section.
    """
    below: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = getattr(settings, "below", None)
    made: Callable[..., Settings] = settings

    def decorate(function: Callable[[Settings], Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def from_fields(*args: P.args, **kwargs: P.kwargs) -> Result:
            with recording():
                if below is None:
                    return function(settings(*args, **kwargs))
                given = inspect.signature(from_fields).bind(*args, **kwargs).arguments
                lowest = below(given)
                if unknown := [name for name in lowest if name not in hints]:
                    raise ConfigError(f"{unknown[0]} is no setting of {function.__name__}.{nearest(unknown[0], hints)}")
                under = {name: coerce(value, hints[name], name) for name, value in lowest.items()}
                merged = {**under, **{name: overlay(under.get(name), value) for name, value in given.items()}}
                return function(made(**merged))

        assert isinstance(settings, type)
        signature = inspect.signature(settings)
        # A class's own fields before those that it inherits, which Python's own order puts first.
        order = [name for owner in inspect.getmro(settings) for name in vars(owner).get("__annotations__", {})]
        parameters = sorted(signature.parameters.values(), key=lambda p: (p.kind, order.index(p.name)))
        names = [parameter.name for parameter in parameters]
        hints, meanings = typing.get_type_hints(settings), documented(settings, "Attributes")
        vars(from_fields).update(
            __signature__=signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty),
            below=below,
        )
        from_fields.__annotations__ = {name: hints[name] for name in names}
        described = [f"    {name}: {meanings[name]}" for name in names]
        from_fields.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Args:", *described])
        return typed(from_fields)

    return decorate


def documented(thing: Any, section: str) -> dict[str, str]:
    """Read the meaning of each name in a section of a Google-style docstring.

    Args:
        thing: A function or a class. The docstrings of the classes that it inherits from are read too.
        section: Title of the section, ``Args`` or ``Attributes``.
    """
    found: dict[str, str] = {}
    for owner in reversed(inspect.getmro(thing) if isinstance(thing, type) else [thing]):
        inside, name = False, ""
        for line in inspect.cleandoc(owner.__doc__ or "").splitlines():
            entry = re.match(r" {4}(\w+): (.*)", line)
            if line and not line.startswith(" "):
                inside = line == f"{section}:"
            elif inside and entry:
                name = entry[1]
                found[name] = entry[2]
            elif name and inside and line.strip():
                found[name] += f" {line.strip()}"
    return found
