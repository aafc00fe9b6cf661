"""One run on several processes and machines, however they are started: the numbers of one process."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from mim3d.cli import COMMANDS
from mim3d.cli.arguments import command_arguments, split_line
from mim3d.core.errors import TO_BE_CONTINUED, ConfigError, Mim3dError
from mim3d.core.run_folder import read_run
from mim3d.core.settings import write_yaml
from mim3d.distributed.processes import Processes, ProcessRank, choose_processes, launched_rank
from mim3d.training.checkpoint import read_checkpoint
from mim3d.training.settings import LoopSettings
from tests.distributed import uneven_training
from tests.distributed.launching import (
    MIM3D,
    SUBNET,
    TORCHRUN,
    ended,
    machines,
    plain_environment,
    srun,
    start,
    step_variables,
)
from tests.distributed.uneven_training import UnevenObjective, uneven_run
from tests.labelled import write_ball_set

ROOT = Path(__file__).parents[2]
TORCHRUN_VARIABLES = {
    "TORCHELASTIC_RUN_ID": "none",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "6",
    "GROUP_WORLD_SIZE": "3",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a launcher."""
    kept = plain_environment()
    for name in [name for name in os.environ if name not in kept]:
        monkeypatch.delenv(name)
    return monkeypatch


def setting(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher_there_is_one_process_or_as_many_as_given(alone: pytest.MonkeyPatch) -> None:
    assert launched_rank() is None
    assert choose_processes(None, None) == (1, 1)
    assert choose_processes(4, None) == (4, 1)
    with pytest.raises(
        ConfigError, match=r"num_nodes is 2.+torchrun or srun, or set MASTER_ADDR, MASTER_PORT, NODE_RANK"
    ):
        choose_processes(4, 2)


def test_torchrun_says_how_many_processes_there_are(alone: pytest.MonkeyPatch) -> None:
    setting(alone, TORCHRUN_VARIABLES)
    assert launched_rank() == ProcessRank("torchrun", rank=3, local_rank=1, node_rank=1, devices=2, num_nodes=3)
    assert choose_processes(None, None) == choose_processes(2, 3) == (2, 3)
    with pytest.raises(ConfigError, match=r"devices is 4, but torchrun has started 2 processes on each of 3 machines;"):
        choose_processes(4, None)
    one_machine = {"WORLD_SIZE": "2", "RANK": "1", "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    setting(alone, {**TORCHRUN_VARIABLES, **one_machine})
    with pytest.raises(ConfigError, match="2 processes on each of 1 machine;"):
        choose_processes(4, None)
    setting(alone, {**TORCHRUN_VARIABLES, "WORLD_SIZE": "5"})
    with pytest.raises(ConfigError, match="the same --nproc_per_node"):
        launched_rank()


def test_srun_says_how_many_processes_there_are(alone: pytest.MonkeyPatch) -> None:
    setting(alone, step_variables(3, tasks=4, nodes=2, job=7))
    assert launched_rank() == ProcessRank("srun", rank=3, local_rank=1, node_rank=1, devices=2, num_nodes=2)
    with pytest.raises(ConfigError, match=r"num_nodes is 4, but srun has started"):
        choose_processes(None, 4)
    alone.setenv("SLURM_STEP_TASKS_PER_NODE", "3,1")
    with pytest.raises(ConfigError, match="--ntasks-per-node instead of --ntasks"):
        launched_rank()


def test_a_shell_inside_an_allocation_is_no_task_and_forgetting_srun_is_told(alone: pytest.MonkeyPatch) -> None:
    setting(alone, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
    with pytest.warns(UserWarning, match="room for 8 tasks.+put srun before mim3d"):
        assert choose_processes(None, None) == (1, 1)
    assert choose_processes(4, None) == (4, 1)
    setting(alone, {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert launched_rank() is None


def pair() -> tuple[Processes, Processes]:
    store = HashStore()
    places = [ProcessRank("torchrun", rank, rank, 0, 2, 1) for rank in range(2)]
    return Processes(places[0], store), Processes(places[1], store)


def test_others_hear_what_the_first_has_made_and_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = pair()
    first.announce("cache", "1234")
    assert second.wait_for("cache") == "1234"
    monkeypatch.setattr("mim3d.distributed.processes._FAREWELL_S", 0.0)
    first.fail("OUT holds a run already.")
    with pytest.raises(Mim3dError, match=r"process 1 ends because another one has failed: OUT holds a run already\."):
        second.wait_for("scans")


def test_processes_meet_once_all_are_there_and_hear_of_one_that_is_not_coming() -> None:
    first, second = pair()
    other = threading.Thread(target=second.barrier)
    other.start()
    first.barrier()
    other.join(timeout=10)
    assert not other.is_alive()
    first, second = pair()
    second.fail("no such cache here")
    with pytest.raises(Mim3dError, match="no such cache here"):
        first.barrier()


def test_processes_that_start_once_all_is_made_wait_for_nothing() -> None:
    assert Processes(ProcessRank("mim3d", 1, 1, 0, 2, 1), None).wait_for("cache") is None


def test_the_strategy_that_was_removed_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ConfigError, match=r"strategy is 'fsdp', which was removed; use ddp, .* --backbone\.recompute true"
    ):
        LoopSettings(max_steps=1, devices=2, strategy="fsdp")


@pytest.mark.parametrize("name", ["devices", "num_nodes"])
def test_a_number_of_processes_below_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0; it must be at least 1"):
        choose_processes(**{"devices": None, "num_nodes": None, name: 0})


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_run(run).metrics if "loss" in line]


def uneven(out: Path, **settings: Any) -> list[dict[str, torch.Tensor]]:
    """Train in two processes; the weights that each ends with."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, uneven_training.__file__, str(out), json.dumps({"devices": 2, **settings})]
    ((code, output),) = ended([start(command)], timeout_s=120)
    assert code == 0, output
    return [torch.load(out / f"final_{rank}.pt", weights_only=True) for rank in range(2)]


def assert_close(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-4, atol=1e-6)


def test_parameters_that_are_not_used_or_only_sometimes_change_nothing_about_two_processes(tmp_path: Path) -> None:
    whole = uneven_run(tmp_path / "one", accumulation=4).state_dict()
    for weights in uneven(tmp_path / "two", accumulation=2):
        assert_close(weights, whole)
        assert torch.equal(weights["never"], torch.ones(5))
        assert not torch.equal(weights["extra.weight"], UnevenObjective().extra.weight)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_checkpoints_of_two_processes_hold_what_those_of_one_do(tmp_path: Path) -> None:
    whole = uneven_run(tmp_path / "one", accumulation=2, sometimes=False).state_dict()
    for weights in uneven(tmp_path / "two", sometimes=False, pictures_every=3):
        assert_close(weights, whole)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    files = [f"checkpoints/{name}" for name in ("step_00000003.pt", "step_00000006.pt", "best_00000006.pt")]
    one, two = ([read_checkpoint(tmp_path / run / file) for file in files] for run in ("one", "two"))
    for single, several in zip(one, two, strict=True):
        assert_close(several["objective"], single["objective"])
    for index, moments in one[1]["optimizer"]["state"].items():
        assert_close(two[1]["optimizer"]["state"][index], moments)


LEVELS = [
    {"name": "coarse", "footprint": [16, 16, 16], "size": [16, 16, 16], "mask_ratio": 0.5, "num_children": 2},
    {"name": "middle", "footprint": [8, 8, 8], "size": [16, 16, 16], "mask_ratio": 0.5},
]
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a tiny pre-training run on six scans."""
    folder = tmp_path_factory.mktemp("scaling")
    settings = {
        "data": str(write_ball_set(folder / "balls")),
        "method": {"name": "MiM", "levels": LEVELS, **DECODER},
        "backbone": {"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2},
        "optim": {"learning_rate": 1e-3},
        "max_steps": 3,
        "log_every": 1,
        "accelerator": "cpu",
        "precision": "32-true",
        "memory_limit": 0,
    }
    write_yaml(folder / "config.yaml", settings)
    return folder / "config.yaml"


def pretraining(config: Path, out: Path, **flags: object) -> list[str]:
    words = ["pretrain", "--config", str(config), "--out", str(out)]
    return [*words, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def reference(config: Path) -> list[float]:
    """Losses of one process with all samples of a step."""
    out = config.parent / "one"
    ((code, output),) = ended([start([*MIM3D, *pretraining(config, out, batch_size=1, accumulation=4)])])
    assert code == 0, output
    return losses(out)


def assert_same(config: Path, out: Path, reference: Sequence[float], ends: Sequence[tuple[int, str]]) -> None:
    said = "\n".join(output for _, output in ends)
    assert all(code == 0 for code, _ in ends), said
    assert "find_unused_parameters" not in said
    assert "GLOBAL_RANK" not in said
    assert losses(out) == pytest.approx(reference, rel=1e-5)
    assert (out / "encoder" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_the_command_starts_its_processes_itself(
    config: Path, reference: list[float], tmp_path: Path, devices: int
) -> None:
    words = pretraining(config, tmp_path / "run", devices=devices, accumulation=4 // devices)
    assert_same(config, tmp_path / "run", reference, ended([start([*MIM3D, *words])]))


@pytest.mark.slow
def test_why_a_run_stopped_is_said_by_the_first_process_alone(config: Path, tmp_path: Path) -> None:
    words = pretraining(config, tmp_path / "run", devices=2, max_steps=100_000, max_time="00:00:01")
    ((code, output),) = ended([start([*MIM3D, *words])])
    assert code == TO_BE_CONTINUED, output
    assert output.count("warning (unfinished)") == 1


@pytest.mark.slow
def test_torchrun_starts_the_processes(config: Path, reference: list[float], tmp_path: Path) -> None:
    words = pretraining(config, tmp_path / "run", accumulation=2)
    command = [*TORCHRUN, "--standalone", "--nproc_per_node", "2", "-m", "mim3d", *words]
    assert_same(config, tmp_path / "run", reference, ended([start(command)]))


@pytest.mark.slow
def test_srun_starts_the_processes(config: Path, reference: list[float], tmp_path: Path) -> None:
    ends = ended(srun([*MIM3D, *pretraining(config, tmp_path / "run")], tasks=4, nodes=2))
    assert_same(config, tmp_path / "run", reference, ends)
    # All of them began with the data; the first alone made the cache and the words about it.
    assert sum("hierarchy:" in output for _, output in ends) == 1


@pytest.mark.slow
def test_four_machines_train_together(config: Path, reference: list[float], tmp_path: Path) -> None:
    words = pretraining(config, tmp_path / "run")
    meeting = ["--master_addr", f"{SUBNET}.1", "--master_port", "29511", "--nnodes", "4", "--nproc_per_node", "1"]
    try:
        with machines(4) as hosts:
            processes = [
                start(
                    [*host, *TORCHRUN, *meeting, "--node_rank", str(rank), "-m", "mim3d", *words],
                    GLOO_SOCKET_IFNAME="eth0",
                )
                for rank, host in enumerate(hosts)
            ]
            ends = ended(processes)
    except OSError as error:
        pytest.skip(f"no network namespaces here: {error}")
    assert_same(config, tmp_path / "run", reference, ends)


@pytest.mark.slow
def test_when_the_first_process_is_refused_the_others_say_why(config: Path, reference: list[float]) -> None:
    ends = ended(srun([*MIM3D, *pretraining(config, config.parent / "one")], tasks=2), timeout_s=120)
    assert [code for code, _ in ends] == [2, 2]
    assert all("holds a run of mim3d pretrain already" in output for _, output in ends)
    assert "process 1 ends because another one has failed" in ends[1][1]
    assert losses(config.parent / "one") == reference


@pytest.mark.slow
def test_a_cache_that_another_machine_does_not_see_is_told(config: Path, tmp_path: Path) -> None:
    # Relative to the folder where a process starts, as a disk of its own is to a machine.
    homes = [tmp_path / name for name in ("first", "second")]
    impatient = (
        "import sys, mim3d.workflows.shared.inputs as inputs; from mim3d.cli import main; "
        "inputs.SHARED_DISK_PATIENCE_S = 1; "
        "sys.exit(main())"
    )
    processes = []
    for rank, home in enumerate(homes):
        home.mkdir()
        at_home = ["env", "-C", str(home), sys.executable, "-c", impatient]
        processes.append(start([*at_home, *pretraining(config, Path("run"))], **step_variables(rank, 2, 2, 4711)))
    ends = ended(processes, timeout_s=120)
    assert ends[1][0] == 2
    assert "in a folder that all machines share" in ends[1][1]
    assert ends[0][0] != 0


def test_the_batch_script_is_a_script_whose_command_is_understood() -> None:
    script = ROOT / "docs" / "how-to" / "pretrain.sbatch"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    joined = script.read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in joined.splitlines() if line.startswith("srun ")]
    words = shlex.split(line[line.index("mim3d ") :])
    signature = COMMANDS[words[1]].signature(words[1])
    arguments = command_arguments(split_line(words[2:], signature), signature)
    assert arguments["resume"] is True
    assert "devices" not in arguments
    assert {"--requeue", "--open-mode=append", "--signal=USR1@300"} <= set(re.findall(r"^#SBATCH (\S+)", joined, re.M))


@pytest.mark.slow
def test_fine_tuning_runs_on_several_processes_too(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [
        "finetune",
        "--data",
        str(config.parent / "balls"),
        "--out",
        str(out),
        "--num_folds",
        "3",
        "--max_steps",
        "2",
    ]
    words += ["--task.patch_size", "16", "16", "16", "--task.feature_dim", "8", "--accelerator", "cpu"]
    words += ["--backbone", "hybrid_nano", "--log_every", "1", "--memory_limit", "0"]
    ends = ended(srun([*MIM3D, *words], tasks=2))
    assert [code for code, _ in ends] == [0, 0], ends
    assert len(losses(out)) == 2
    assert (out / "segmenter" / "model.safetensors").is_file()
    refused = ended(srun([*MIM3D, *words], tasks=2), timeout_s=120)
    assert [code for code, _ in refused] == [2, 2]
    assert all("holds a run of mim3d finetune already" in output for _, output in refused)
