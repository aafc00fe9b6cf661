"""``--precision auto``: what it came to is said, kept with the run, and the same for all its sessions and processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mim3d.commands.finetune import finetune
from mim3d.commands.pretrain import pretrain
from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import read_run
from mim3d.distributed.processes import Processes, ProcessRank
from mim3d.training import precision
from mim3d.training.precision import PrecisionChoice
from mim3d.training.schedule import Optimisation
from mim3d.workflows.finetune.settings import FinetuneSettings
from tests.commands.conftest import BACKBONE, TASK
from tests.commands.test_pretrain import METHOD

SPEEDUPS = {"matrix products": 3.5, "dense convolutions": 1.6, "depth-wise convolutions": 1.0}
NARROW = PrecisionChoice("bf16-mixed", "measured: 3.5x in matrix products", SPEEDUPS)
SHARED = {"backbone": BACKBONE, "max_steps": 1, "num_workers": 0, "accelerator": "cpu"}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The devices that auto was asked about; bfloat16 is faster on all of them."""
    asked: list[str] = []
    monkeypatch.setattr(precision, "choose_precision", lambda accelerator: asked.append(accelerator) or NARROW)
    yield asked


def fine_tuned(data: Path, out: Path, **changes: object) -> Path:
    optim = Optimisation(learning_rate=1e-3)
    return Path(finetune(str(data), str(out), **{**SHARED, "task": TASK, "num_folds": 3, "optim": optim, **changes}))


def pretrained(data: Path, out: Path, **changes: object) -> Path:
    optim = Optimisation(learning_rate=1e-3)
    return Path(pretrain(str(data), str(out), **{**SHARED, "method": METHOD, "optim": optim, **changes}))


@pytest.mark.parametrize("command", [pretrained, fine_tuned])
def test_the_choice_is_said_and_kept_and_a_run_that_goes_on_never_measures_again(
    ball_set, tmp_path, measured, monkeypatch, capsys, command
):
    run = command(ball_set, tmp_path / "run")
    assert measured == ["cpu"]
    said = " ".join(capsys.readouterr().out.split())
    assert "precision: bf16-mixed (auto; measured: 3.5x in matrix products)" in said
    record = read_run(run)
    assert record.config["precision"] == record.manifest["settings"]["precision"] == "bf16-mixed"
    derived = record.manifest["derived"]
    assert derived["precision"] == "bf16-mixed"
    assert derived["precision_choice"] == {"precision": "bf16-mixed", "reason": NARROW.reason, "speedups": SPEEDUPS}

    # On another machine, which is not good at it.
    monkeypatch.setattr(precision, "choose_precision", lambda accelerator: PrecisionChoice("32-true", "slow"))
    for asked in ({}, {"precision": "auto"}, {"precision": "bf16-mixed"}):
        command(ball_set, run, resume=True, **asked)
    record = read_run(run)
    assert record.config["precision"] == "bf16-mixed"
    assert record.manifest["derived"]["precision_choice"]["speedups"] == SPEEDUPS
    with pytest.raises(ConfigError, match="precision was 'bf16-mixed' and is now '32-true'"):
        command(ball_set, run, resume=True, precision="32-true")


def test_a_precision_that_is_given_is_not_measured_and_goes_on_where_auto_is_the_default(ball_set, tmp_path, measured):
    run = fine_tuned(ball_set, tmp_path / "run", precision="32-true")
    fine_tuned(ball_set, tmp_path / "run", resume=True)
    assert measured == []
    record = read_run(run)
    assert record.config["precision"] == "32-true"
    assert "precision_choice" not in record.manifest["derived"]


def test_all_folds_compute_as_the_first_one(ball_set, tmp_path, measured):
    out = fine_tuned(ball_set, tmp_path / "folds", fold="all")
    assert measured == ["cpu"]
    configs = [read_run(out / f"fold_{fold}").config for fold in range(3)]
    assert [config["precision"] for config in configs] == ["bf16-mixed"] * 3
    assert "precision: bf16-mixed" in (out / "config.yaml").read_text()


def test_the_memory_of_a_run_is_that_of_the_precision_that_auto_came_to(ball_set, tmp_path, measured):
    runs = [read_run(pretrained(ball_set, tmp_path / name, precision=name)) for name in ("auto", "32-true")]
    narrow, wide = (run.manifest["derived"]["memory_need_bytes"]["activations"] for run in runs)
    assert narrow < wide


@pytest.mark.parametrize("command", [pretrained, fine_tuned])
def test_a_precision_that_the_device_lacks_is_refused_before_the_data_are_read(tmp_path, monkeypatch, command):
    monkeypatch.setattr(precision, "_computes_in", lambda dtype, device: False)
    with pytest.raises(ConfigError, match="precision is 'bf16-mixed', but cpu does not compute in bfloat16; use --pre"):
        command(tmp_path / "no data", tmp_path / "run", precision="bf16-mixed")
    assert not (tmp_path / "run").exists()


class Store(dict):
    """A key-value store, as processes that torchrun has started share one."""

    def check(self, names: list[str]) -> bool:
        return all(name in self for name in names)

    def set(self, name: str, value: str) -> None:
        self[name] = value.encode()

    get = dict.__getitem__


def processes(rank: int, store: Store | None) -> Processes:
    return Processes(ProcessRank("torchrun", rank, rank, 0, 2, 1), store)


def test_processes_take_the_choice_of_the_first(tmp_path, measured, monkeypatch):
    settings, store = FinetuneSettings("none", str(tmp_path), accelerator="cpu", devices=2), Store()
    first, noted = settings.on_machine(processes(0, store), settings.out)
    assert noted["precision_choice"]["precision"] == first.precision == "bf16-mixed"
    monkeypatch.setattr(precision, "choose_precision", lambda accelerator: PrecisionChoice("32-true", "slow"))
    second, noted = settings.on_machine(processes(1, store), settings.out)
    assert (second.precision, noted) == ("bf16-mixed", {})


def test_processes_that_are_started_later_take_the_choice_from_the_run(ball_set, tmp_path, measured, monkeypatch):
    run = fine_tuned(ball_set, tmp_path / "run")
    monkeypatch.setattr(precision, "choose_precision", lambda accelerator: PrecisionChoice("32-true", "slow"))
    settings = FinetuneSettings(str(ball_set), str(run), accelerator="cpu", devices=2)
    assert settings.on_machine(processes(1, None), settings.out)[0].precision == "bf16-mixed"
