"""What the documents say can be done as they say it."""

import ast
import importlib
import inspect
import re
import shlex
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mim3d.backbones import BACKBONES, create_recipe
from mim3d.cli import COMMANDS
from mim3d.cli.arguments import RESERVED, Signature, command_arguments, settings_type, split_line
from mim3d.core.errors import ConfigError
from mim3d.core.own_code import is_dotted_path
from mim3d.core.settings import find_named
from mim3d.methods import METHODS, create_method
from mim3d.tasks import TASKS, create_task
from mim3d.tracking.trackers import Tracking

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "mim3d"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [ROOT / "demo" / "run.sh", *sorted((ROOT / "docs").rglob("*.sbatch"))]

#: Settings below these flags depend on the name that is chosen.
REGISTRIES = {"backbone": BACKBONES, "method": METHODS, "task": TASKS}

#: What checks these settings.
CREATED = {"backbone": create_recipe, "method": create_method, "task": create_task}

#: Flags of other programs that the documents speak of.
FOREIGN = {
    "a placeholder": "flag",
    "SLURM": "gpus-per-node gpus-per-task ntasks ntasks-per-node kill-on-bad-exit signal requeue open-mode",
    "torchrun": "node_rank no-python",
    "docker": "chown rm network read-only tmpfs user volume gpus build-arg target entrypoint file tag shm-size",
    "MONAI's runner": "sw_batch_size device datalist mirror_axes body_only",
    "benchmarks/many_classes.py": "rows",
    "benchmarks/prediction_folder.py": "threads kinds size",
    "benchmarks/scaling.py": "paper",
    "benchmarks/finetuning.py": "dice",
    "benchmarks/learning_rates.py": "size batch steps",
}


def blocks(text: str, language: str = "[a-z]*") -> list[str]:
    """Code blocks of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def command_lines(text: str) -> list[str]:
    """Lines of code blocks (or of a script) that call a command, what starts it and comments cut off."""
    lines = [line.strip() for block in blocks(text) or [text] for line in block.replace("\\\n", " ").splitlines()]
    found = (re.match(r"(?:(?:srun|torchrun) .*? )?(mim3d [a-z].*)", line) for line in lines)
    return [match[1] for match in found if match]


def all_command_lines() -> list[tuple[str, str]]:
    sources = [*DOCUMENTS, *SCRIPTS]
    return [(path.name, line) for path in sources for line in command_lines(path.read_text(encoding="utf-8"))]


def inline_code(text: str) -> list[str]:
    """What stands between single backticks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def has_setting(hint: Any, parts: list[str]) -> bool:
    """Whether a type has a setting at a dotted path."""
    for part in parts:
        settings = settings_type(hint)
        hint = None if settings is None else typing.get_type_hints(settings).get(part)
    return hint is not None


def has_flag(signature: Signature, flag: str) -> bool:
    """Whether a command has a flag; one below a named choice is a setting of at least one of its names."""
    name, *parts = flag.split(".")
    # Those of the command line itself.
    if flag in RESERVED:
        return True
    try:
        signature.hint_of(flag)
    except ConfigError:
        return False
    if not parts or name not in REGISTRIES:
        return True
    found = [find_named(key, REGISTRIES[name], name) for key in REGISTRIES[name]]
    return any(has_setting(each if isinstance(each, type) else type(each), parts) for each in found)


def flags(words: str) -> list[str]:
    """Dotted names of the flags in a piece of text."""
    return re.findall(r"(?<![\w-])--([A-Za-z][\w.-]*\w)", words)


def test_the_documents_show_every_command():
    shown = {line.split()[1] for name, line in all_command_lines() if name == "README.md"}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize(("source", "line"), all_command_lines())
