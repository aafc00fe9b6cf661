"""The house rules that a reader relies on: who may import whom, and how long things get."""

import ast
import graphlib
import re
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

#: Files in a folder besides ``__init__``, at most.
MAX_FILES = 15
MORE_FILES = {"caching": 20}

#: Files of less than 40 lines are pieces of something, unless they are one of these.
MIN_FILE_LINES = 40
SHORT_FILES = {
    "__main__": "python -m mim3d",
    "core.types": "names of types for every room",
    "core.errors": "the errors of every room",
    "workflows.weights": "what weights are is said by their room",
}

#: Folders of facts, one short file each.
FACTS = ("datasets.published.sets.", "weights.families.")

#: Lines of Python in each room, at most. Raising one is a line in a commit that says why.
BUDGET = {
    "core": 3250,
    "kernels": 980,
    "scans": 4640,
    "nn": 1062,
    "tracking": 550,
    "metrics": 1544,
    "datasets": 4345,
    "phantoms": 1400,
    "backbones": 1370,
    "reporting": 2205,
    "caching": 4729,
    "objective": 150,
    "weights": 3550,
    "inference": 1815,
    "planning": 950,
    "loading": 1055,
    "distributed": 715,
    "training": 2670,
    "tasks": 4555,
    "methods": 2550,
    "probing": 1040,
    "exporting": 2105,
    "workflows": 10762,
    "commands": 295,
    "cli": 832,
    "__main__": 15,
}

#: A command checks nothing and computes nothing: it hands its settings on.
MAX_COMMAND_STATEMENTS = 5


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


def file_lengths() -> dict[str, int]:
    """Lines of every module; those of a package are of its ``__init__``."""
    lengths = {}
    for name in MODULES:
        file = SOURCE.joinpath(*name.split(".")) if name else SOURCE
        path = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
        lengths[name] = len(path.read_text(encoding="utf-8").splitlines())
    return lengths


def test_rooms_keep_to_their_budget_of_lines():
    lines = dict.fromkeys(ROOMS, 0)
    for name, length in file_lengths().items():
        if name:
            lines[room(name)] += length
    assert set(BUDGET) == set(ROOMS)
    assert not {name: (length, BUDGET[name]) for name, length in lines.items() if length > BUDGET[name]}


def is_package(name: str) -> bool:
    return not name or SOURCE.joinpath(*name.split(".")).is_dir()


def test_files_are_worth_opening():
    lengths = file_lengths()
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES}
    files = {name: lines for name, lines in lengths.items() if not is_package(name)}
    files = {name: lines for name, lines in files.items() if not name.startswith(("commands.", *FACTS))}
    assert not {n: lines for n, lines in files.items() if lines < MIN_FILE_LINES and n not in SHORT_FILES}


def folders() -> dict[str, list[str]]:
    """Folder -> names of its files besides ``__init__``."""
    found: dict[str, list[str]] = {}
    for name in MODULES:
        if name and not is_package(name):
            folder, _, file = name.rpartition(".")
            found.setdefault(folder, []).append(file)
    return found


@pytest.mark.parametrize("folder", folders())
def test_a_folder_can_be_taken_in_at_a_glance(folder):
    files = folders()[folder]
    assert len(files) <= MORE_FILES.get(folder, MAX_FILES), f"{folder} holds {len(files)} files"
    prefixes = [file.split("_")[0] for file in files if "_" in file or file in {f.split("_")[0] for f in files}]
    shared = {prefix for prefix in prefixes if prefixes.count(prefix) >= 3}
    assert not shared, f"files of {folder} that begin with {sorted(shared)} are a folder that nobody made"


def test_class_names_are_unique_in_the_package():
    owners: dict[str, list[str]] = {}
    for name, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                owners.setdefault(node.name, []).append(name)
    assert not {name: places for name, places in owners.items() if len(places) > 1}


COMMANDS = [name for name in MODULES if name.startswith("commands.")]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_hands_its_settings_on(name):
    functions = [node for node in MODULES[name].body if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions] == [name.removeprefix("commands.")]
    body = functions[0].body[1:]
    num_statements = sum(isinstance(node, ast.stmt) for statement in body for node in ast.walk(statement))
    assert num_statements <= MAX_COMMAND_STATEMENTS


def untyped_settings(tree: ast.AST) -> Iterator[str]:
    """Parameters and attributes by which settings would travel as a dictionary."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            name = node.arg if isinstance(node, ast.arg) else ast.unparse(node.target)
            kind = ast.unparse(node.annotation).replace(" ", "")
            if name in ("settings", "arguments", "options", "config") and kind.endswith("[str,Any]"):
                yield f"line {node.lineno}: {name}: {kind}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("locals", "vars") and not node.args:
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) not in ("cli", "core")])
def test_settings_travel_as_classes(name):
    assert not list(untyped_settings(MODULES[name]))


def entries(docstring: str) -> Iterator[tuple[str, str]]:
    """Entries of the sections of a docstring that describe arguments, attributes and errors: name, description."""
    section, found = "", []
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Attributes|Raises):", line):
            section = line
        elif line and not line.startswith(" "):
            section = ""
        elif section and (match := re.match(r" {4}([\w.*]+): (.*)", line)):
            found.append([match[1], match[2]])
        elif section and line.strip() and found:
            found[-1][1] += " " + line.strip()
    return ((name, text) for name, text in found)


@pytest.mark.parametrize("name", MODULES)
def test_arguments_and_attributes_are_described_in_whole_sentences(name):
    for node in ast.walk(MODULES[name]):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        for parameter, text in entries(ast.get_docstring(node) or ""):
            assert re.match(r"[A-Z0-9`(\[\"']", text), (
                f"{name}.{node.name}: '{parameter}: {text[:40]}' does not begin as a sentence"
            )
            assert text.endswith((".", ".)", ".``", ":")), (
                f"{name}.{node.name}: '{parameter}: ...{text[-40:]}' does not end"
            )


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
