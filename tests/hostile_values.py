"""Values that somebody may write into a file instead of those that belong there, and how they are tried."""

import copy
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mim3d.core.errors import Mim3dError


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


#: Wrong types, and numbers that no setting can be.
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    3,
    0.5,
    -2.5,
    10**6,
    10**9,
    10**12,
    10**400,
    1e300,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "text",
    "../../outside",
    "/etc/passwd",
    "1e12",
    "nan",
    "\x1b[31m\x00",
    [],
    [1],
    [-1, -1, -1],
    [0, 0, 0],
    [10**9, 10**9, 10**9],
    [1e-9, 1e-9, 1e-9],
    [float("nan")] * 3,
    ["a", "b", "c"],
    [[1], [2], [3]],
    list(range(70)),
    {},
    {"name": 3},
    {"name": "os.system"},
    {"a": {"b": {"c": 1}}},
    nested(30),
    nested(500),
)


def values_at(number: int, every: int = 1) -> tuple[Any, ...]:
    """Every so many of the values, others at each place, so that a few places see all of them."""
    return VALUES[number % every :: every]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value inside mappings and lists, these included."""
    if path:
        yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def with_value(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place."""
    content = copy.deepcopy(content)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return content


def without(content: Any, path: tuple[Any, ...]) -> Any:
    """A copy that lacks a value."""
    content = copy.deepcopy(content)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return content


@contextmanager
def bounded(seconds: int = 5, extra_bytes: int = 2**30) -> Iterator[None]:
    """Let what runs longer, or takes more memory, fail."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (held + extra_bytes, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, handler)


def outcome(act: Callable[[], object], *, names: str) -> str | None:
    """What is wrong with how an act took a hostile value; None where it was refused in a sentence, or could be used.

    Args:
        act: What reads the value.
        names: Text that every refusal must hold, such as the name of the file.
    """
    try:
        with bounded():
            act()
    except Mim3dError as error:
        said = str(error)
        if names not in said:
            return f"does not name {names}: {said}"
        if len(said) > 1000:
            return f"{len(said)} letters: {said[:200]}"
        if "\x1b" in said or "\n" in said:
            return f"control characters: {said!r}"
        return None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None