def test_every_command_line_in_the_documents_is_understood(source, line, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    # Trackers are extras.
    monkeypatch.setattr(Tracking, "require_packages", lambda self: None)
    _, name, *words = shlex.split(line, comments=True)
    signature = COMMANDS[name].signature(name)
    if "--config" in words and not words[words.index("--config") + 1].startswith("recipes/"):
        # The saved settings of a run that the reader has made by then.
        saved = tmp_path / "config.yaml"
        saved.write_text(f"command: {name}\ndata: cache\n")
        words[words.index("--config") + 1] = str(saved)
    if "--like" in words:
        # Another run that the reader has made by then.
        monkeypatch.setattr("mim3d.workflows.finetune.settings.settings_below", lambda given: {"data": "cache"})
    arguments = command_arguments(split_line(words, signature), signature)
    for kind, create in CREATED.items():
        named = arguments.get(kind)
        chosen = named.get("name") if isinstance(named, dict) else named
        # Without a name they change what weights have; code of the reader's own is not here.
        if chosen is not None and not is_dotted_path(chosen):
            create(named)
    made = inspect.getclosurevars(COMMANDS[name].load().__wrapped__).nonlocals.get("settings", dict)
    assert made(**arguments) or not signature.hints


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert all((path.parent / link).exists() for link in local), local


def anchors(path: Path) -> set[str]:
    """What can stand behind ``#`` in a link to a page: its headings, as GitHub turns them into anchors."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_parts_of_pages_lead_to_headings(path):
    for page, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", path.read_text(encoding="utf-8")):
        assert anchor in anchors(path.parent / page if page else path), f"{page}#{anchor}"


def test_every_page_is_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path not in reached and path.suffix == ".md":
            reached.add(path)
            links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
            waiting += [(path.parent / link).resolve() for link in links]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(DOCUMENTS) <= reached
    assert all(f"(docs/how-to/{path.name})" in readme for path in (ROOT / "docs" / "how-to").glob("*.md"))


@pytest.mark.parametrize("path", [*DOCUMENTS, *sorted((ROOT / "recipes").iterdir())], ids=lambda path: path.name)
def test_flags_and_commands_in_the_text_exist(path):
    text = path.read_text(encoding="utf-8")
    spans = inline_code(text) if path.suffix == ".md" else re.findall(r"#(.*)", text)
    signatures = {name: command.signature(name) for name, command in COMMANDS.items()}
    foreign = " ".join(FOREIGN.values()).split()
    for span in spans:
        if re.match(r"(srun|torchrun|python) ", span) and "mim3d" not in span:
            continue
        called = re.search(r"(?<![\w/])mim3d ([a-z]+)", span) if path.suffix == ".md" else None
        assert called is None or called[1] in COMMANDS, span
        candidates = signatures.values() if called is None else [signatures[called[1]]]
        words = span if called is None else span[called.end() :]
        for flag in flags(words):
            assert flag in foreign or any(has_flag(signature, flag) for signature in candidates), f"--{flag}: {span}"


def python_snippets() -> list[tuple[str, str]]:
    texts = [(path.name, path.read_text(encoding="utf-8")) for path in DOCUMENTS]
    in_blocks = [(name, code) for name, text in texts for code in blocks(text, "python")]
    return in_blocks + [(name, code) for name, text in texts for code in re.findall(r'python -c "([^"]+)"', text)]


def imported(tree: ast.Module) -> dict[str, Any]:
    """Names that a snippet imports, with what they stand for; it is skipped where another package is missing."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module, root = import_or_skip(alias.name), alias.name.split(".")[0]
                found[alias.asname or root] = module if alias.asname else sys.modules[root]
        elif isinstance(node, ast.ImportFrom):
            module = import_or_skip(node.module or "")
            found |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    return found


def import_or_skip(name: str) -> ModuleType:
    return importlib.import_module(name) if name.split(".")[0] == "mim3d" else pytest.importorskip(name)


def resolved(node: ast.AST, names: dict[str, Any]) -> Any:
    """What a name or dotted name of a snippet stands for; None where the snippet itself makes it."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    owner = resolved(node.value, names) if isinstance(node, ast.Attribute) else None
    return None if owner is None else getattr(owner, node.attr)


@pytest.mark.parametrize(("source", "snippet"), python_snippets())
def test_python_in_the_documents_names_what_exists(source, snippet):
    tree = ast.parse(snippet)
    names = imported(tree)
    for node in ast.walk(tree):
        found = resolved(node.func if isinstance(node, ast.Call) else node, names)
        if isinstance(node, ast.Call) and getattr(found, "__module__", "").startswith("mim3d"):
            inspect.signature(found).bind_partial(*node.args, **{keyword.arg: None for keyword in node.keywords})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_the_text_names_exist(path):
    for span in inline_code(path.read_text(encoding="utf-8")):
        for name in re.findall(r"[\w/]+\.(?:py|sh|sbatch)\b|\brecipes/\w+\.yaml\b", span):
            places = [folder / name for folder in (ROOT, SOURCE, SOURCE.parent, path.parent)]
            found = any(place.exists() for place in places) or ("/" not in name and any(SOURCE.rglob(name)))
            assert found, f"{path.name} names {name}"
