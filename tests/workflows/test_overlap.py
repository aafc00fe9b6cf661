"""Three stages that overlap: as if one item came after the other, but for the time."""

import threading
import time
import warnings
from collections.abc import Callable

import pytest

from mim3d.core import resources
from mim3d.core.errors import DataError, TooLargeError
from mim3d.core.warned import recording, silenced
from mim3d.workflows.shared.overlap import Stages, run_overlapped


class Recorded(Stages[int, int, int, int]):
    """Adds one in every stage, and keeps what happens; hooks by the name of a stage run before it, in its thread."""

    def __init__(self, **hooks: Callable[[int], None]) -> None:
        self.hooks = hooks
        self.events: list[tuple[str, int]] = []
        self.threads: dict[str, set[int]] = {}
        self.results: dict[int, int | Exception] = {}

    def _did(self, stage: str, item: int) -> None:
        self.threads.setdefault(stage, set()).add(threading.get_ident())
        self.hooks.get(stage, lambda item: None)(item)
        self.events.append((stage, item))

    def prepare(self, item: int) -> int:
        self._did("prepare", item)
        return 10 * item + 1

    def compute(self, item: int, ready: int) -> int:
        self._did("compute", item)
        return ready + 1

    def finish(self, item: int, done: int) -> int:
        self._did("finish", item)
        return done + 1

    def record(self, item: int, result: int | Exception) -> None:
        self._did("record", item)
        self.results[item] = result


def test_the_stages_of_neighbours_run_at_the_same_time_in_three_threads():
    # Each stage waits until the others have begun with their own items: without overlap nobody would ever meet.
    meeting = threading.Barrier(3, timeout=20)

    def meet(stage: str) -> Callable[[int], None]:
        place = ("finish", "compute", "prepare").index(stage)
        return lambda item: meeting.wait() and None if item == 1 + place else None

    stages = Recorded(**{stage: meet(stage) for stage in ("prepare", "compute", "finish")})
    run_overlapped(range(6), stages)
    assert stages.results == {item: 10 * item + 3 for item in range(6)}
    assert [item for stage, item in stages.events if stage == "record"] == list(range(6))
    threads = [stages.threads[stage] for stage in ("prepare", "compute", "finish", "record")]
    assert threads[1] == {threading.get_ident()} and threads[2] == threads[3]
    assert len(set.union(*threads)) == 3


def test_no_more_than_one_item_is_ahead_and_one_behind():
    stages = Recorded(compute=lambda item: time.sleep(0.002), finish=lambda item: time.sleep(0.004))
    run_overlapped(range(8), stages)
    at = {event: place for place, event in enumerate(stages.events)}
    for item in range(2, 8):
        assert at["compute", item - 2] < at["prepare", item]
        assert at["record", item - 2] < at["compute", item] or at["record", item - 2] < at["finish", item - 1]


@pytest.mark.parametrize("stage", ["prepare", "compute", "finish"])
def test_an_error_of_any_stage_is_the_items_own_and_recorded_in_its_turn(stage):
    def fail(item: int) -> None:
        if item in (0, 2, 3):
            raise ValueError(str(item))

    stages = Recorded(**{stage: fail})
    run_overlapped(range(5), stages)
    assert list(stages.results) == list(range(5))
    assert {item: str(error) for item, error in stages.results.items() if isinstance(error, Exception)} == {
        0: "0",
        2: "2",
        3: "3",
    }
    assert stages.results[1] == 13 and stages.results[4] == 43


@pytest.mark.parametrize("items", [0, 1, 2])
def test_few_items_are_done_as_well(items):
    stages = Recorded()
    run_overlapped(range(items), stages)
    assert stages.results == {item: 10 * item + 3 for item in range(items)}


def test_an_error_of_what_records_ends_the_run():
    def full(item: int) -> None:
        if item == 1:
            raise DataError("the disk is full")

    stages = Recorded(record=full)
    with pytest.raises(DataError, match="the disk is full"):
        run_overlapped(range(50), stages)
    assert set(stages.results) == {0} and ("compute", 4) not in stages.events


