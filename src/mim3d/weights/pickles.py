"""What torch files hold, read without running code: tensors, plain values, and a stand-in for every other object.

``torch.load(weights_only=True)`` refuses a whole file for one numpy scalar or logger beside the weights. Here such an
object becomes a :class:`PassedOver`, and nothing that the file names is imported or called.
"""

import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, _utils

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


def _without_type(rebuild: Callable[..., Any], _: Any, arguments: tuple[Any, ...], __: Any) -> Any:
    """A tensor of a subclass, such as MONAI's MetaTensor, as a plain tensor."""
    return rebuild(*arguments)


def _parameter(data: Any, *_: Any) -> Any:
    return data


#: The unpickler in Python, as torch uses for its own: the one in C takes memory for any number that a file names.
_PYTHON_UNPICKLER: Any = pickle._Unpickler

#: What may be called, by module and name; ``torch`` gives the classes of storages itself.
_REBUILDS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): partial(_utils._rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): partial(_utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _without_type,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
}


def load_torch_file(file: Path) -> tuple[Any, tuple[str, ...]]:
    """The content of a file that ``torch.save`` wrote, of any version, and the programs that it names.

    Returns:
        Mappings, lists, plain values and tensors, with a :class:`PassedOver` for every other object, and the dotted
        names of functions that could run programs; none of them was run.

    Raises:
        CheckpointError: It is no such file, or damaged; the sentence gives the reason.
    """
    programs: list[str] = []

    class Unpickler(_PYTHON_UNPICKLER):  # type: ignore[misc]
        """Imports nothing that the file names."""

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _REBUILDS:
                return _REBUILDS[module, name]
            if module.split(".")[0] in _PROGRAMS and name not in _HARMLESS:
                programs.append(f"{module}.{name}")
            return type(name, (PassedOver,), {"__module__": module, "__qualname__": name})

        def load_build(self) -> None:
            # Attributes are set on what the file itself made, never on a class or function.
            if not isinstance(self.stack[-2], (PassedOver, OrderedDict)):
                raise pickle.UnpicklingError("it sets attributes of an object that is no part of weights")
            super().load_build()

        dispatch: ClassVar = {**_PYTHON_UNPICKLER.dispatch, pickle.BUILD[0]: load_build}

    def load(opened: Any, **options: Any) -> Any:
        return Unpickler(opened, **options).load()

    reader = SimpleNamespace(Unpickler=Unpickler, load=load, __name__=__name__)
    try:
        is_zip = zipfile.is_zipfile(file)
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
            if any(name.endswith("constants.pkl") for name in names):
                raise ValueError("it is a TorchScript program; save the state_dict of the network instead")
            if not any(name.endswith("data.pkl") for name in names):
                raise ValueError("it is a ZIP archive of something else; unpack it first")
        elif tarfile.is_tarfile(file):
            raise ValueError("it is a TAR archive; unpack it first")
        # Files of before torch 1.6 are no ZIP archives, which alone can be mapped into memory.
        content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=reader, mmap=is_zip)
    except Exception as error:  # On bytes that are no pickle it depends on the bytes what is raised.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read as weights ({reason}); it is damaged, or no file of torch.save."
        ) from None
    return content, tuple(dict.fromkeys(programs))


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
