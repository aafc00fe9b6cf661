"""A process that crashes, is killed or hangs costs its item alone, and the true reason is said."""

import os
import signal
import time

import pytest

from mim3d.core import worker_processes
from mim3d.core.errors import DataError
from mim3d.core.resources import num_oom_kills
from mim3d.core.worker_processes import Ended, work_through


def act(item):
    """Do what the item says; a number is doubled."""
    if item == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "exit":
        os._exit(7)
    if item == "hang":
        time.sleep(60)
    return 2 * int(item)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_bad_items_are_named_with_what_happened_and_the_others_are_done(num_workers):
    items = ["1", "segfault", "2", "exit", "hang", "3", "kill", "4"]
    start = time.monotonic()
    found = dict(work_through(items, act, num_workers, timeout_s=3, place="here"))
    assert {item: found[item] for item in "1234"} == {"1": 2, "2": 4, "3": 6, "4": 8}
    assert str(found["segfault"]).startswith("crashed (SIGSEGV): the file makes a library fail")
    assert str(found["exit"]) == "ended with exit code 7; please report it"
    assert str(found["hang"]).startswith("was not done after 3 s; look at the file")
    assert str(found["kill"]).startswith("was killed")
    assert time.monotonic() - start < 40


def test_memory_is_named_only_where_the_system_says_that_it_ran_out():
    killed = -signal.SIGKILL
    assert "was killed, because it ran out of memory" in str(Ended(killed, 1.0, True))
    assert "perhaps because it ran out of memory" in str(Ended(killed, 1.0, None))
    assert "not for lack of memory" in str(Ended(killed, 1.0, False))
    assert "memory" not in str(Ended(-signal.SIGSEGV, 1.0, False))


def test_the_kills_that_the_system_counts_are_read(tmp_path):
    assert num_oom_kills(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "vmstat").write_text("pgfault 12\noom_kill 3\n")
    assert num_oom_kills(tmp_path) == 3


def test_items_that_all_end_their_process_end_the_work(monkeypatch):
    with pytest.raises(DataError, match="8 times out of 8 the process that works ended with exit code 7"):
        dict(work_through(["exit"] * 9, act, 4, place="here"))


def test_closing_ends_what_is_in_work(monkeypatch):
    monkeypatch.setattr(worker_processes, "_CLOSING_S", 0.5)
    working = work_through(["1", "hang"], act, 2, place="here")
    assert next(working) == ("1", 2)
    start = time.monotonic()
    working.close()
    assert time.monotonic() - start < 10
