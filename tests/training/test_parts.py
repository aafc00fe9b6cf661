"""The loop's small parts: weight-decay groups, meter, stopping, seeds, epochs, display."""

import io
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mim3d.training.loop as loop_module
from mim3d.core.errors import ConfigError
from mim3d.core.progress import Progress
from mim3d.distributed.stopping import StopRequests
from mim3d.training.launch import launch, seed_step, usable_precision
from mim3d.training.meter import Meter, NonFiniteError, Throughput, summary
from mim3d.training.optim import build_optimizer, decay_groups
from mim3d.training.plan import steps_for_epochs
from mim3d.training.schedule import Optimisation, make_schedule
from mim3d.training.settings import LoopSettings
from tests.training.toy_training import ToyObjective, ToySource, toy_run

CPU = torch.device("cpu")


def test_weight_decay_spares_biases_norms_tokens_and_positions() -> None:
    objective = ToyObjective()
    objective.encoder.decomposition = nn.Linear(2, 2)  # type: ignore[assignment]
    objective.encoder.relative_position_bias_table = nn.Parameter(torch.zeros(3, 3))  # type: ignore[assignment]
    objective.head.bias.requires_grad_(False)
    decayed, plain = decay_groups(objective)
    assert set(decayed) == {"encoder.proj.weight", "encoder.decomposition.weight", "head.weight"}
    assert set(plain) == {
        *("encoder.mask_token", "encoder.position_embedding", "encoder.relative_position_bias_table"),
        *("encoder.proj.bias", "encoder.norm.weight", "encoder.norm.bias", "encoder.decomposition.bias"),
    }
    schedule = make_schedule(Optimisation(learning_rate=1.0, weight_decay=0.3), effective_batch=1, max_steps=1)
    groups = build_optimizer(objective, schedule).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.3, 3), (0.0, 7)]


def test_a_module_without_anything_to_decay_still_gets_an_optimizer() -> None:
    schedule = make_schedule(Optimisation(learning_rate=1.0), effective_batch=1, max_steps=1)
    assert len(build_optimizer(nn.LayerNorm(3), schedule).param_groups) == 1


def test_meter_averages_each_term_over_the_times_it_was_logged() -> None:
    meter = Meter(CPU)
    meter.add(1, {"loss": torch.tensor(1.0), "late": torch.tensor(4.0)})
    meter.add(2, {"loss": torch.tensor(3.0, dtype=torch.float64)})
    assert meter.read() == {"loss": 2.0, "late": 4.0}
    meter.reset()
    assert meter.read() == {}


def test_meter_goes_on_from_its_state_to_the_bit() -> None:
    values = torch.rand(9, generator=torch.Generator().manual_seed(0))
    whole, first, second = Meter(CPU), Meter(CPU), Meter(CPU)
    for step, value in enumerate(values):
        whole.add(step, {"loss": value})
        if step < 4:
            first.add(step, {"loss": value})
    second.restore(first.state(), rank=0)
    for step, value in enumerate(values[4:], start=4):
        second.add(step, {"loss": value})
    assert second.read() == whole.read()


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (("loss", "loss/align", "grad_norm"), ["loss/align"]),
        (("loss", "grad_norm"), ["loss"]),
        (("grad_norm",), ["grad_norm"]),
    ],
)
def test_meter_names_the_first_step_and_the_cause_not_what_followed(bad: tuple[str, ...], named: list[str]) -> None:
    meter = Meter(CPU)
    for step in range(1, 6):
        for names in (("loss", "loss/align"), ("grad_norm",)):
            terms = {name: torch.tensor(float("nan") if step >= 3 and name in bad else 1.0) for name in names}
            terms |= {name: torch.tensor(float("inf")) for name in names if step > 3}
            meter.add(step, terms)
    with pytest.raises(NonFiniteError) as error:
        meter.read()
    assert (error.value.step, error.value.terms) == (3, named)


class CountReads(TorchDispatchMode):
    """Counts the times that a number is fetched from a tensor, which is when a GPU would be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step, reads = loop_module._take_step, CountReads()

    def counted(*args: Any) -> Any:
        with reads:
            return take_step(*args)

    monkeypatch.setattr(loop_module, "_take_step", counted)
    # AdamW reads its step counts, which live on the CPU.
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with reads:
        assert float(torch.ones(())) == reads.count == 1
    toy_run(tmp_path / "run", accumulation=2)
    assert reads.count == 1


def test_throughput_counts_waiting_and_leaves_pauses_out() -> None:
    speed = Throughput(elapsed_s=100.0)
    speed.add_samples(6)
    with speed.waiting():
        time.sleep(0.03)
    with speed.paused():
        time.sleep(0.3)
    values = speed.read()
    assert values["samples_per_s"] > 30
    assert values["data_wait_ratio"] > 0.5
    assert values["time_s"] > 100.3


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_seeds_are_a_function_of_seed_step_and_rank() -> None:
    results = {}
    for key in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]:
        seed_step(*key)
        results[key] = draws()
        seed_step(*key)
        assert draws() == results[key]
    assert len({value for triple in results.values() for value in triple}) == 12


def test_epochs_become_enough_steps() -> None:
    source = ToySource(batch_size=3)
    assert steps_for_epochs(2, source, accumulation=2, devices=1, num_nodes=1) == 7
    assert steps_for_epochs(0.01, source, accumulation=2, devices=4, num_nodes=2) == 1
    assert steps_for_epochs(3, ToySource(4), accumulation=5, devices=1, num_nodes=1) == 3


def test_a_second_signal_seconds_later_ends_the_process() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequests(None) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason() == "SIGINT asked to stop"
        stop._signalled_at -= 10
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_readers_forked_from_the_trainer_leave_interrupts_to_it() -> None:
    with StopRequests(None) as stop:
        reader = os.fork()
        if reader == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == -signal.SIGTERM
        assert stop.reason() is None


def test_a_missing_accelerator_is_a_sentence() -> None:
    if torch.backends.mps.is_available():
        pytest.skip("this machine has what the test needs missing")
    with pytest.raises(ConfigError, match="'mps', but this machine shows no such device; use accelerator cpu"):
        launch(LoopSettings(max_steps=1, accelerator="mps"))


VALUES = {"loss": 0.5, "learning_rate": 1e-3, "samples_per_s": 12.0, "data_wait_ratio": 0.25}


def test_without_a_terminal_there_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("step {done}/{total}", 100, eager=True) as display:
        display.begin(0)
        for step in range(1, 101):
            display.advance(step)
            display.update(step, summary(VALUES))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/100", "step 100/100"]
    assert "loss 0.5000  lr 1.00e-03  12 samples/s  25% waiting for data" in lines[0]
    assert lines[0].endswith("left")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_a_bar_with_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with Progress("step {done}/{total}", 100, eager=True) as display:
        display.begin(40)
        display.say("a line [with] brackets")
        for step in range(41, 61):
            display.advance(step)
        display.update(60, summary(VALUES))
    text = terminal.getvalue()
    assert "a line [with] brackets" in text
    assert "60/100" in text
    assert "loss 0.5000" in text


def test_further_processes_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("step {done}/{total}", 2, eager=True, silent=True) as display:
        display.begin(0)
        display.say("hello")
        display.update(2, summary(VALUES))
    assert capsys.readouterr().err == ""


def test_a_gpu_without_bfloat16_trains_in_float16_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.warns(UserWarning, match="no bfloat16; precision 16-mixed"):
        assert usable_precision("bf16-mixed", "cuda") == "16-mixed"
    assert usable_precision("bf16-mixed", "cpu") == "bf16-mixed"
    assert usable_precision("32-true", "cuda") == "32-true"
