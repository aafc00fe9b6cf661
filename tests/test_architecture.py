"""The house rules that a reader relies on: who may import whom, and how long things get."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mim3d"

#: Rooms from the ground up; a room imports only from rooms before it. Rooms of one line stand side by side.
ROOMS = [
    "core",
    "kernels",
    "scans",
    "nn",
    "tracking",
    "metrics",
    "datasets",
    "phantoms",
    "backbones",
    "reporting",
    "caching",
    "objective",
    "weights",
    "inference",
    "planning",
    "loading",
    "distributed",
    "training",
    "tasks",
    "methods",
    "probing",
    "exporting",
    "workflows",
    "commands",
    "cli",
    "__main__",
]

#: Rooms that may not be imported although they lie below.
FORBIDDEN = {"training": {"loading", "planning", "inference", "weights", "caching", "datasets"}}

#: What a room may import from outside, where that is part of its purpose.
PURE = {"torch", "triton", "numpy", "math", "collections", "dataclasses", "typing", "functools", "itertools"}
OUTSIDE = {"nn": PURE}

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 90
USUAL_FUNCTION_LINES = 45


def modules() -> dict[str, ast.Module]:
    """Dotted name below mim3d -> syntax tree; ``""`` is the package itself."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


MODULES = modules()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a tree imports, wherever in it; what only a type checker sees is left out."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide which room is meant"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        yield from imports(node)


def own_imports(name: str) -> Iterator[str]:
    """Modules of mim3d that a module imports, as dotted names below mim3d."""
    for target in imports(MODULES[name]):
        if target.split(".")[0] == "mim3d":
            inner = target.removeprefix("mim3d").lstrip(".")
            while inner not in MODULES:
                inner = inner.rpartition(".")[0]
            yield inner


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_module_lies_in_a_known_room():
    unknown = {room(name) for name in MODULES if name} - set(ROOMS)
    assert not unknown, f"rooms without a place in the order: {sorted(unknown)}"


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_room_imports_only_from_rooms_below_it(name):
    here = ROOMS.index(room(name))
    for target in own_imports(name):
        # The package itself holds nothing but the version and lazy names.
        if target and room(target) != room(name):
            assert ROOMS.index(room(target)) < here, f"{name} imports {target}, which lies above it"
            assert room(target) not in FORBIDDEN.get(room(name), ()), f"{name} must not know {target}"


def test_the_package_imports_nothing_when_it_is_imported():
    assert set(imports(MODULES[""])) <= {"importlib", "typing.TYPE_CHECKING", "typing.Any"}


def test_modules_do_not_import_each_other_in_circles():
    graph = {name: {target for target in own_imports(name) if target not in ("", name)} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in OUTSIDE])
def test_pure_rooms_import_only_what_they_are_about(name):
    foreign = {target.split(".")[0] for target in imports(MODULES[name])} - {"mim3d"}
    assert foreign <= OUTSIDE[room(name)], f"{name} imports {sorted(foreign - OUTSIDE[room(name)])}"


def function_lengths() -> dict[str, int]:
    """Lines of every function without its docstring: that of a command is its manual, with a line per argument."""
    lengths = {}
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                docstring = len(ast.get_docstring(node, clean=False).splitlines()) if ast.get_docstring(node) else 0
                lengths[f"{name}.{node.name} (line {node.lineno})"] = node.end_lineno - node.lineno + 1 - docstring
    return lengths


def test_functions_stay_short():
    lengths = function_lengths()
    assert max(lengths.values()) <= MAX_FUNCTION_LINES, max(lengths, key=lambda key: lengths[key])
    long = sorted(name for name, lines in lengths.items() if lines >= USUAL_FUNCTION_LINES)
    assert len(long) <= 0.05 * len(lengths), long


def test_files_have_one_purpose_and_its_length():
    lengths = {path: len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    too_long = {str(path): lines for path, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert not too_long


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_class_says_what_it_is(name):
    tree = MODULES[name]
    holders = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
    for holder in holders:
        for node in holder.body:
            named = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if named and not any("overload" in ast.unparse(d) for d in node.decorator_list):
                inherited = isinstance(holder, ast.ClassDef) and bool(holder.bases)
                assert ast.get_docstring(node) or inherited, f"{name}.{node.name} has no docstring"


@pytest.mark.parametrize("name", MODULES)
def test_names_say_what_a_thing_is(name):
    vague = ("Base", "Utils", "Helper", "Manager", "V2")
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ClassDef):
            assert not node.name.endswith(vague) and not node.name.startswith("Base"), node.name
    assert not {"utils", "helpers", "common", "misc"} & set(name.split("."))


def test_no_file_is_read_in_a_way_that_runs_code():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called.split(".")[0] not in ("pickle", "marshal", "shelve"), f"{name}: {called}"
            assert called not in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load"), f"{name}: {called}"
            if called == "torch.load":
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                assert safe, f"{name}: torch.load without weights_only=True"
