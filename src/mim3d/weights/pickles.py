"""What torch files hold, read without running code: tensors, plain values, and a stand-in for every other object.

``torch.load(weights_only=True)`` refuses a whole file for one numpy scalar or logger beside the weights. Here such an
object becomes a :class:`PassedOver`, and nothing that the file names is imported or called. Arrays of numpy are
understood by the layout of their pickles, see :class:`PickledArray`.
"""

import argparse
import io
import math
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from mim3d.core.errors import CheckpointError
from mim3d.weights.plain import kind_of_file

#: Modules whose functions have no place in a file of weights: what names them is said.
_PROGRAMS = (
    "builtins",
    "__builtin__",
    "os",
    "nt",
    "posix",
    "subprocess",
    "sys",
    "shutil",
    "socket",
    "runpy",
    "importlib",
)

#: Of those, classes of plain values.
_HARMLESS = ("set", "frozenset", "bytearray", "complex", "slice", "range", "object", "list", "dict", "tuple", "getattr")


class PassedOver:
    """Stands for an object that is neither a tensor nor a plain value; its class is never imported.

    Attributes:
        state: What the file says of the object, where that is a mapping, as for a whole pickled network.
        items: What the file sets under keys, as for a mapping of somebody's own class.
    """

    state: dict[str, Any]
    items: dict[Any, Any]

    def __new__(cls, *_: Any, **__: Any) -> "PassedOver":
        """Create one, whatever the arguments."""
        made = super().__new__(cls)
        made.state, made.items = {}, {}
        return made

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> "PassedOver":
        """Stand for what a call of the object would give."""
        return PassedOver()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Pass over an item of a list."""

    add = append

    def extend(self, values: Any) -> None:
        """Pass over items of a list."""

    update = extend


class PickledType(PassedOver):
    """Stands for a numpy dtype, by its name such as ``f4``.

    Args:
        name: What the file says that it is.

    Attributes:
        dtype: The same type of torch; None for types that are no numbers, or in big-endian order.
    """

    dtype: torch.dtype | None

    def __init__(self, name: Any = "", *_: Any) -> None:
        # A type that numpy itself has not is named by its class, which stands in here.
        known = name if isinstance(name, str) else getattr(name, "__qualname__", None)
        self.dtype = _DTYPES.get(known) if isinstance(known, str) else None

    def __setstate__(self, state: Any) -> None:
        # A version, then the order of bytes.
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            self.dtype = None


class PickledArray(PassedOver):
    """Stands for a numpy array, whose values are in the pickle itself.

    Attributes:
        tensor: Its values, which share the memory of the pickle; None where they are no plain numbers.
    """

    tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        # A version, the shape, the type, whether the first axis varies fastest, and the bytes.
        if isinstance(state, tuple) and len(state) == 5:
            self._fill(state[1], state[2], state[4], first_fastest=bool(state[3]))

    @classmethod
    def of_buffer(cls, held: Any, kind: Any, shape: Any, order: Any = "C", axes: Any = None, *_: Any) -> "PickledArray":
        """An array as the fifth pickle protocol has it; ``axes`` are those to which it is turned afterwards."""
        made = cls()
        made._fill(shape, kind, held, first_fastest=order == "F")
        if axes is not None and made.tensor is not None:
            made.tensor = made.tensor.permute(*axes)
        return made

    def _fill(self, shape: Any, kind: Any, held: Any, *, first_fastest: bool) -> None:
        dtype = kind.dtype if isinstance(kind, PickledType) else None
        is_shape = (
            isinstance(shape, tuple) and len(shape) <= _MOST_AXES and all(type(n) is int and n >= 0 for n in shape)
        )
        if dtype is None or not is_shape or not isinstance(held, (bytes, bytearray)):
            return
        if math.prod(shape) * dtype.itemsize != len(held):
            raise ValueError("it holds an array that is cut off")
        with warnings.catch_warnings():
            # Nothing is written to the values, and copies of what a pickle repeats would take any amount of memory.
            warnings.simplefilter("ignore")
            flat = torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype)
        self.tensor = (
            flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1]) if first_fastest else flat.reshape(shape)
        )


def _bytes(text: Any = "", encoding: Any = "latin1") -> Any:
    """The bytes that old protocols keep as text; none without it."""
    return text.encode("latin-1") if isinstance(text, str) and encoding == "latin1" else PassedOver()


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    """A tensor on a storage, which is itself a flat tensor here; torch refuses what lies outside of it."""
    return torch.as_strided(storage, size, stride, offset) if isinstance(storage, Tensor) else PassedOver()


def _without_type(rebuild: Callable[..., Any], _: Any, arguments: tuple[Any, ...], __: Any) -> Any:
    """A tensor of a subclass, such as MONAI's MetaTensor, as a plain tensor."""
    return rebuild(*arguments)


