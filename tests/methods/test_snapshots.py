"""The first three losses of every registered method and task, so that a refactoring that changes numbers is seen.

Where numbers are meant to change, or a method or task is new: ``python -m tests.methods.test_snapshots --renew``
writes ``snapshots.json`` again; what changed in it belongs into the change's own description.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mim3d.backbones import Hybrid, ViT
from mim3d.core.run_folder import Run, read_run
from mim3d.loading.loader import Loader
from mim3d.loading.samples import Augment, Sampler
from mim3d.methods import METHODS, create_method
from mim3d.objective import Objective
from mim3d.scans.intensity import Intensity
from mim3d.tasks import TASKS, create_task
from mim3d.training.loop import train
from mim3d.training.schedule import Optimisation
from mim3d.training.settings import LoopSettings
from tests.array_scans import ArrayScan, random_scan

SNAPSHOTS = Path(__file__).with_name("snapshots.json")
RENEW = "python -m tests.methods.test_snapshots --renew"
SUBJECTS = [*(f"method {name}" for name in sorted(METHODS)), *(f"task {name}" for name in sorted(TASKS))]

STEPS = 3
LABELS = {0: "background", 1: "left part", 3: "right part"}
RECIPE = Hybrid(widths=(8, 16), depths=(1, 1), num_heads=2)
#: A method is tried on the first that has what it needs.
RECIPES = (RECIPE, ViT(token_edge=8, width=24, depth=1, num_heads=2))
#: Other processors round otherwise: far below this after three steps.
RELATIVE = 1e-5
#: Cosines near 0 are sums of terms near 1.
ABSOLUTE = 1e-6
#: A spread is the deviation of numbers that are nearly equal.
RELATIVE_OF_SPREAD = 1e-2
#: What depends on the machine's speed, not on the numbers.
MACHINE = ("time_s", "samples_per_s", "data_wait_ratio", "memory_bytes")

Lines = list[dict[str, float]]


def scans() -> list[ArrayScan]:
    """Two labelled scans of noise around structures, the same on every machine."""
    made = []
    for index in range(2):
        scan = random_scan((32, 32, 32), seed=index, name=f"scan_{index}")
        scan.label = np.zeros(scan.shape, dtype=np.uint8)
        scan.label[6:14, 8:20, 8:20], scan.label[16:26, 8:20, 8:20] = 1, 3
        scan.image[0] += 400.0 * scan.label
        scan.class_locations = {value: np.argwhere(scan.label == value) for value in (1, 3)}
        scan.class_name = LABELS[(1, 3)[index]]
        made.append(scan)
    return made


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def built(subject: str) -> tuple[Objective, Sampler, Augment | None]:
    """The objective of a method or task with default settings on a tiny backbone, and how its samples come about."""
    kind, name = subject.split()
    torch.manual_seed(0)
    if kind == "method":
        decoder = {"decoder_dim": 12, "decoder_depth": 1, "decoder_num_heads": 2}
        method = create_method(name, {"name": "hybrid", **decoder})
        recipe = next(each for each in RECIPES if issubclass(each.encoder_class, method.needs))
        method = method.planned(recipe, [scan.shape for scan in scans()])
        return method.build(recipe), method.sampler(recipe), None
    task = create_task(name).checked(RECIPE).planned(RECIPE, scans(), LABELS)
    return task.build(RECIPE, LABELS), task.sampler(), task.augment()


def first_lines(subject: str, folder: Path) -> Lines:
    """Every named term of the first steps, as the training loop logs them."""
    with one_thread():
        objective, sampler, augment = built(subject)
        loader = Loader(scans(), sampler, Intensity(), batch_size=2, seed=0, augment=augment)
        run = Run.create(folder / "run", command="pretrain", settings={"seed": 0}, inputs={})
        loop = LoopSettings(max_steps=STEPS, log_every=1, accelerator="cpu", precision="32-true")
        train(objective, loader, run=run, loop=loop, optim=Optimisation(learning_rate=1e-3))
    return [{name: line[name] for name in line if name not in MACHINE} for line in read_run(run.path).metrics]


def kept() -> dict[str, Lines]:
    """The snapshots."""
    content: dict[str, Lines] = json.loads(SNAPSHOTS.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_first_losses_are_those_of_the_snapshot(subject: str, tmp_path: Path) -> None:
    assert subject in kept(), f"{subject} has no snapshot; make one by: {RENEW}"
    expected, lines = kept()[subject], first_lines(subject, tmp_path)
    assert len(lines) == len(expected) == STEPS
    for line, known in zip(lines, expected, strict=True):
        assert line.keys() == known.keys(), f"terms of {subject} came or went; if they were meant to: {RENEW}"
        spreads = {name: line.pop(name) for name in [*line] if name.startswith("spread/")}
        assert spreads == pytest.approx({name: known.pop(name) for name in spreads}, rel=RELATIVE_OF_SPREAD)
        assert line == pytest.approx(known, rel=RELATIVE, abs=ABSOLUTE), (
            f"{subject}: the numbers of step {known['step']} changed; if they were meant to: {RENEW}"
        )


def test_every_snapshot_is_of_something_registered() -> None:
    assert set(kept()) == set(SUBJECTS), f"renew by: {RENEW}"


def test_a_change_of_a_loss_in_the_sixth_digit_is_seen() -> None:
    known = kept()[SUBJECTS[0]][0]
    assert known != pytest.approx({**known, "loss": known["loss"] * (1 + 2 * RELATIVE)}, rel=RELATIVE, abs=ABSOLUTE)


def renew() -> None:
    """Write the snapshots of what there is now, and say whose numbers changed."""
    before: dict[str, Any] = kept() if SNAPSHOTS.is_file() else {}
    lines: dict[str, Lines] = {}
    for subject in SUBJECTS:
        with tempfile.TemporaryDirectory() as folder:
            lines[subject] = first_lines(subject, Path(folder))
        print(f"{subject}: {'as before' if lines[subject] == before.get(subject) else 'changed'}")
    SNAPSHOTS.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        sys.exit(f"usage: {RENEW}")
    renew()
