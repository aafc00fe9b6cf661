"""Code of the user's own, named by dotted path: who may name it, and where it is found.

An import runs what it finds, and the folder where a user stands may hold anybody's files, a ``pandas.py`` beside the
scans among them. The command line therefore searches that folder for nothing, in its own process and in those that it
starts, but for the packages that the dotted paths begin with which the user named.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

#: Settings whose value may be the dotted path of a user's own code.
CODE_SETTINGS = ("backbone", "method", "preset", "task")

#: The folder that holds mim3d itself.
_HOME = os.path.realpath(Path(__file__).parents[2])


def is_dotted_path(name: object) -> bool:
    """Whether a name is a dotted path, such as ``my_lab.foo.Foo``."""
    return isinstance(name, str) and "." in name and all(part.isidentifier() for part in name.split("."))


def own_code_in(settings: Mapping[str, Any]) -> dict[str, str]:
    """The dotted paths among the settings of a command, by the names of the settings; of arms and recipes too."""
    inner: dict[str, Any] = {name: settings.get(name) for name in ("finetune", "pretrain")}
    arms = settings.get("arms")
    inner |= {f"arms[{n}]": arm for n, arm in enumerate(arms)} if isinstance(arms, (list, tuple)) else {}
    # An arm that is a word may be a dotted path with a backbone behind it.
    inner = {
        name: dict(zip(("method", "backbone"), value.split(":"), strict=False)) if isinstance(value, str) else value
        for name, value in inner.items()
    }
    found = {
        f"{name}.{kind}": path
        for name, value in inner.items()
        if isinstance(value, Mapping)
        for kind, path in own_code_in(value).items()
    }
    named = {kind: settings.get(kind) for kind in CODE_SETTINGS}
    paths = {kind: value.get("name") if isinstance(value, Mapping) else value for kind, value in named.items()}
    return found | {kind: path for kind, path in paths.items() if isinstance(path, str) and is_dotted_path(path)}


@dataclass(frozen=True)
class OwnCode(MetaPathFinder):
    """Finds some packages in a folder, after Python has found them nowhere else, and nothing else in it.

    A process that it is sent to, among the arguments of a new process, finds them from then on.

    Attributes:
        folder: The folder.
        packages: Names of the packages.
    """

    folder: str
    packages: frozenset[str]

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Find one of the packages; what lies inside of it is then found by Python itself."""
        known = path is None and fullname in self.packages
        return PathFinder.find_spec(fullname, [self.folder], target) if known else None

    def __reduce__(self) -> Any:
        return _find_also, (self.folder, self.packages)


def _find_also(folder: str, packages: frozenset[str]) -> OwnCode:
    finder = OwnCode(folder, packages)
    if finder not in sys.meta_path:
        sys.meta_path.append(finder)
    return finder


def own_code() -> tuple[OwnCode, ...]:
    """What this process finds code of the user's own by; another process that it is sent to finds the same."""
    return tuple(finder for finder in sys.meta_path if isinstance(finder, OwnCode))


def how_to_find(module: str | None) -> str:
    """A sentence on a module that lies beside code of the user's own and was not found; empty for any other."""
    package = (module or "").partition(".")[0]
    for finder in own_code():
        if package and PathFinder.find_spec(package, [finder.folder]) is not None:
            return (
                f" {package} lies in {finder.folder}, where only {', '.join(sorted(finder.packages))} is searched for; "
                f"put both into one package, or set PYTHONPATH={finder.folder}."
            )
    return ""


@contextmanager
def found_in_working_folder(paths: Iterable[str]) -> Iterator[None]:
    """Find the packages that dotted paths begin with in the folder where the user stands.

    Args:
        paths: Dotted paths that the user named.
    """
    packages = frozenset(path.partition(".")[0] for path in paths)
    if not packages:
        yield
        return
    finder = _find_also(os.getcwd(), packages)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def working_folder_left_out() -> Iterator[None]:
    """Take the folder where the user stands from Python's search path, here and in processes that are started."""
    search_path, environment = list(sys.path), dict(os.environ)
    leave_out_working_folder()
    try:
        yield
    finally:
        sys.path[:] = search_path
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            os.environ.pop(name, None)
            os.environ |= {name: environment[name]} if name in environment else {}


def leave_out_working_folder() -> None:
    """Take the folder where the user stands from Python's search path, for good.

    Python adds it for ``python -m`` and ``python -c``, and for an empty or relative entry of PYTHONPATH. It stays where
    it is the folder of mim3d itself, and where an absolute entry of PYTHONPATH or an installed package asks for it.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # It was removed meanwhile, and holds nothing.
        here = os.devnull

    def is_here(entry: str) -> bool:
        return os.path.realpath(os.path.join(here, entry)) == here

    entries = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    wanted = [entry for entry in entries if os.path.isabs(entry) or not is_here(entry)]
    wanted += [_HOME] if is_here(_HOME) else []
    standard = os.path.dirname(os.__file__)
    # Installed packages come after the standard library.
    installed = sys.path[sys.path.index(standard) :] if standard in sys.path else []
    stay = {entry for entry in (*wanted, *installed) if os.path.isabs(entry)}
    sys.path[:] = [entry for entry in sys.path if entry in stay or not is_here(entry)]
    os.environ |= {"PYTHONPATH": os.pathsep.join(wanted), "PYTHONSAFEPATH": "1"}
