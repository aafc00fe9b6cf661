"""Weights files that hold no pickles: safetensors, in one file or in several with an index, and arrays of numpy."""

import tarfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mim3d.core.errors import CheckpointError, listed
from mim3d.core.files import load_json
from mim3d.core.names import cut

#: The index of a network in several files, as Hugging Face writes it beside them.
INDEX_NAME = "model.safetensors.index.json"

#: The same of files that torch.save wrote.
TORCH_INDEX_NAME = "pytorch_model.bin.index.json"

#: An index has a line for each tensor.
_LARGEST_INDEX = 64 * 2**20

#: What other files begin with that lie in the place of weights, in lower case.
_KINDS = {
    b"version https://git-lfs": "it is a pointer of Git LFS; fetch the file itself with git lfs pull",
    b"<!doctype": "it is a web page; download the file itself",
    b"<html": "it is a web page; download the file itself",
}

#: Weights hardly shrink by compression: what is more than this many times its file, and bytes, is no weights.
MOST_TIMES, SMALL = 20, 2**28


def is_index(file: Path) -> bool:
    """Whether a file is, by its name, the index of a network in several files."""
    return file.name.endswith((".safetensors.index.json", ".bin.index.json"))


def is_torch_index(file: Path) -> bool:
    """Whether it is one of files that torch.save wrote, which are pickles."""
    return file.name.endswith(".bin.index.json")


def read_plain(file: Path) -> dict[str, Tensor] | None:
    """The tensors by name of a file without pickles; None for a file of another kind, by its ending.

    Args:
        file: A safetensors file, the index of several, or an ``.npz`` file.

    Raises:
        CheckpointError: It is damaged, or an index names files that are not there or not in its folder.
    """
    if file.suffix == ".npz":
        return _read_arrays(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return _read_shards(file) if is_index(file) and not is_torch_index(file) else None
    except (SafetensorError, OSError) as error:
        said = kind_of_file(file) if file.is_file() else ""
        raise CheckpointError(
            f"{file} is no readable safetensors file ({said or error}); copy or export it again."
        ) from None


def kind_of_file(file: Path) -> str:
    """What a file is that lies in the place of weights and is none of its ending, by its first bytes; else empty."""
    with open(file, "rb") as stream:
        first = stream.read(200)
    if not first:
        return "it is empty"
    if not first.strip(b"\0"):
        return "it begins with zeros alone, as a download that was cut off"
    if found := next((said for start, said in _KINDS.items() if first.lstrip().lower().startswith(start)), ""):
        return found
    if first.startswith(b"PK"):
        return (
            "its end is missing" if file.suffix != ".safetensors" else "it is an archive; torch's have the ending .pt"
        )
    if file.suffix != ".safetensors" and first[8:9] == b"{":
        return "it is a safetensors file; give it the ending .safetensors"
    return "it is a TAR archive; unpack it first" if tarfile.is_tarfile(file) else ""


def shards_of(index: Path) -> dict[Path, list[str]]:
    """The files that an index names, sorted, with the names of the tensors that are read from each.

    Raises:
        CheckpointError: It is no such index, or names files that are not there or not in its folder.
    """
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise ValueError(f"larger than {_LARGEST_INDEX:,} bytes")
        content = load_json(index)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index} is no readable index of weights ({error}); copy it again.") from None
    places: Any = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map of tensors to names of files; copy it again.")
    shards: dict[Path, list[str]] = defaultdict(list)
    ending = "bin" if is_torch_index(index) else "safetensors"
    for tensor, name in places.items():
        # Links in the folder are the user's; a name in the index is somebody else's.
        if Path(name).name != name or "\\" in name or not name.endswith(f".{ending}"):
            raise CheckpointError(
                f"{index} places {cut(tensor)} in {cut(repr(name))}, which is no {ending} file beside it; such an "
                "index is not read."
            )
        shards[index.parent / name].append(tensor)
    if missing := sorted(shard.name for shard in shards if not shard.is_file()):
        raise CheckpointError(
            f"{index} names {len(shards)} files, of which {len(missing)} are not beside it: "
            f"{listed([cut(name) for name in missing], 3)}; copy them there."
        )
    return dict(sorted(shards.items()))


def parts_of(file: Path) -> list[Path]:
    """The files that hold the tensors of a weights file: those of an index, or itself.

    Raises:
        CheckpointError: An index names files that are not there or not in its folder.
    """
    return list(shards_of(file)) if is_index(file) else [file]


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of several safetensors files, by their index."""
    state: dict[str, Tensor] = {}
    for shard, names in shards_of(index).items():
        try:
            with safe_open(shard, framework="pt") as tensors:
                state |= {name: tensors.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{shard} cannot be read as {index.name} says ({error}); copy the folder again."
            ) from None
    return state


def _read_arrays(file: Path) -> dict[str, Tensor]:
    """The numbers that numpy saved by name; text and the like are passed over, Python objects refused."""
    state: dict[str, Tensor] = {}
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no archive, or its end is missing")
        with np.load(file, allow_pickle=False) as arrays:
            size = sum(entry.file_size for entry in arrays.zip.infolist())
            if size > MOST_TIMES * file.stat().st_size + SMALL:
                raise ValueError(f"its arrays would take {size:,} bytes")
            for name in arrays.files:
                try:
                    array = arrays[name]
                except ValueError as error:
                    # Here numpy advises to run what the file holds.
                    said = "Python objects" if "allow_pickle" in str(error) else str(error)
                    raise ValueError(f"{cut(name)}: {said}") from None
                if isinstance(array, np.ndarray) and array.dtype.kind in "fiub" and array.dtype.itemsize <= 8:
                    state[name] = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except Exception as error:  # On bytes that are no archive it depends on the bytes what numpy raises.
        said = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{file} is no readable file of arrays ({said}); save them by name: numpy.savez(file, **arrays)."
        ) from None
    return state
