"""Two views of a crop, made on the device, are told from those of other crops (SimCLR, Chen et al. 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass

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
from mim3d.objective import Batch, Objective, StepOutput, crop_tokens
from mim3d.training.schedule import Optimisation


def drawn_view(crops_BCXYZ: Tensor, generator: torch.Generator) -> Tensor:
    """Each crop flipped along axes of its own, brightened, and with noise; all drawn on the device of the crops."""
    device, batch = crops_BCXYZ.device, len(crops_BCXYZ)
    view = crops_BCXYZ
    for axis in (2, 3, 4):
        flipped_B = torch.rand(batch, generator=generator, device=device) < 0.5
        view = torch.where(flipped_B.reshape(-1, 1, 1, 1, 1), view.flip(axis), view)
    gain_B = 1 + 0.2 * torch.randn(batch, generator=generator, device=device)
    noise = torch.randn(view.shape, generator=generator, device=device)
    return view * gain_B.reshape(-1, 1, 1, 1, 1) + 0.1 * noise


@dataclass(frozen=True)
class AnyCrop:
    """One crop of a scan, anywhere."""

    size: Triple

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        spare = [max(0, voxels - edge) for voxels, edge in zip(scan.shape, self.size, strict=True)]
        x, y, z = (int(rng.integers(0, last + 1)) for last in spare)
        return Sample(images={"crop": (Crop((x, y, z), self.size, self.size),)})


class ViewsObjective(Objective):
    """Encoder, projection and cross-entropy over the other views of the batch."""

    def __init__(self, encoder: Encoder, dim: int, temperature: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.project = Mlp(encoder.widths[-1], encoder.widths[-1], dim)
        self.temperature = temperature

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        crops_BCXYZ = batch["crop"].flatten(0, 1)
        generator = self.context.generator(crops_BCXYZ.device)
        views = torch.cat([drawn_view(crops_BCXYZ, generator) for _ in range(2)])
        vectors_VD = F.normalize(self.project(self.encoder(views)[-1].mean((2, 3, 4))), dim=-1)
        logits_VV = vectors_VD @ vectors_VD.T / self.temperature
        itself_VV = torch.eye(len(views), dtype=torch.bool, device=views.device)
        other_V = torch.arange(len(views), device=views.device).roll(len(crops_BCXYZ))
        loss = F.cross_entropy(logits_VV.masked_fill(itself_VV, float("-inf")), other_V)
        return StepOutput(loss, {"loss/views": loss.detach()})


@dataclass(frozen=True, kw_only=True)
class TwoViews(Method):
    """Settings of the method; it is content with feature maps, whatever the backbone."""

    size: Triple | None = None
    dim: int = 8
    temperature: float = 0.2

    @property
    def optimisation(self) -> Optimisation:
        return Optimisation(learning_rate=1e-3, warmup_ratio=0.1)

    def planned(self, backbone: Backbone, shapes: Sequence[Triple]) -> "TwoViews":
        x, y, z = (2 * edge for edge in backbone.input_multiple)
        return TwoViews(size=self.size or (x, y, z), dim=self.dim, temperature=self.temperature)

    def summary(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        return [f"two views of crops of {self.size} voxels"]

    def sampler(self, backbone: Backbone) -> AnyCrop:
        assert self.size is not None
        return AnyCrop(self.size)

    def build(self, backbone: Backbone) -> Objective:
        objective = ViewsObjective(backbone.build(), self.dim, self.temperature)
        if self.size is not None:
            objective.tokens_per_sample = crop_tokens(self.size, backbone.token_size)
        return objective
