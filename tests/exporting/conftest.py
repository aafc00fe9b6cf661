"""Small networks of every kind as exported folders, with weights drawn at random."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mim3d.backbones import BACKBONES, create_recipe
from mim3d.core.settings import to_named
from mim3d.tasks import TASKS, create_task
from mim3d.weights import save_network

BACKBONE = {
    "name": "hybrid",
    "widths": [8, 16],
    "depths": [1, 1],
    "num_heads": 2,
}
WINDOW = {"kind": "window", "window": [-160.0, 240.0]}
ZSCORE = {"kind": "zscore", "window": None}
LABELS = {0: "background", 2: "liver | left", 5: "tumour"}

#: Settings of a task by the folder that its network lies in.
TASK_OF = {
    "segmenter": {"name": "segmentation", "patch_size": [8, 8, 12], "feature_dim": 4},
    "classifier": {"name": "classification", "size": [8, 8, 8], "cube_mm": 16.0, "centre": "scan"},
}

#: Makes a run folder with one network: ``make(kind, **changes of the card)``.
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(kind: str, task: dict[str, Any] | None = None, channels: int = 1, **changes: Any) -> Path:
        torch.manual_seed(0)
        recipe = create_recipe({**(changes.pop("backbone", None) or BACKBONE), "in_channels": channels})
        card: dict[str, Any] = {
            "backbone": to_named(recipe, BACKBONES),
            "input_multiple": list(recipe.input_multiple),
            "orientation": "RAS+",
            "spacing_mm": None,
            "intensity": WINDOW,
            "data_digest": "ab" * 32,
            "mim3d_version": "0.1.0",
        }
        if kind == "encoder":
            module: torch.nn.Module = recipe.build()
        else:
            settings = create_task({**TASK_OF[kind], **(task or {})})
            labels = LABELS if kind == "segmenter" else {0: "benign", 1: "malign"}
            module = settings.build(recipe, labels)
            named = {str(value): name for value, name in labels.items()}
            card |= {"task": to_named(settings, TASKS), "labels": named, "step": 7, "scores": {"dice": 0.5}}
        # Norms that are all one would hide an operator that leaves them out.
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        run = tmp_path / "runs" / "patient_mueller"
        run.mkdir(parents=True)
        seen = run / "seen.json"
        seen.write_text('{"format": 1, "complete": true, "scans": []}')
        save_network(run / kind, module, {**card, **changes}, beside=[seen])
        return run

    return made
