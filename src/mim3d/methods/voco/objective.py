"""VoCo's network and losses: student and teacher agree on which base crops a random crop overlaps, and by how much."""

import copy
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.backbones.contract import Backbone
from mim3d.nn.blocks import init_linear
from mim3d.nn.losses import overlap_losses, spread
from mim3d.nn.volumes import token_grid
from mim3d.objective import Batch, Objective, StepOutput, Tokens

if TYPE_CHECKING:
    from mim3d.methods.voco.method import VoCo

# Shape suffixes: B samples, K base crops and R random crops of each, N crops, C channels, X Y Z space, D projection.


class CropProjection(nn.Module):
    """Two linear layers; between them each unit is normalised over all crops at hand, as in the published code.

    Without it the vectors of a fresh network are all but the same, and so are all similarities.

    Args:
        in_dim: Width in.
        dim: Width between and out.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, dim)
        self.norm = nn.BatchNorm1d(dim, affine=False, track_running_stats=False)
        self.fc2 = nn.Linear(dim, dim)
        self.apply(init_linear)

    def forward(self, features_NE: Tensor) -> Tensor:
        """Vectors ``(N, D)``."""
        return self.fc2(F.relu(self.norm(self.fc1(features_NE))))


class VoCoObjective(Objective):
    """A student that learns, and a teacher that follows it.

    Args:
        settings: Settings of the method.
        backbone: The encoder's recipe.
    """

    def __init__(self, settings: "VoCo", backbone: Backbone) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = backbone.build()
        self.project = CropProjection(sum(self.encoder.widths), settings.dim)
        self.teacher = nn.ModuleList(copy.deepcopy(part).requires_grad_(False) for part in self._student())
        grid = settings.grid()
        num_tokens = math.prod(token_grid(grid.crop_size, backbone.token_size))
        counts = (("base", grid.num_bases), ("crop", settings.num_crops))
        self.tokens_per_sample = tuple(Tokens(name, number, num_tokens) for name, number in counts)

    def _student(self) -> tuple[nn.Module, nn.Module]:
        return self.encoder, self.project

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Sum of the three losses, each logged, and what tells health from collapse.

        That is the similarity with base crops that are overlapped, beside the ``overlap`` that it should be, and with
        others; and how much the encoder's features and the vectors made of them differ over crops.
        """
        overlap_BRK, views_NCXYZ = batch["overlap"], self.views(batch)
        num_samples, num_crops, num_bases = overlap_BRK.shape
        parts = [num_samples * num_crops, num_samples * num_bases]
        features_NE, vectors_ND = self._vectors(self._student(), views_NCXYZ)
        student = torch.split(vectors_ND, parts)
        with torch.no_grad():
            teacher = torch.split(self._vectors(self.teacher, views_NCXYZ)[1], parts)
        crop_BRD, teacher_crop_BRD = (vectors[0].reshape(num_samples, num_crops, -1) for vectors in (student, teacher))
        base_BKD, teacher_base_BKD = (vectors[1].reshape(num_samples, num_bases, -1) for vectors in (student, teacher))
        # Similarities close to their targets need more digits than half precision has.
        with torch.autocast(views_NCXYZ.device.type, enabled=False):
            pairs = (crop_BRD @ teacher_base_BKD.mT, teacher_crop_BRD @ base_BKD.mT)
            similarity_BRK = (F.relu(pairs[0]) + F.relu(pairs[1])) / 2
            positive, negative = overlap_losses(similarity_BRK, overlap_BRK)
            alike_BKK = F.relu(base_BKD @ base_BKD.mT).square()
        different_KK = ~torch.eye(num_bases, dtype=torch.bool, device=alike_BKK.device)
        regularisation = (alike_BKK * different_KK).sum() / (num_samples * max(num_bases * (num_bases - 1), 1))
        losses = {"positive": positive, "negative": negative, "regularisation": regularisation}
        logs = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        logs |= _similarities(similarity_BRK.detach(), overlap_BRK)
        logs |= {"spread/features": spread(features_NE.detach()), "spread/vectors": spread(vectors_ND.detach())}
        return StepOutput(torch.stack(list(losses.values())).sum(), logs)

    def views(self, batch: Batch) -> Tensor:
        """All crops ``(N, C, X, Y, Z)``: the random ones of every sample, varied one by one, then the base crops."""
        crop_NCXYZ, settings = batch["crop"].flatten(0, 1), self.settings
        device, generator = crop_NCXYZ.device, self.context.generator(crop_NCXYZ.device)
        per_crop = (len(crop_NCXYZ), 1, 1, 1, 1)
        for axis in (2, 3, 4):
            flipped = torch.rand(per_crop, generator=generator, device=device) < settings.crop_flip_prob
            crop_NCXYZ = torch.where(flipped, crop_NCXYZ.flip(axis), crop_NCXYZ)
        shift = 2 * torch.rand(per_crop, generator=generator, device=device) - 1
        return torch.cat([crop_NCXYZ + settings.crop_bias * shift, batch["base"].flatten(0, 1)])

    def _vectors(self, network: Iterable[nn.Module], crops_NCXYZ: Tensor) -> tuple[Tensor, Tensor]:
        """All maps of the encoder, pooled and concatenated, ``(N, E)``, and what is projected of them, of length 1."""
        encoder, project = network
        chunks = torch.split(crops_NCXYZ, self.settings.chunk_size or len(crops_NCXYZ))
        features_NE = torch.cat([torch.cat([each.mean((2, 3, 4)) for each in encoder(chunk)], 1) for chunk in chunks])
        return features_NE, F.normalize(project(features_NE).float(), dim=-1)

    def after_weights(self) -> None:
        """The teacher begins as the student."""
        for teacher, student in zip(self.teacher, self._student(), strict=True):
            teacher.load_state_dict(student.state_dict())

    def after_step(self, progress: float) -> None:
        """The teacher keeps ``momentum`` of its weights, and takes the rest from the student's."""
        for teacher, student in zip(self.teacher, self._student(), strict=True):
            kept: list[Tensor] = list(teacher.parameters())
            new: list[Tensor] = list(student.parameters())
            torch._foreach_lerp_(kept, new, 1 - self.settings.momentum)
            for old, fresh in zip(teacher.buffers(), student.buffers(), strict=True):
                old.copy_(fresh)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; the teacher drops nothing."""
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """The first random crop, as the student sees it, and the base crop that it overlaps most, as ``(X, Y, Z)``."""
        first = {key: value[:1] for key, value in batch.items()}
        nearest = int(first["overlap"][0, 0].argmax())
        return {"voco/crop": self.views(first)[0, 0], "voco/base": first["base"][0, nearest, 0]}


def _similarities(similarity_BRK: Tensor, overlap_BRK: Tensor) -> dict[str, Tensor]:
    """Mean similarities with base crops that are overlapped, weighted by the overlap, and with those that are not.

    In a batch in which all are overlapped, as happens on small grids, the second is the same as the first: a 0 would
    make the mean over batches say that places are told apart.
    """
    apart_BRK, whole = overlap_BRK == 0, overlap_BRK.sum()
    positive = (similarity_BRK * overlap_BRK).sum() / whole
    negative = (similarity_BRK * apart_BRK).sum() / apart_BRK.sum().clamp(min=1)
    return {
        "similarity/positive": positive,
        "similarity/negative": torch.where(apart_BRK.any(), negative, positive),
        "overlap": overlap_BRK.square().sum() / whole,
    }
