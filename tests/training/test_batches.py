"""Batches reach the device as they were read, and nothing waits for that."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mim3d.training import launch as launch_module
from mim3d.training.launch import on_device


class Recorder:
    """A CUDA that only writes down what it is asked to do."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.current = "compute"

    def Stream(self, device: torch.device) -> str:
        return "uploads"

    @contextmanager
    def stream(self, name: str) -> Iterator[None]:
        before, self.current = self.current, name
        yield
        self.current = before

    def current_stream(self, device: torch.device) -> Any:
        return SimpleNamespace(name=self.current, wait_stream=lambda other: self.done.append(f"compute waits, {other}"))


class Uploaded:
    """A tensor of a batch on its way."""

    def __init__(self, recorder: Recorder, number: int) -> None:
        self._recorder, self.number = recorder, number

    def record_stream(self, stream: Any) -> None:
        self._recorder.done.append(f"{self.number} is kept for {stream.name}")


def test_on_a_gpu_batches_travel_on_a_stream_of_their_own_and_the_step_waits_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(launch_module, "_cuda", recorder)

    def read() -> Iterator[Any]:
        for number in range(3):
            # The loader's ring records its events here.
            recorder.done.append(f"{number} is asked for on {recorder.current}")
            yield number

    def to_device(number: int) -> dict[str, Uploaded]:
        recorder.done.append(f"{number} is uploaded on {recorder.current}")
        return {"x": Uploaded(recorder, number)}

    fabric: Any = SimpleNamespace(device=torch.device("cuda"), to_device=to_device)
    batches = on_device(fabric, read())
    assert next(batches)["x"].number == 0
    recorder.done.append("step 0")
    assert next(batches)["x"].number == 1
    one = ["0 is asked for on uploads", "0 is uploaded on uploads", "compute waits, uploads", "0 is kept for compute"]
    assert recorder.done == [*one, "step 0", *(line.replace("0 is", "1 is") for line in one)]


def test_on_a_cpu_batches_pass_through() -> None:
    fabric: Any = SimpleNamespace(device=torch.device("cpu"), to_device=lambda batch: batch)
    batch = {"x": torch.rand(2)}
    assert next(on_device(fabric, iter([batch]))) is batch


@pytest.mark.gpu
def test_uploaded_batches_are_those_that_were_read() -> None:
    device = torch.device("cuda")
    fabric: Any = SimpleNamespace(
        device=device,
        to_device=lambda batch: {name: value.to(device, non_blocking=True) for name, value in batch.items()},
    )
    read = [{"x": torch.full((2**22,), float(number)).pin_memory()} for number in range(20)]
    sums = [batch["x"].sum() for batch, _ in zip(on_device(fabric, iter(read)), range(19), strict=False)]
    assert [float(total) for total in sums] == [number * 2.0**22 for number in range(19)]
