"""What the card of a cached case must be like, since somebody else may have written it.

A card is checked before memory is taken for anything that it says: everything behind it relies on types and bounds.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from textwrap import shorten
from typing import Any, get_args

from mim3d.caching.fingerprints import Fingerprint
from mim3d.caching.foreground import Statistics
from mim3d.caching.marks import Marks
from mim3d.caching.preprocessing import MAX_LEVELS
from mim3d.caching.stored_voxels import INTEGER_TYPES
from mim3d.core.errors import DataError
from mim3d.core.names import is_entry_name
from mim3d.core.types import LARGEST_LABEL
from mim3d.datasets.cases import SPLITS
from mim3d.scans.grids import MAX_SPACING_MM, MIN_SPACING_MM
from mim3d.scans.modality import Decider, Sign

#: Most voxels along an axis, and of a scan.
_LONGEST, _MOST_VOXELS = 65535, 2**36

_MOST_CHANNELS = 1024

#: Beyond it floating point numbers are no longer exact.
_LARGEST = 2.0**53

#: Largest cosine of the angle between two axes, and share by which a voxel's edge may differ from the affine's.
_LEAST_SQUARE, _ROUNDING = 0.05, 0.01

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TYPES = tuple(kind.__name__ for kind in INTEGER_TYPES)
_STATISTICS = frozenset(item.name for item in fields(Statistics) if item.default is MISSING)


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _wholes(values: Any, count: int, low: int, high: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(_whole(value, low, high) for value in values)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 <= value <= 1e300


def _numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(map(_number, values))


def _rows(values: Any, names: frozenset[str], count: int | None = None) -> bool:
    """Whether a value is a list of mappings that have a number under each of these names."""
    return (
        isinstance(values, list)
        and count in (None, len(values))
        and all(isinstance(row, dict) and all(_number(row.get(name)) for name in names) for row in values)
    )


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(map(_text, values))


def _shape(value: Any, card: Mapping[str, Any]) -> bool:
    return _wholes(value, 3, 1, _LONGEST) and math.prod(value) <= _MOST_VOXELS


def _affine(value: Any, card: Mapping[str, Any]) -> bool:
    """Whether axes are as long as the spacing says, and meet at right angles."""
    if not _numbers(value, 16) or not all(abs(number) <= _LARGEST for number in value) or value[12:] != [0, 0, 0, 1]:
        return False
    axes = [value[axis:12:4] for axis in range(3)]
    lengths = [math.hypot(*axis) for axis in axes]
    if not all(
        abs(length - edge) <= _ROUNDING * edge for length, edge in zip(lengths, card["spacing_mm"], strict=True)
    ):
        return False
    return all(
        abs(sum(a * b for a, b in zip(axes[i], axes[j], strict=True))) <= _LEAST_SQUARE * lengths[i] * lengths[j]
        for i, j in ((0, 1), (0, 2), (1, 2))
    )


def _stored(value: Any, card: Mapping[str, Any]) -> bool:
    """Whether stored numbers have a meaning in each channel, and the padding value has one."""
    return _rows(value, frozenset({"scale", "offset"}), card["num_channels"]) and all(
        meaning["scale"] > 0 and abs(stats["low"] - meaning["offset"]) <= meaning["scale"] * _LARGEST
        for meaning, stats in zip(value, card["statistics"], strict=True)
    )


def _windows(value: Any, card: Mapping[str, Any]) -> bool:
    names = frozenset({"low", "high"})
    return value is None or (
        _rows(value, names, card["num_channels"]) and all(window["low"] <= window["high"] for window in value)
    )


def _modalities(value: Any, card: Mapping[str, Any]) -> bool:
    return value is None or (
        isinstance(value, list)
        and len(value) == card["num_channels"]
        and all(isinstance(channel, dict) and isinstance(channel.get("in_hu"), bool) for channel in value)
        and all(channel.get("name") is None or _text(channel["name"]) for channel in value)
        and all(channel.get("by") in get_args(Decider) and channel.get("sign") in get_args(Sign) for channel in value)
    )


def _box(value: Any, card: Mapping[str, Any]) -> bool:
    return _wholes(value, 6, 0, _LONGEST) and all(
        value[axis] < value[axis + 3] <= card["shape"][axis] for axis in range(3)
    )


def _counts(value: Any, card: Mapping[str, Any]) -> bool:
    return (
        _rows(value, frozenset({"value", "count"}))
        and all(_whole(row["value"], 0, LARGEST_LABEL) for row in value)
        and all(_whole(row["count"], 1, math.prod(card["shape"])) for row in value)
        and len({row["value"] for row in value}) == len(value)
    )


def _digest(value: Any, card: Mapping[str, Any]) -> bool:
    return _text(value) and _DIGEST.fullmatch(value) is not None


def _fingerprint(value: Any, card: Mapping[str, Any]) -> bool:
    try:
        return value is None or bool(Fingerprint.from_text(value).cells.size)
    except DataError:
        return False


def _marks(value: Any, card: Mapping[str, Any]) -> bool:
    try:
        return value is None or isinstance(Marks.from_text(value), Marks)
    except DataError:
        return False


#: Entry -> whether a value can stand there, in view of the entries before it, and what does.
_Rules = Mapping[str, tuple[Callable[[Any, Mapping[str, Any]], bool], str]]

_CARD: _Rules = {
    "shape": (_shape, f"three whole numbers from 1 to {_LONGEST}, {_MOST_VOXELS:,} voxels at most"),
    "spacing_mm": (
        lambda value, card: _numbers(value, 3) and all(MIN_SPACING_MM <= edge <= MAX_SPACING_MM for edge in value),
        "three numbers of millimetres above 0",
    ),
    "source_spacing_mm": (
        lambda value, card: value is None or (_numbers(value, 3) and all(0 < edge <= _LARGEST for edge in value)),
        "null or three numbers of millimetres above 0",
    ),
    "assumed": (lambda value, card: value is None or _texts(value), "null or a list of text"),
    "scanner": (lambda value, card: value is None or (_text(value) and len(value) <= 200), "null or a short text"),
    "affine": (_affine, "16 numbers whose axes are as long as spacing_mm says and meet at right angles"),
    "num_channels": (lambda value, card: _whole(value, 1, _MOST_CHANNELS), f"from 1 to {_MOST_CHANNELS}"),
    "dtype": (lambda value, card: value in _TYPES, f"one of {', '.join(_TYPES)}"),
    "num_levels": (lambda value, card: _whole(value, 1, MAX_LEVELS), f"from 1 to {MAX_LEVELS}"),
    "has_label": (lambda value, card: isinstance(value, bool), "true or false"),
    "statistics": (
        lambda value, card: _rows(value, _STATISTICS, card["num_channels"]) and all(row["std"] >= 0 for row in value),
        "the statistics of each channel, all of them finite numbers",
    ),
    "stored_intensities": (_stored, "a scale above 0 and an offset for each channel"),
    "modalities": (_modalities, "null, or what each channel is, who says so and what its voxels show"),
    "level_windows": (_windows, "null, or two rising numbers for each channel"),
    "body_box": (_box, "a box of one voxel or more inside the scan"),
    "num_voxels": (_counts, f"label values from 0 to {LARGEST_LABEL}, each once and with its number of voxels"),
    "foreground": (lambda value, card: _text(value), "text"),
    "fingerprint": (_fingerprint, "what mim3d writes there"),
    "marks": (_marks, "null, or what mim3d writes there"),
    "digest": (_digest, "a SHA-256 of 64 digits"),
    "source_digest": (_digest, "a SHA-256 of 64 digits"),
    "source_bytes": (lambda value, card: _whole(value, 0, 2**62), "a number of bytes"),
}

#: Entries that older cards and rows lack, or that are not read with the others.
_OPTIONAL = (
    "modalities",
    "level_windows",
    "fingerprint",
    "marks",
    "labelled",
    "fold",
    "modality",
    "assumed",
    "scanner",
    "source_spacing_mm",
)


def _id(value: Any, row: Mapping[str, Any]) -> bool:
    return _text(value) and is_entry_name(value)


_ROW: _Rules = {
    "id": (_id, "a name that can be that of a file, and no path"),
    "patient": (lambda value, row: _text(value), "text"),
    "class_name": (lambda value, row: value is None or _text(value), "null or text"),
    "split": (lambda value, row: value in (None, *SPLITS), f"null, or one of {', '.join(SPLITS)}"),
    "labelled": (lambda value, row: value is None or _texts(value), "null or a list of text"),
    "images": (lambda value, row: bool(value) and _texts(value), "the path of each image"),
    "label": (lambda value, row: value is None or _text(value), "null or a path"),
    "fold": (lambda value, row: value is None or _whole(value, 0, 10_000), "null, or the number of a fold"),
    "modality": (lambda value, row: value is None or _text(value), "null or text"),
    **_CARD,
    "size_bytes": (lambda value, row: _whole(value, 0, 2**62), "a number of bytes"),
}


def check_card(card: Any) -> None:
    """Refuse the card of a case with a value that cannot be.

    Args:
        card: What a card's file holds.

    Raises:
        ValueError: The sentence names the entry, its value, and what must stand there.
    """
    _check(card, _CARD)


def check_row(row: Mapping[str, Any]) -> None:
    """Refuse the row of a manifest with a value that cannot be: a case, its card and the size of what is stored.

    Args:
        row: The row.

    Raises:
        ValueError: The sentence names the entry, its value, and what must stand there.
    """
    _check(row, _ROW)


def _check(content: Any, rules: _Rules) -> None:
    if not isinstance(content, dict):
        raise ValueError("it holds no mapping")
    for name, (fits, what) in rules.items():
        if name not in content and name not in _OPTIONAL:
            raise ValueError(f"{name} is missing")
        value = content.get(name)
        if not fits(value, content):
            raise ValueError(f"{name} is {shorten(repr(value), 80, placeholder=' ...')}, but it must be {what}")