def _mapping(*_: Any) -> OrderedDict[Any, Any]:
    """A mapping with defaults, which the file fills next, without them."""
    return OrderedDict()


def _parameter(data: Any, *_: Any) -> Any:
    return data


#: The unpickler in Python, as torch uses for its own: the one in C takes memory for any number that a file names.
_PYTHON_UNPICKLER: Any = pickle._Unpickler

#: The first two pickles of files of before torch 1.6.
_OLD_HEADER = [0x1950A86A20F9469CFC6C, 1001]

#: The parts of an archive that hold weights.
_PART = re.compile(r"[^/]+/(data\.pkl|data/[^/]+)")

#: More modules than any network has.
_MOST_MODULES = 100_000

#: Axes that a numpy array has at most.
_MOST_AXES = 64

#: Types of values by the names that numpy has for them.
_DTYPES = {
    "f8": torch.float64,
    "f4": torch.float32,
    "f2": torch.float16,
    "i8": torch.int64,
    "i4": torch.int32,
    "i2": torch.int16,
    "i1": torch.int8,
    "u1": torch.uint8,
    "b1": torch.bool,
    "bfloat16": torch.bfloat16,
}

#: What may be called, by module and name.
_REBUILDS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _bytes,
    ("__builtin__", "bytes"): _bytes,
    ("numpy", "dtype"): PickledType,
    # Names before and since numpy 2.
    ("numpy.core.multiarray", "_reconstruct"): PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): PickledArray,
    ("numpy.core.numeric", "_frombuffer"): PickledArray.of_buffer,
    ("numpy._core.numeric", "_frombuffer"): PickledArray.of_buffer,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): _mapping,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _without_type,
}


#: Types of values by the class of storage that a pickle names.
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


class _Unpickler(_PYTHON_UNPICKLER):  # type: ignore[misc]
    """Reads a pickle of ``torch.save``; imports nothing that it names.

    Args:
        pickled: The pickle.
        storage_of: Gives the values of a storage by their type and by what else its persistent id holds: a key, a
            place, a number of values and, in old files, a view.

    Attributes:
        programs: Dotted names of functions in the pickle that could run programs.
    """

    def __init__(self, pickled: BinaryIO, storage_of: Callable[..., Tensor]) -> None:
        super().__init__(pickled)
        self._storage_of = storage_of
        self.programs: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REBUILDS:
            return _REBUILDS[module, name]
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module.split(".")[0] in _PROGRAMS and name not in _HARMLESS:
            self.programs.append(f"{module}.{name}")
        return type(name, (PassedOver,), {"__module__": module, "__qualname__": name})

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, *rest = pid
        # Old files hold the source of a network's class beside it.
        if kind == "module":
            return dtype
        return self._storage_of(dtype, *rest) if isinstance(dtype, torch.dtype) else PassedOver()

    def load_build(self) -> None:
        # Attributes are set on what the file itself made, never on a class or function.
        if not isinstance(self.stack[-2], (PassedOver, OrderedDict)):
            raise ValueError("it sets attributes of an object that is no part of weights")
        super().load_build()

    dispatch: ClassVar = {**_PYTHON_UNPICKLER.dispatch, pickle.BUILD[0]: load_build}


