"""The card beside our own weights, which somebody else may have written: typed and bounded before anything uses it.

What a card says of its backbone and task is checked by their own settings, see :func:`card_settings`, and held against
the tensors of the file, see :func:`require_described`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.core.files import load_json
from mim3d.core.settings import LARGEST_NUMBER, build_settings, coerce, to_mapping
from mim3d.core.types import LARGEST_LABEL, Triple
from mim3d.scans.grids import LARGEST_VOXEL_MM
from mim3d.scans.intensity import Intensity
from mim3d.weights.folders import CARD_ENTRY, CARD_FORMAT, CARD_NAME, RUN_NETWORKS, WEIGHTS_NAME, weights_file
from mim3d.weights.plain import INDEX_NAME, parts_of

#: A card holds some kilobytes. Each score of each label is a line.
_LARGEST_BYTES = 16 * 2**20

#: Mappings and lists inside one another.
_DEEPEST = 16

#: How many times the values of its file a network may have: what is missing of it starts anew.
_MOST_TIMES = 1.25


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_named(value: Any) -> bool:
    return _is_text(value.get("name") if isinstance(value, dict) else value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_NUMBER


def _is_size(value: Any) -> bool:
    edges = value if isinstance(value, list) and len(value) == 3 else [value]
    return all(_is_whole(edge) and 1 <= edge <= 2**16 for edge in edges)


def _is_spacing(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(_is_number(edge) and 0 < edge <= LARGEST_VOXEL_MM for edge in value)
    )


def _is_scores(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(score) for score in value.values())


def _is_label(value: str) -> bool:
    return value.isascii() and value.isdigit() and str(int(value[:9])) == value and int(value) <= LARGEST_LABEL


def _is_labels(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_label(number) and _is_text(name) for number, name in value.items())


#: Entry -> whether a value can stand there, and what does. Entries of later versions are passed over.
_ENTRIES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "backbone": (_is_named, "a name, or a mapping with a name and settings"),
    "input_multiple": (_is_size, "three whole numbers of voxels"),
    "patch_size": (_is_size, "three whole numbers of voxels"),
    "input_size": (_is_size, "three whole numbers of voxels"),
    "orientation": (_is_text, "text"),
    "spacing_mm": (_is_spacing, f"null, or three numbers of millimetres above 0 and at most {LARGEST_VOXEL_MM:g}"),
    "intensity": (lambda value: value is None or isinstance(value, dict), "a mapping of settings"),
    "data_digest": (lambda value: value is None or isinstance(value, str), "text"),
    "mim3d_version": (_is_text, "text"),
    "task": (_is_named, "a name, or a mapping with a name and settings"),
    "labels": (_is_labels, f"a mapping of label values, whole numbers from 0 to {LARGEST_LABEL}, to names"),
    "step": (_is_whole, "a whole number of steps"),
    "scores": (_is_scores, "a mapping of names to numbers"),
    "probe": (_is_scores, "a mapping of names to numbers"),
    "learnt": (lambda value: isinstance(value, list), "a list of stages"),
    "evaluation": (lambda value: isinstance(value, dict), "a mapping of scores"),
    "warnings": (lambda value: isinstance(value, list), "a list of warnings"),
}

#: Entries whose numbers decide nothing, and may be NaN where a score is not defined.
_SHOWN = ("scores", "probe", "learnt", "evaluation")


def card_path(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> Path:
    """The file that holds the card of our own weights: the one beside them, or they themselves."""
    weights = weights_file(path, networks)
    beside = weights.with_name(CARD_NAME)
    return beside if beside.is_file() and weights.name in (WEIGHTS_NAME, INDEX_NAME) else weights


def read_card(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> dict[str, Any]:
    """The card of our own weights, beside them or within a file that was copied alone; empty for a foreign file.

    Args:
        path: A run folder, an export folder, a file, or the id of a repository.
        networks: Folders of a run to look for, the preferred first.

    Raises:
        CheckpointError: It cannot be read, is of a newer format, or holds a value that cannot be, which is named.
    """
    file = card_path(path, networks)
    try:
        if file.name == CARD_NAME:
            _require_small(file.stat().st_size)
            card = load_json(file)
        else:
            text = _card_within(file)
            if text is None:
                return {}
            _require_small(len(text))
            card = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{file} holds a card that is nested too deeply; export the weights again.") from None
    except (OSError, ValueError) as error:
        # Of a number that is too long Python says how to allow it.
        said = str(error).partition(";")[0]
        raise CheckpointError(f"{file} holds no readable card ({said}); export the weights again.") from None
    if not isinstance(card, dict) or type(card.get("format")) is not int or card["format"] != CARD_FORMAT:
        raise CheckpointError(f"{file} holds no card of format {CARD_FORMAT}; export again or update mim3d.")
    if "backbone" not in card:
        raise CheckpointError(f"{file} names no backbone; export the weights again.")
    for name, value in card.items():
        for place, part in _parts(value, name, file):
            if name not in _ENTRIES or not _is_number(part) or abs(part) <= LARGEST_NUMBER:
                continue
            if isinstance(part, int) or name not in _SHOWN:
                raise _refused(file, place, part, "a number that a setting can have")
        if name in _ENTRIES and not _ENTRIES[name][0](value):
            raise _refused(file, name, value, _ENTRIES[name][1])
    for name in ("backbone", "task"):
        if _is_text(card.get(name)):
            card[name] = {"name": card[name]}
    if card.get("intensity") is not None:
        with card_settings(file):
            card["intensity"] = to_mapping(build_settings(Intensity, card["intensity"], "intensity"))
    return card


def has_card(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> bool:
    """Whether weights are our own: a card lies beside them or within their file, readable or not."""
    file = card_path(path, networks)
    return file.name == CARD_NAME or _card_within(file) is not None


def _require_small(num_bytes: int) -> None:
    if num_bytes > _LARGEST_BYTES:
        raise ValueError(f"{num_bytes:,} bytes, more than any card has")


def _card_within(file: Path) -> str | None:
    """The card that a safetensors file holds in its metadata; None for a file that is foreign, or is read later."""
    if file.suffix != ".safetensors":
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            return (tensors.metadata() or {}).get(CARD_ENTRY)
    except (SafetensorError, OSError):
        return None


def _parts(value: Any, place: str, file: Path, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every number, text and the like inside a value, with its place in words."""
    if depth > _DEEPEST:
        raise CheckpointError(f"{file}: {shorten(place, 60)} is nested too deeply to be a setting; export again.")
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _parts(part, f"{place}.{key}", file, depth + 1)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _parts(part, f"{place}[{number}]", file, depth + 1)
    else:
        yield place, value


