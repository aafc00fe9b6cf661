"""A module of mim3d and all that it uses of others as the text of one file, for places where mim3d is not installed.

What a bundle does with a scan is thereby not written a second time: it is the same functions, word by word.
"""

import ast
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from mim3d import __version__

_HEADING = '''"""{purpose}

Written by mim3d {version} from its own modules, under its licence (Apache-2.0). Classes of mim3d that occur in
annotations alone are not defined here.
"""

from __future__ import annotations

'''


@dataclass(frozen=True)
class _Names:
    """What the names at the top of a module stand for.

    Attributes:
        text: Source code of the module.
        defined: Name -> statement that defines it.
        outside: Name -> statement that imports it from another package.
        inside: Name -> module of mim3d that it is imported from.
    """

    text: str
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    inside: dict[str, str] = field(default_factory=dict)


def carried_source(module: str) -> str:
    """Return the definitions of a module, those of mim3d that they use, and their imports from elsewhere.

    Modules must import names from modules of mim3d by ``from ... import``, without another name, and at their top.

    Args:
        module: Dotted name of the module.
    """
    chosen: dict[tuple[str, int], str] = {}
    homes: dict[str, str] = {}
    imports: set[str] = set()

    def choose(name: str, home: str, is_annotation: bool = False) -> None:
        names = _names_of(home)
        if name in names.inside:
            choose(name, names.inside[name], is_annotation)
        elif name in names.outside:
            imports.add(names.outside[name])
        elif name in names.defined:
            statement = names.defined[name]
            place = home, statement.lineno
            # Annotations are not evaluated: names of types are given where they cost a line.
            is_type = isinstance(statement, ast.Assign | ast.AnnAssign) and homes.get(name, home) == home
            if place in chosen or (is_annotation and not is_type):
                return
            assert homes.setdefault(name, home) == home, f"{name} is defined in {homes[name]} and in {home}"
            chosen[place] = ""
            for used, only_annotates in _used(statement):
                choose(used, home, only_annotates)
            # What is used stands before: it may be needed as soon as the statement runs.
            del chosen[place]
            chosen[place] = _text_of(statement, names.text)

    for name in _names_of(module).defined:
        choose(name, module)
    purpose = (ast.get_docstring(ast.parse(_names_of(module).text)) or "").partition("\n")[0]
    heading = _HEADING.format(purpose=purpose, version=__version__)
    return heading + "\n".join(sorted(imports)) + "\n" + "".join(chosen.values())


@lru_cache
def _names_of(module: str) -> _Names:
    found = find_spec(module)
    assert found is not None and found.origin is not None, module
    names = _Names(Path(found.origin).read_text(encoding="utf-8"))
    for statement in ast.parse(names.text).body:
        if isinstance(statement, ast.ImportFrom) and str(statement.module).split(".")[0] == "mim3d":
            names.inside.update({alias.name: str(statement.module) for alias in statement.names})
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            for alias in statement.names:
                line = f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
                if isinstance(statement, ast.ImportFrom):
                    line = f"from {statement.module} {line}"
                names.outside[alias.asname or alias.name.split(".")[0]] = line
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.defined[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            bound = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
            names.defined.update({node.id: statement for node in bound})
    return names


def _used(node: ast.AST, is_annotation: bool = False) -> list[tuple[str, bool]]:
    """Names in a statement, and whether they are part of an annotation."""
    if isinstance(node, ast.Name):
        return [(node.id, is_annotation)]
    return [
        used
        for name, value in ast.iter_fields(node)
        for child in (value if isinstance(value, list) else [value])
        if isinstance(child, ast.AST)
        for used in _used(child, is_annotation or name in ("annotation", "returns"))
    ]


def _text_of(statement: ast.stmt, text: str) -> str:
    """A definition with its decorators and the comment above it, and the blank lines that set it apart."""
    lines = text.splitlines()
    first = min([statement.lineno, *(node.lineno for node in getattr(statement, "decorator_list", []))]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    blank = "\n" if isinstance(statement, ast.Assign | ast.AnnAssign) else "\n\n"
    return blank + "\n".join(lines[first : statement.end_lineno]) + "\n"
