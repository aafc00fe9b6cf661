"""Tensors by name out of weights files, our own and foreign ones; nothing in a file can run code."""

import warnings
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim3d.core.errors import CheckpointError
from mim3d.core.names import cut
from mim3d.core.warned import WeightsWarning
from mim3d.weights.folders import RUN_NETWORKS, weights_file
from mim3d.weights.pickles import PassedOver, PickledArray, load_torch_file, tensors_of_module
from mim3d.weights.plain import MOST_TIMES, SMALL, is_torch_index, read_plain, shards_of

#: Keys under which files hold their weights, the one to prefer first: an average of weights only where nothing else is.
WRAPPERS = (
    *(
        "model",
        "state_dict",
        "network_weights",
        "net",
        "network",
        "model_state_dict",
        "model_state",
        "state",
        "weights",
    ),
    *("params", "parameters", "module", "encoder", "backbone", "teacher", "student"),
    *("model_ema", "ema", "ema_model", "ema_state_dict", "state_dict_ema", "shadow"),
)

#: Beginnings of keys under which the tensors are those of an optimiser and the like, never of a network.
_NO_WEIGHTS = ("optim", "lr_sched", "sched", "scaler", "grad_scaler", "amp", "loss", "criterion", "rng", "callbacks")

#: Prefixes that wrappers of training frameworks leave on every key.
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "network.", "net.")

#: Parts that compilation, recomputation and sharding leave inside of names.
_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

#: Types of numbers that weights are saved as.
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: Mappings inside one another that are looked into.
_DEEPEST = 8

#: Lists of more are series of numbers.
_LONGEST_LIST = 1000

#: Values beside weights that are looked at.
_MOST_PARTS = 200_000


@dataclass(frozen=True)
class HeldWeights:
    """What a weights file holds of a network.

    Attributes:
        tensors: Tensors by name, unwrapped and without prefixes that all names share.
        place: Keys of the file that lead to them.
        prefix: What all their names began with.
        beside: What lies at the top of the file by key, the weights among it. Objects are stand-ins.
        file: The file, for messages.
    """

    tensors: dict[str, Tensor]
    place: tuple[str, ...] = ()
    prefix: str = ""
    beside: Mapping[Any, Any] = field(default_factory=dict)
    file: str = "the file"

    @property
    def paths(self) -> list[str]:
        """Every tensor as the file has it: the keys that lead there, a colon, and its name with all prefixes."""
        return [f"{'.'.join(self.place)}:{self.prefix}{name}" for name in self.tensors]


