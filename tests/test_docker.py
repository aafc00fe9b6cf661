"""The recipes of containers: pinned, without rights, and starting what `mim3d` has. No container engine is needed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mim3d.cli import COMMANDS
from mim3d.cli.arguments import command_arguments, split_line

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "docker").glob("*.Dockerfile"))
ENTRIES = ("embed", "segment")


def steps(recipe: Path) -> list[tuple[str, str]]:
    """Instructions of a recipe: the word in capitals, and what follows it in one line."""
    text = re.sub(r"^#.*\n", "", recipe.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def names_let_in() -> set[str]:
    """What `.dockerignore` lets into an image; all else is left out by its first line."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    return {line[1:] for line in lines if line.startswith("!")}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_starts_from_a_pinned_base_and_ends_as_a_user_without_rights(recipe):
    found, stages, user = steps(recipe), set(), None
    for word, rest in found:
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            assert base in stages or re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-[a-z-]+", base), base
            user = user if base in stages else None
            stages.add(name)
        elif word == "USER":
            user = rest
    assert user is not None and user.isdigit() and int(user) > 0
    assert not [rest for word, rest in found if word == "ADD" or "latest" in rest or "sudo" in rest]
    assert not re.search(r"(?i)token|secret|password|api_key|credential", recipe.read_text())


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_each_target_starts_one_of_the_two_entry_points_and_segment_is_the_default(recipe):
    targets = [rest.partition(" AS ")[2] for word, rest in steps(recipe) if word == "FROM"][-2:]
    started = [rest for word, rest in steps(recipe) if word == "ENTRYPOINT"]
    assert targets == list(ENTRIES) and started == ['["embed"]', '["segment"]']


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_what_a_recipe_copies_is_there_and_nothing_else_gets_into_an_image(recipe):
    copied = [rest.split()[:-1] for word, rest in steps(recipe) if word == "COPY" and "--from" not in rest]
    names = {name.removeprefix("./") for group in copied for name in group}
    assert names == names_let_in()
    assert all((ROOT / name).exists() for name in names)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_linter_finds_no_fault(recipe):
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, str(recipe)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_point_calls_a_command_with_flags_that_it_has(entry, tmp_path):
    script = ROOT / "docker" / entry
    assert script.stat().st_mode & 0o111
    shown = tmp_path / "mim3d"
    shown.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\nexit 3\n')
    shown.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    command = [str(script), "--batch_size", "2 and"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": path})
    # Its exit code is the command's own.
    assert done.returncode == 3
    name, *words = done.stdout.splitlines()
    assert name == {"embed": "embed", "segment": "predict"}[entry] and words[-2:] == ["--batch_size", "2 and"]
    places = {"/input", "/weights", "/output" if entry == "segment" else "/output/features.parquet"}
    assert places <= set(words)
    given = subprocess.run(
        [str(script)], capture_output=True, text=True, check=False, env={"PATH": path, "MIM3D_OUTPUT": "/a b"}
    )
    assert any(word.startswith("/a b") for word in given.stdout.splitlines())
    signature = COMMANDS[name].signature(name)
    assert set(command_arguments(split_line(words[:-2], signature), signature)) >= {"weights", "out"}


def test_the_page_names_every_recipe_and_target():
    page = (ROOT / "docs" / "how-to" / "container.md").read_text()
    assert all(f"docker/{recipe.name}" in page for recipe in RECIPES)
    assert all(f"--target {entry}" in page for entry in ("embed",))
