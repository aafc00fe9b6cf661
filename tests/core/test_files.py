"""Files and folders that appear whole or not at all."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mim3d.core.errors import DataError
from mim3d.core.files import (
    atomic_file,
    atomic_folder,
    read_csv,
    read_json,
    remove_partial,
    try_lock,
    write_csv,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_as_before_until_all_of_the_new_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with atomic_file(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
        assert part.name == "a.txt"
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(error), atomic_file(tmp_path / "a.txt") as part:
        part.write_text("half")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_files_written_beside_a_file_are_moved_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, replace = [], os.replace

    def watched(source: Path, target: Path) -> None:
        moved.append(target.name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    with atomic_file(tmp_path / "a.mhd") as header:
        header.write_text("header")
        header.with_name("a.zraw").write_text("voxels")
    assert moved == ["a.zraw", "a.mhd"]
    assert names(tmp_path) == ["a.mhd", "a.zraw"]


def test_a_failing_disk_is_a_sentence_with_the_remedy_that_is_asked_for(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "")
    with pytest.raises(DataError, match=r"file/a.txt could not be written \(.+\); nothing was changed"):
        write_text(tmp_path / "file" / "a.txt", "")
    with pytest.raises(DataError, match=r"a.json could not be written \(.+\); buy a larger disk\."):
        write_json(tmp_path / "file" / "a.json", {}, remedy="buy a larger disk.")
    with pytest.raises(OSError):
        write_text(tmp_path / "file" / "a.txt", "", remedy=None)


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "export"
    for name in ("a", "b"):
        with atomic_folder(folder) as new:
            (new / name).write_text(name)
    assert names(folder) == ["b"]
    with pytest.raises(ZeroDivisionError), atomic_folder(folder) as new:
        (new / "c").write_text("c")
        raise ZeroDivisionError
    assert names(folder) == ["b"]

    def failing(source: Path, target: Path, replace=os.replace) -> None:
        if source.name == "new":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(DataError, match=r"\(Input/output error\); nothing was changed"), atomic_folder(folder):
        pass
    assert names(folder) == ["b"]
    assert names(folder.parent) == ["export"]


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".abc.partial").mkdir()
    (tmp_path / ".abc.partial" / "a.txt").write_text("half")
    (tmp_path / ".step_00000001.pt.partial").write_text("half")
    (tmp_path / "whole.txt").write_text("whole")
    (tmp_path / ".hidden").write_text("whole")
    remove_partial(tmp_path)
    assert names(tmp_path) == [".hidden", "whole.txt"]


def test_json_and_tables_read_back_as_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1, None], "a": "ä"}, indent=1)
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": "ä", "b": [1, None]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")}, allow_nan=False)
    write_csv(tmp_path / "a.csv", ["id", "reason"], [["x", None], ["caf\udce9", 'a "b", c']])
    assert (tmp_path / "a.csv").read_text() == 'id,reason\nx,\ncaf\\udce9,"a ""b"", c"\n'


def test_a_lock_is_held_by_one_and_falls_with_its_file(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "a") as first, open(tmp_path / "lock", "a") as second:
        assert try_lock(first.fileno())
        assert not try_lock(second.fileno())
        assert not try_lock(second.fileno(), patience_s=0.1)
        first.close()
        assert try_lock(second.fileno(), patience_s=1.0)


@pytest.mark.parametrize("read", [read_json, read_csv])
def test_a_pipe_in_place_of_a_list_is_refused_and_not_waited_for(tmp_path: Path, read: Callable[[str], object]) -> None:
    os.mkfifo(tmp_path / "cases.json")
    with pytest.raises(DataError, match=r"cases\.json: cannot be read.*no regular file"):
        read(str(tmp_path / "cases.json"))


def test_json_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(DataError, match=r"a\.json: cannot be read .one thing in another too many times"):
        read_json(str(tmp_path / "a.json"))


def test_folders_made_for_what_failed_go_and_a_full_disk_is_said_in_plain_words(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="no"), atomic_folder(tmp_path / "there" / "a" / "b" / "c"):
        raise ValueError("no")
    assert list((tmp_path / "there").iterdir()) == []
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with (
        pytest.raises(DataError, match=r"out could not be written \(No space left on device\); nothing was changed"),
        atomic_folder(tmp_path / "out"),
    ):
        raise RuntimeError(said)