def read_state(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> dict[str, Tensor]:
    """All tensors of a weights file by name, as :func:`read_weights` finds them."""
    return read_weights(path, networks).tensors


def read_weights(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> HeldWeights:
    """The tensors of a weights file, and where in it they lie; never runs code from the file.

    Objects beside the weights are passed over, whatever they are. A network that was pickled as a whole is read by its
    parameters and buffers.

    Args:
        path: A run folder, an export folder, a weights file (safetensors, torch or ``.npz``), the index of several
            safetensors files or its folder, or the id of a repository.
        networks: Folders of a run to look for, the preferred first.

    Raises:
        CheckpointError: The file is damaged, or holds no tensors by name, or several sets with none that is preferred.
    """
    file = weights_file(path, networks)
    if is_torch_index(file):
        return _held(_read_torch_shards(file), (), {}, file)
    plain = read_plain(file)
    if plain:
        return _held(plain, (), {}, file)
    if plain is not None:
        place, state = _unwrapped(plain, file)
        return _held(state, place, {}, file)
    return _held(*_read_torch(file), file)


def _read_torch_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of several files that torch.save wrote, by their index."""
    state: dict[str, Tensor] = {}
    for shard, names in shards_of(index).items():
        held, _, _ = _read_torch(shard)
        if missing := [name for name in names if name not in held]:
            raise CheckpointError(f"{shard} holds no {cut(missing[0])}, as {index.name} says; copy the folder again.")
        state |= {name: held[name] for name in names}
    return state


def _read_torch(file: Path) -> tuple[dict[str, Tensor], tuple[str, ...], Mapping[Any, Any]]:
    """The network's tensors in a file of torch.save, the keys that lead to them, and what lies beside them."""
    content, programs = load_torch_file(file)
    if programs:
        warnings.warn(
            f"{file} names {', '.join(programs[:3])}, which can run programs and has no place among weights; mim3d did "
            "not run it, but other software may.",
            stacklevel=3,
        )
    place, state = _unwrapped(content, file)
    # Views that repeat a few values, or have none, are few bytes in a file and a network that fills a machine.
    size = sum(value.numel() * value.element_size() for value in state.values())
    if size > MOST_TIMES * file.stat().st_size + SMALL:
        raise CheckpointError(
            f"{file} holds tensors of {size:,} bytes in {file.stat().st_size:,}: they repeat values or have none, as "
            "those of no trained network do; it is not read."
        )
    return state, place, _inner(content)


def _held(state: Mapping[str, Tensor], place: tuple[str, ...], beside: Mapping[Any, Any], file: Path) -> HeldWeights:
    """Tensors without what wrappers leave inside of names, and without prefixes that all names share."""
    names = {key: ".".join(part for part in key.split(".") if part not in _INSIDE) for key in state}
    shared = ""
    while prefix := next((one for one in PREFIXES if all(name.startswith(one) for name in names.values())), None):
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
        shared += prefix
    return HeldWeights({names[key]: value for key, value in state.items()}, place, shared, beside, str(file))


def _unwrapped(content: Any, file: Path) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The set of tensors that is the network's, of all that a file holds, and the keys that lead to it."""
    found = list(_sets_of_tensors(content, file))
    # Every network has a tensor of more than one axis. Beside one, arrays of numpy are losses and the like.
    if not any(value.ndim > 1 for _, state in found for value in state.values()):
        found = list(_sets_of_tensors(content, file, of_arrays=True)) or found
    if not found:
        items = list(_inner(content).items())[:4] if isinstance(content, dict) else []
        kind = _kind(content) if isinstance(content, PassedOver) else f"a {_kind(content)}"
        held = ", ".join(f"{cut(str(key), 40)} ({_kind(value)})" for key, value in items) or kind
        raise CheckpointError(
            f"{file} holds no tensors by name, but {held}; save the state_dict of the network, as "
            "tensors, with torch.save or safetensors."
        )
    known = [(place, state) for place, state in found if place and place[-1] in WRAPPERS]
    # Beside the network may lie a temperature or another small thing under a usual name.
    most = max((len(state) for _, state in known), default=0)
    known = [(place, state) for place, state in known if len(state) * 4 > most]
    if known:
        return min(known, key=lambda one: (WRAPPERS.index(one[0][-1]), len(one[0])))
    # Single tensors at the top may be a loss beside the weights.
    largest = max(found, key=lambda one: len(one[1]))
    rivals = [place for place, state in found if len(state) * 2 > len(largest[1])]
    if len(rivals) > 1:
        named = ", ".join(cut(".".join(place), 60) or "the top" for place in rivals[:5])
        raise CheckpointError(
            f"{file} holds several sets of tensors ({named}), and none by a usual name such as {WRAPPERS[1]}; save the "
            "one that you mean alone."
        )
    return largest


def _kind(value: Any) -> str:
    """What a value is, for people."""
    if isinstance(value, PickledArray):
        return "numpy array" if value.tensor is not None else "numpy array of no plain numbers"
    if isinstance(value, dict) and value:
        return f"dict with {_kind(next(iter(_inner(value).values())))}"
    return "an object" if isinstance(value, PassedOver) else type(value).__name__


def _inner(value: Any) -> Mapping[Any, Any]:
    """What a mapping, a list or an object of somebody's own class holds, by key, number or name."""
    if isinstance(value, PassedOver):
        return {**value.state, **value.items}
    if isinstance(value, dict):
        # The file may have set an attribute of this name.
        return dict(dict.items(value))
    is_list = isinstance(value, (list, tuple)) and len(value) <= _LONGEST_LIST
    return {str(number): one for number, one in enumerate(value)} if is_list else {}


def _sets_of_tensors(
    content: Any, file: Path, *, of_arrays: bool = False
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every mapping that holds tensors (or numpy arrays) by name, with the keys that lead to it; upper ones first."""
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    num_seen = 0
    while waiting:
        place, value = waiting.popleft()
        inner = _inner(value)
        num_seen += len(inner)
        # Mappings that hold each other many times are few bytes in a file.
        if num_seen > _MOST_PARTS:
            raise CheckpointError(f"{file} holds more than {_MOST_PARTS:,} values beside weights; save those alone.")
        if isinstance(value, PassedOver) and (state := tensors_of_module(value)):
            yield place, state
            continue
        named = {key: one for key, one in inner.items() if isinstance(key, str)}
        values = {key: one.tensor if isinstance(one, PickledArray) and of_arrays else one for key, one in named.items()}
        state = {key: one.detach() for key, one in values.items() if isinstance(one, Tensor)}
        if state and not isinstance(value, (list, tuple)):
            yield place, state
        if len(place) <= _DEEPEST:
            waiting += [((*place, key), one) for key, one in named.items() if not key.lower().startswith(_NO_WEIGHTS)]


def without_prefix_of(state: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """Tensors without the prefix under which most of the known names are found; others keep their names.

    Where several are as good, a warning says which was taken: the teacher of a student, the encoder of queries of one
    of keys, else the shortest.
    """
    counts: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in known:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    if not counts:
        return dict(state)
    prefix = min(counts, key=lambda one: (-counts[one], "teacher" not in one, "_k." in one, len(one), one))
    rivals = [cut(one, 60) for one in counts if counts[one] == counts[prefix] and one != prefix]
    if rivals and counts[prefix] * 2 > len(known):
        warnings.warn(
            f"The file holds several networks; the one named {cut(prefix or 'without a prefix', 60)} was taken, not "
            f"{', '.join(rivals[:3])}.",
            category=WeightsWarning,
            stacklevel=3,
        )
    named = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return named | {key: value for key, value in state.items() if not key.startswith(prefix) and key not in named}


def oddity(value: Tensor, target: Tensor) -> str:
    """Why the values of a tensor cannot be taken as they are, in words; empty for plain numbers as the target's."""
    if said := no_array(value):
        return said
    plain = value.dtype in _PLAIN if target.is_floating_point() else not value.dtype.is_floating_point
    return "" if plain else f"values of type {str(value.dtype).removeprefix('torch.')}"


def no_array(value: Tensor) -> str:
    """Why a tensor is no array of numbers, in words; empty where it is one."""
    if value.is_meta:
        return "no values but shapes alone"
    if value.is_quantized:
        return "quantised values"
    return "sparse values" if value.layout != torch.strided or value.is_nested else ""


def unlearned(state: Mapping[str, Tensor]) -> str:
    """What of tensors no training gives, as the end of a sentence; empty where nothing is the matter."""
    plain = {name: value for name, value in state.items() if not no_array(value) and value.dtype in _PLAIN}
    broken = [name for name, value in plain.items() if not torch.isfinite(value).all()]
    if broken:
        return (
            f"values that are not finite, in {len(broken)} of {len(state)} tensors (first: {cut(broken[0])}); the "
            "training that wrote it had failed by then, so take an earlier checkpoint"
        )
    matrices = {name: value for name, value in plain.items() if value.ndim > 1 and value.numel() > 1}
    same = [name for name, value in matrices.items() if value.min() == value.max()]
    if sum(matrices[name].numel() for name in same) * 10 <= sum(value.numel() for value in matrices.values()):
        return ""
    return (
        f"one and the same value throughout each of {len(same)} of {len(matrices)} kernels and matrices (first: "
        f"{cut(same[0])}); it was not wholly copied, or nothing was learned, so copy it again"
    )
