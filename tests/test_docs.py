"""What the documents say can be done as they say it."""

import re
import shlex
from pathlib import Path

import pytest

from mim3d.cli import COMMANDS
from mim3d.cli.arguments import command_arguments, split_line

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def command_lines(text: str) -> list[str]:
    """Lines of code blocks (or of a script) that call a command, comments cut off."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL) or [text]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(r"mim3d [a-z]", line)]


def all_command_lines() -> list[tuple[str, str]]:
    sources = [*DOCUMENTS, ROOT / "demo" / "run.sh"]
    return [(path.name, line) for path in sources for line in command_lines(path.read_text(encoding="utf-8"))]


def test_the_documents_show_every_command():
    shown = {line.split()[1] for name, line in all_command_lines() if name == "README.md"}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize(("source", "line"), all_command_lines())
def test_every_command_line_in_the_documents_is_understood(source, line, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    _, name, *words = shlex.split(line, comments=True)
    signature = COMMANDS[name].signature(name)
    if "--config" in words and not words[words.index("--config") + 1].startswith("recipes/"):
        # The saved settings of a run that the reader has made by then.
        saved = tmp_path / "config.yaml"
        saved.write_text(f"command: {name}\ndata: cache\n")
        words[words.index("--config") + 1] = str(saved)
    assert command_arguments(split_line(words, signature), signature)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert all((path.parent / link).exists() for link in local), local