def _read_archive(file: Path) -> tuple[Any, list[str]]:
    """The content of an archive, and the programs that it names."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if any(name.endswith("constants.pkl") for name in names):
            raise ValueError("it is a TorchScript program; save the state_dict of the network instead")
        pickled = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickled) != 1:
            raise ValueError("it is a ZIP archive of something else; unpack it first")
        if any(name.endswith("byteorder") and archive.read(name) != b"little" for name in names):
            raise ValueError("its numbers are big-endian; save it again on another machine")
        folder, storages = pickled[0].removesuffix("data.pkl"), dict[str, Tensor]()

        def storage_of(dtype: torch.dtype, key: str, *_: Any) -> Tensor:
            if key not in storages:
                held = bytearray(archive.read(f"{folder}data/{key}"))
                storages[key] = torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype)
            return storages[key]

        unpickler = _Unpickler(io.BytesIO(archive.read(pickled[0])), storage_of)
        return unpickler.load(), unpickler.programs


def _read_old(file: Path) -> tuple[Any, list[str]]:
    """The content of a file of before torch 1.6, and the programs that it names: pickles, then the storages."""
    storages: dict[str, Tensor] = {}
    largest = file.stat().st_size

    def storage_of(dtype: torch.dtype, key: str, _: Any, size: int, view: Any = None) -> Tensor:
        if not isinstance(size, int) or not 0 <= size * dtype.itemsize <= largest:
            raise ValueError("it names more values than it holds")
        whole = storages.setdefault(key, torch.empty(size, dtype=dtype))
        return whole if view is None else whole[view[1] : view[1] + view[2]]

    with open(file, "rb") as stream:
        header = [_Unpickler(stream, storage_of).load() for _ in range(3)]
        if header[:2] != _OLD_HEADER or not isinstance(header[2], dict) or not header[2].get("little_endian"):
            raise ValueError("it does not begin as such files do")
        unpickler = _Unpickler(stream, storage_of)
        content = unpickler.load()
        for key in _Unpickler(stream, storage_of).load():
            storage = storages[key]
            size = int.from_bytes(stream.read(8), "little")
            held = stream.read(storage.nbytes)
            if size != len(storage) or len(held) != storage.nbytes:
                raise ValueError("its end is missing")
            if held:
                storage.copy_(torch.frombuffer(bytearray(held), dtype=storage.dtype))
    return content, unpickler.programs


def load_torch_file(file: Path) -> tuple[Any, tuple[str, ...]]:
    """The content of a file that ``torch.save`` wrote, and the programs that it names.

    torch's own restricted reader comes first. Where it refuses an archive for what lies beside the tensors, the archive
    is read here.

    Returns:
        Mappings, lists, plain values and tensors, with a :class:`PassedOver` for every other object, and the dotted
        names of functions that could run programs; none of them was run.

    Raises:
        CheckpointError: It is no such file, or damaged; the sentence gives the reason.
    """
    is_archive = zipfile.is_zipfile(file)
    reason = _unusual(file) if is_archive else ""
    if not reason:
        try:
            # Published files carry their command line beside the weights: a Namespace of plain values.
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                # What torch warns of here concerns its own reader.
                warnings.simplefilter("ignore")
                # Files of before torch 1.6 are no archives, which alone can be mapped into memory.
                return torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive), ()
        except Exception:  # On bytes that are no pickle it depends on the bytes what torch raises.
            # Before its own reason torch advises to let the file run code.
            pass
        try:
            content, programs = (_read_archive if is_archive else _read_old)(file)
            return content, tuple(dict.fromkeys(programs))
        except Exception as error:  # As above.
            reason = (
                (_reason(str(error)) or type(error).__name__)
                if is_archive
                else kind_of_file(file) or "its content is of another kind"
            )
    raise CheckpointError(f"{file} cannot be read as weights ({reason}); it is damaged, or no file of torch.save.")


def _unusual(file: Path) -> str:
    """What an archive has that ``torch.save`` never writes, and that would take memory or time; empty if nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            parts = [entry for entry in archive.infolist() if _PART.fullmatch(entry.filename)]
    except Exception as error:  # On bytes that are no archive it depends on the bytes what is raised.
        return _reason(str(error)) or type(error).__name__
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        return "its tensors are compressed, which torch.save never does"
    if sum(part.file_size for part in parts) > file.stat().st_size:
        return "its tensors are larger than the file"
    return ""


def _reason(said: str) -> str:
    """The first line of what an error said."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and "weights_only" not in line]
    return lines[0] if lines else ""


def tensors_of_module(module: PassedOver) -> dict[str, Tensor]:
    """The parameters and buffers of a network that was pickled as a whole, by the names of its ``state_dict``."""
    tensors: dict[str, Tensor] = {}
    waiting, visits = [("", module, 0)], 0
    while waiting and visits < _MOST_MODULES:
        prefix, part, depth = waiting.pop()
        visits += 1
        for kind in ("_parameters", "_buffers"):
            own = part.state.get(kind)
            for name, value in own.items() if isinstance(own, dict) else ():
                if isinstance(value, Tensor):
                    tensors[f"{prefix}{name}"] = value
        inner = part.state.get("_modules")
        for name, value in inner.items() if isinstance(inner, dict) and depth < 64 else ():
            if isinstance(value, PassedOver):
                waiting.append((f"{prefix}{name}.", value, depth + 1))
    return tensors
