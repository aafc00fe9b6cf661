"""Where a crop lies among the crops of a grid, learned with a momentum teacher (after VoCo, Wu et al. 2024)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.backbones import Backbone, Encoder
from mim3d.caching.scan import CachedScan
from mim3d.core.types import Triple
from mim3d.loading.samples import Crop, Sample
from mim3d.methods.contract import Method
from mim3d.nn.blocks import Mlp
from mim3d.objective import Batch, Objective, StepOutput
from mim3d.training.schedule import Optimisation
from my_lab.views import drawn_view

#: Base crops along X and Y.
GRID = (2, 2)


@dataclass(frozen=True)
class GridSampler:
    """Base crops side by side, a random crop among them, and the share of it that each of them holds."""

    size: Triple

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        x, y, z = self.size
        spare = (scan.shape[0] - GRID[0] * x, scan.shape[1] - GRID[1] * y, scan.shape[2] - z)
        root = np.array([int(rng.integers(0, max(0, last) + 1)) for last in spare])
        bases = [root + np.array([column * x, row * y, 0]) for column in range(GRID[0]) for row in range(GRID[1])]
        place = root + np.array([int(rng.integers(0, x + 1)), int(rng.integers(0, y + 1)), 0])
        covered = [np.clip(np.array(self.size) - np.abs(place - base), 0, None).prod() for base in bases]
        return Sample(
            images={"base": tuple(self._read(base) for base in bases), "random": (self._read(place),)},
            arrays={"overlap": np.array(covered, dtype=np.float32) / np.prod(self.size)},
        )

    def _read(self, origin: np.ndarray) -> Crop:
        x, y, z = (int(voxel) for voxel in origin)
        return Crop((x, y, z), self.size, self.size)


class PlacesObjective(Objective):
    """A student, and a teacher that follows it."""

    def __init__(self, encoder: Encoder, dim: int, momentum: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.project = Mlp(sum(encoder.widths), dim, dim)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)
        self.teacher_project = copy.deepcopy(self.project).requires_grad_(False)
        self.momentum = momentum

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        base_BKCXYZ, overlap_BK = batch["base"], batch["overlap"]
        crops = drawn_view(batch["random"].flatten(0, 1), self.context.generator(base_BKCXYZ.device))
        bases = base_BKCXYZ.flatten(0, 1)
        student_BD, student_base = (self._vectors(self.encoder, self.project, volumes) for volumes in (crops, bases))
        with torch.no_grad():
            teacher_BD, teacher_base = (
                self._vectors(self.teacher, self.teacher_project, volumes) for volumes in (crops, bases)
            )
        pairs = ((student_BD, teacher_base), (teacher_BD, student_base))
        similarity_BK = torch.stack(
            [
                F.relu(F.cosine_similarity(crop_BD[:, None], base.unflatten(0, overlap_BK.shape), dim=-1))
                for crop_BD, base in pairs
            ]
        ).mean(0)
        distance_BK = (overlap_BK - similarity_BK).abs().clamp(max=1 - 1e-4)
        positive = -(overlap_BK * (1 - distance_BK).log()).sum() / overlap_BK.sum()
        negative = (similarity_BK.square() * (overlap_BK == 0)).mean()
        return StepOutput(positive + negative, {"loss/positive": positive.detach(), "loss/negative": negative.detach()})

    @staticmethod
    def _vectors(encoder: Encoder, project: Mlp, crops: Tensor) -> Tensor:
        return project(torch.cat([features.mean((2, 3, 4)) for features in encoder(crops)], dim=1))

    def after_step(self, progress: float) -> None:
        """The teacher's weights go a little of the way to the student's."""
        for teacher, student in ((self.teacher, self.encoder), (self.teacher_project, self.project)):
            for kept, new in zip(teacher.parameters(), student.parameters(), strict=True):
                kept.lerp_(new, 1 - self.momentum)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"places/random": batch["random"][0, 0, 0]}


@dataclass(frozen=True, kw_only=True)
class Places(Method):
    """Settings of the method."""

    size: Triple | None = None
    dim: int = 8
    momentum: float = 0.9

    @property
    def optimisation(self) -> Optimisation:
        return Optimisation(learning_rate=1e-3, weight_decay=0.1)

    def planned(self, backbone: Backbone, shapes: Sequence[Triple]) -> "Places":
        return replace(self, size=self.size or backbone.input_multiple)

    def summary(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        return [f"a crop of {self.size} voxels among {GRID[0] * GRID[1]} of a grid"]

    def sampler(self, backbone: Backbone) -> GridSampler:
        assert self.size is not None
        return GridSampler(self.size)

    def build(self, backbone: Backbone) -> Objective:
        return PlacesObjective(backbone.build(), self.dim, self.momentum)
