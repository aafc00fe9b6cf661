"""What a plan asks about memory, answered by steps of the real network on fake tensors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from mim3d.backbones import Backbone
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import Mim3dError
from mim3d.core.types import Triple
from mim3d.planning.patch import FILLED_SHARE
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.training.memory import StepMemory, can_be_known, usable_bytes
from mim3d.training.schedule import Optimisation
from mim3d.workflows.finetune.settings import FinetuneSettings


@dataclass(frozen=True)
class _Shape:
    """All of a scan that its validation is measured by."""

    shape: Triple


@dataclass
class TrainingMemory:
    """What training needs, from dry runs on fake tensors; each patch is asked about once.

    Attributes:
        usable_bytes: Bytes that training may take.
    """

    usable_bytes: int | None
    task: Segmentation
    recipe: Backbone
    labels: Mapping[int, str]
    settings: FinetuneSettings
    optim: Optimisation
    validation_bytes: int
    _steps: dict[Triple, StepMemory] = field(default_factory=dict)

    def need_bytes(self, patch_size: Triple, batch_size: int) -> int:
        """Bytes of a step, or of a validation on the CPU where that takes more."""
        import torch

        if patch_size not in self._steps:
            sample = {
                "image": ((1, self.recipe.in_channels, *patch_size), torch.float32),
                "label": ((1, *patch_size), torch.int64),
            }
            self._steps[patch_size] = StepMemory(
                lambda: self.task.build(self.recipe, self.labels), sample, self.settings.loop(1), self.optim
            )
        step = self._steps[patch_size]
        try:
            need = step.need(batch_size, self.settings.accumulation).total
            # Validation's network takes no more than a step, so that most often nothing has to be asked about it.
            if step.device == "cpu" and need + self.validation_bytes > FILLED_SHARE * (self.usable_bytes or math.inf):
                need = max(need, step.need(1, 1).total + self.validation_bytes if self.validation_bytes else 0)
        except Mim3dError:
            raise
        except Exception:
            # A backbone of the user's own may look at values, which fake tensors do not have; it may train all the
            # same.
            return 0
        return need


def training_memory(
    task: Segmentation,
    recipe: Backbone,
    labels: Mapping[int, str],
    settings: FinetuneSettings,
    held_out: Sequence[Triple],
) -> TrainingMemory | None:
    """Answers about memory; None where the user wants no check or nothing can be known.

    Args:
        task: The task as asked for.
        recipe: Settings of the encoder.
        labels: Label value -> name.
        settings: Settings of fine-tuning; the task fills in what its optimiser leaves open.
        held_out: Voxels of each scan to validate on.
    """
    loop = settings.loop(1)
    if settings.memory_limit == 0 or not can_be_known(loop):
        return None
    limit = None if settings.memory_limit is None else int(settings.memory_limit * 2**30)
    largest = [cast(CachedScan, _Shape(shape)) for shape in sorted(held_out, key=math.prod)[-1:]]
    return TrainingMemory(
        usable_bytes=usable_bytes(loop, limit),
        task=task,
        recipe=recipe,
        labels=labels,
        settings=settings,
        optim=settings.optim.filled_from(task.optimisation),
        validation_bytes=task.validation_bytes(largest, labels),
    )
