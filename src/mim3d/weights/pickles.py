"""What torch files hold, read without running code: tensors, plain values, and a stand-in for every other object.

``torch.load(weights_only=True)`` refuses a whole file for one numpy scalar or logger beside the weights. Here such an
object becomes a :class:`PassedOver`, and nothing that the file names is imported or called.
"""

import argparse
import io
import pickle
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mim3d.core.errors import CheckpointError

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
    """

    state: dict[str, Any]

    def __new__(cls, *_: Any, **__: Any) -> "PassedOver":
        """Create one, whatever the arguments."""
        made = super().__new__(cls)
        made.state = {}
        return made

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> "PassedOver":
        """Stand for what a call of the object would give."""
        return PassedOver()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Pass over an item of a list."""

    add = append

    def extend(self, values: Any) -> None:
        """Pass over items of a list."""

    update = extend


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    """A tensor on a storage, which is itself a flat tensor here; torch refuses what lies outside of it."""
    return torch.as_strided(storage, size, stride, offset) if isinstance(storage, Tensor) else PassedOver()


def _without_type(rebuild: Callable[..., Any], _: Any, arguments: tuple[Any, ...], __: Any) -> Any:
    """A tensor of a subclass, such as MONAI's MetaTensor, as a plain tensor."""
    return rebuild(*arguments)


def _parameter(data: Any, *_: Any) -> Any:
    return data


#: The unpickler in Python, as torch uses for its own: the one in C takes memory for any number that a file names.
_PYTHON_UNPICKLER: Any = pickle._Unpickler

#: What may be called, by module and name.
_REBUILDS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
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


class _ArchiveUnpickler(_PYTHON_UNPICKLER):  # type: ignore[misc]
    """Reads the pickle in an archive of ``torch.save``; imports nothing that it names.

    Attributes:
        programs: Dotted names of functions in the pickle that could run programs.
    """

    def __init__(self, archive: zipfile.ZipFile, pickled: str) -> None:
        super().__init__(io.BytesIO(archive.read(pickled)))
        self._archive, self._folder = archive, pickled.removesuffix("data.pkl")
        self._storages: dict[str, Tensor] = {}
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
        _, dtype, key, _, _ = pid
        if not isinstance(dtype, torch.dtype):
            return PassedOver()
        if key not in self._storages:
            entry = self._archive.getinfo(f"{self._folder}data/{key}")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("its tensors are compressed, which torch.save never does")
            held = bytearray(self._archive.read(entry))
            self._storages[key] = torch.frombuffer(held, dtype=dtype) if held else torch.empty(0, dtype=dtype)
        return self._storages[key]

    def load_build(self) -> None:
        # Attributes are set on what the file itself made, never on a class or function.
        if not isinstance(self.stack[-2], (PassedOver, OrderedDict)):
            raise ValueError("it sets attributes of an object that is no part of weights")
        super().load_build()

    dispatch: ClassVar = {**_PYTHON_UNPICKLER.dispatch, pickle.BUILD[0]: load_build}


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
    try:
        # Published files carry their command line beside the weights: a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # What torch warns of here concerns its own reader.
            warnings.simplefilter("ignore")
            # Files of before torch 1.6 are no archives, which alone can be mapped into memory.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive), ()
    except Exception as error:  # On bytes that are no pickle it depends on the bytes what torch raises.
        # Before its own reason torch advises to let the file run code.
        reason = _reason(str(error).rpartition("WeightsUnpickler error:")[2]) or type(error).__name__
    if is_archive:
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                if any(name.endswith("constants.pkl") for name in names):
                    raise ValueError("it is a TorchScript program; save the state_dict of the network instead")
                pickled = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
                if len(pickled) != 1:
                    raise ValueError("it is a ZIP archive of something else; unpack it first")
                if any(name.endswith("byteorder") and archive.read(name) != b"little" for name in names):
                    raise ValueError("its numbers are big-endian; save it again on another machine")
                unpickler = _ArchiveUnpickler(archive, pickled[0])
                return unpickler.load(), tuple(dict.fromkeys(unpickler.programs))
        except Exception as error:  # As above.
            reason = _reason(str(error)) or type(error).__name__
    elif tarfile.is_tarfile(file):
        reason = "it is a TAR archive; unpack it first"
    raise CheckpointError(f"{file} cannot be read as weights ({reason}); it is damaged, or no file of torch.save.")


def _reason(said: str) -> str:
    """The first line of what an error said."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and "weights_only" not in line]
    return lines[0] if lines else ""


def tensors_of_module(module: PassedOver) -> dict[str, Tensor]:
    """The parameters and buffers of a network that was pickled as a whole, by the names of its ``state_dict``."""
    tensors: dict[str, Tensor] = {}
    waiting = [("", module, 0)]
    while waiting:
        prefix, part, depth = waiting.pop()
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