def _refused(file: Path, place: str, value: Any, what: str) -> CheckpointError:
    shown = shorten(repr(value), 80, placeholder=" ...")
    return CheckpointError(f"{file}: {place} is {shown}, but it must be {what}; export the weights again.")


@contextmanager
def card_settings(path: str | Path) -> Iterator[None]:
    """Turn what is wrong with settings that a card holds into a sentence about the card.

    Args:
        path: A run folder, an export folder or a file in one.

    Raises:
        CheckpointError: In place of what settings raise. It names the card, the setting and its value.
    """
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{card_path(path)}: {shorten(str(error), 400, placeholder=' ...')}") from error
    except (KeyError, AttributeError, TypeError, ValueError, ArithmeticError) as error:
        said = shorten(repr(error), 200, placeholder=" ...")
        raise CheckpointError(
            f"{card_path(path)} is incomplete or damaged ({said}); export the weights again."
        ) from error


def seen_size(card: Mapping[str, Any]) -> Triple | None:
    """Voxels of what an encoder saw at a time, in pre-training or for its task; None where its card does not say.

    Raises:
        ConfigError: What the card says is no size; see :func:`card_settings`.
    """
    task = card.get("task") or {}
    found = card.get("input_size") or task.get("patch_size") or task.get("size")
    size: Triple | None = coerce([found] * 3 if isinstance(found, int) else found, Triple | None, "input_size")
    return size


def require_described(build: Callable[[], nn.Module], path: str | Path) -> None:
    """Refuse a card that describes a far larger network than its file holds, before memory is taken for that.

    Args:
        build: Builds the network that the card describes. It is called with tensors that hold no values.
        path: A run folder, an export folder or a file.

    Raises:
        CheckpointError: The sentence names both numbers of values. The file may be unreadable, too.
    """
    file = weights_file(path)
    try:
        held = 0
        for part in parts_of(file):
            with safe_open(part, framework="pt") as tensors:
                held += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no readable safetensors file ({error}); copy or export it again.") from None
    try:
        with torch.device("meta"):
            described = sum(value.numel() for value in build().state_dict().values())
    except RuntimeError as error:
        raise CheckpointError(f"{card_path(path)} describes a network that no machine can hold ({error}).") from error
    if described > held * _MOST_TIMES:
        raise CheckpointError(
            f"{card_path(path)} describes a network of {described:,} values, but {file.name} holds "
            f"{held:,}; they do not belong together, so copy or export them again."
        )
