"""Commands whose parameters are the fields of a class of settings, and the meanings that docstrings give them."""

import functools
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
Settings = TypeVar("Settings")
Result = TypeVar("Result")


def command(settings: Callable[P, Settings]) -> Callable[[Callable[[Settings], Result]], Callable[P, Result]]:
    """Let a function of settings be called with the fields of the settings as its arguments.

    The fields, their types, defaults and meanings are written once, in the class; classes may inherit those that they
    share. The command line, ``help()`` and type checkers see them as the parameters of the function.

    Args:
        settings: A frozen dataclass whose docstring has an ``Attributes`` section.
    """

    def decorate(function: Callable[[Settings], Result]) -> Callable[P, Result]:
        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> Result:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                # In the name of the function that was called, not of its class of settings.
                raise TypeError(f"{function.__name__}() {error}") from None
            return function(settings(*args, **kwargs))

        assert isinstance(settings, type)
        signature = inspect.signature(settings)
        # A class's own fields before those that it inherits, which Python's own order puts first.
        order = [name for owner in inspect.getmro(settings) for name in vars(owner).get("__annotations__", {})]
        parameters = sorted(signature.parameters.values(), key=lambda parameter: order.index(parameter.name))
        parameters.sort(key=lambda parameter: parameter.kind)
        meanings = documented(settings, "Attributes")
        described = [f"    {name}: {meanings[name]}" for name in (parameter.name for parameter in parameters)]
        hints = typing.get_type_hints(settings)
        vars(called).update(
            __signature__=signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
        )
        called.__annotations__ = {parameter.name: hints[parameter.name] for parameter in parameters}
        called.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Args:", *described])
        return called

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