def test_an_interruption_loses_nothing_that_was_computed_and_leaves_no_thread():
    def interrupt(item: int) -> None:
        if item == 3:
            raise KeyboardInterrupt

    stages, num_threads = Recorded(compute=interrupt, finish=lambda item: time.sleep(0.05)), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        run_overlapped(range(50), stages)
    assert set(stages.results) == {0, 1, 2} and threading.active_count() == num_threads
    assert ("prepare", 5) not in stages.events


def test_what_a_thread_warns_of_is_shown_in_the_turn_of_its_item_and_recorded():
    def warn(stage: str) -> Callable[[int], None]:
        return lambda item: warnings.warn(f"{stage} {item}", UserWarning, stacklevel=1)

    shown = warnings.showwarning
    with recording() as kept, pytest.warns(UserWarning) as said:
        # Warnings of mim3d are told by their file.
        stages = Recorded(**{stage: warn(stage) for stage in ("prepare", "compute", "finish")})
        run_overlapped(range(3), stages)
    assert warnings.showwarning is shown and kept.rows == []
    texts = [str(warning.message) for warning in said]
    assert sorted(texts) == sorted(f"{stage} {item}" for stage in ("prepare", "compute", "finish") for item in range(3))
    for item in range(3):
        order = [texts.index(f"{stage} {item}") for stage in ("prepare", "compute", "finish")]
        assert order == sorted(order)
    assert {warning.filename for warning in said} == {__file__}


def test_a_thread_that_is_silent_silences_no_other():
    both = threading.Barrier(2, timeout=20)

    def silent(item: int) -> None:
        if item == 1:
            with silenced():
                both.wait()
                warnings.warn("quoted from a file", stacklevel=1)
                both.wait()

    def loud(item: int) -> None:
        if item == 0:
            both.wait()
            warnings.warn("of the network", stacklevel=1)
            both.wait()

    with pytest.warns(UserWarning) as said:
        run_overlapped(range(2), Recorded(prepare=silent, compute=loud))
    assert [str(warning.message) for warning in said] == ["of the network"]


def test_an_item_that_lacks_memory_beside_others_is_done_again_alone(monkeypatch):
    monkeypatch.setattr(resources, "total_memory_bytes", lambda: 1000)
    monkeypatch.setattr(resources, "_fields", lambda path: {})
    monkeypatch.setattr(resources, "_left_in_groups", lambda root: iter(()))
    told: list[tuple[int, int | None]] = []
    events: list[tuple[str, int]] = []

    def read(item: int) -> None:
        told.append((item, resources.available_memory_bytes()))
        if item == 2 and told[-1][1] != 1000:
            raise TooLargeError("more than a share")

    def score(item: int) -> None:
        if item == 4 and [event for event in events if event == ("compute", 4)] == []:
            events.append(("compute", 4))
            raise MemoryError

    stages = Recorded(prepare=read, compute=score)
    run_overlapped(range(6), stages)
    assert stages.results == {item: 10 * item + 3 for item in range(6)}
    assert told[:2] == [(0, 1000), (1, 250)] and (2, 250) in told and (2, 1000) in told
    # What is done again is read again, and so is the item after it, which was dropped.
    assert [item for item, _ in told].count(4) == 2 and [item for item, _ in told].count(5) == 2


def test_an_item_too_large_for_all_of_the_memory_fails_and_is_not_tried_for_ever():
    def fail(item: int) -> None:
        if item == 1:
            raise TooLargeError("too large")

    for stage in ("prepare", "compute"):
        stages = Recorded(**{stage: fail})
        run_overlapped(range(3), stages)
        assert isinstance(stages.results[1], TooLargeError) and stages.results[2] == 23
    with_one = Recorded(compute=lambda item: (_ for _ in ()).throw(MemoryError()))
    run_overlapped([7], with_one)
    assert isinstance(with_one.results[7], MemoryError) and with_one.threads["prepare"] != {threading.get_ident()}
