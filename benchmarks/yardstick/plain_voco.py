"""A straightforward step of VoCo (Wu, Zhuang & Chen, CVPR 2024), as one would write it from the paper."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.backbones import Encoder


class ProjectedEncoder(nn.Module):
    """Maps pooled and concatenated, and a projection of two layers whose hidden units are normalised over crops.

    Args:
        encoder: The encoder.
        dim: Width of the projection.
    """

    def __init__(self, encoder: Encoder, dim: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.project = nn.Sequential(
            nn.Linear(sum(encoder.widths), dim),
            nn.BatchNorm1d(dim, affine=False, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(dim, dim),
        )

    def forward(self, crops_NCXYZ: Tensor) -> Tensor:
        """Vectors ``(N, D)``."""
        pooled = [F.adaptive_avg_pool3d(features, 1).flatten(1) for features in self.encoder(crops_NCXYZ)]
        vectors: Tensor = self.project(torch.cat(pooled, 1))
        return vectors


class PlainVoCo(nn.Module):
    """Student and momentum teacher, with loops over samples, crops and pairs of base crops.

    Args:
        encoder: The encoder.
        dim: Width of the projection.
        momentum: Share of itself that the teacher keeps at every step.
    """

    def __init__(self, encoder: Encoder, dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.student = ProjectedEncoder(encoder, dim)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.momentum = momentum

    def forward(self, crop_BRCXYZ: Tensor, base_BKCXYZ: Tensor, overlap_BRK: Tensor) -> Tensor:
        """The loss; the teacher moves on the way."""
        num_samples, num_crops, num_bases = overlap_BRK.shape
        inputs = torch.cat([crop_BRCXYZ.flatten(0, 1), base_BKCXYZ.flatten(0, 1)])
        student = self.student(inputs)
        with torch.no_grad():
            for kept, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                kept.copy_(self.momentum * kept + (1 - self.momentum) * new)
            teacher = self.teacher(inputs)
        total = student.new_zeros(())
        first = num_samples * num_crops
        for i in range(num_samples):
            crops, bases = (
                slice(i * num_crops, (i + 1) * num_crops),
                slice(first + i * num_bases, first + (i + 1) * num_bases),
            )
            rows = []
            for crop, teacher_crop in zip(student[crops], teacher[crops], strict=True):
                one = F.relu(F.cosine_similarity(crop[None], teacher[bases]))
                other = F.relu(F.cosine_similarity(teacher_crop[None], student[bases]))
                rows.append((one + other) / 2)
            similarity, overlap = torch.stack(rows), overlap_BRK[i]
            distance = (overlap - similarity).abs().clamp(max=1)
            positive = -(overlap * torch.log(1 - distance + 1e-6)).sum() / overlap.sum()
            apart = (overlap == 0).float()
            negative = (apart * similarity**2).sum() / apart.sum()
            pairs = []
            for k in range(num_bases - 1):
                for other_base in range(k + 1, num_bases):
                    pair = F.cosine_similarity(student[bases][k], student[bases][other_base], dim=0)
                    pairs.append(F.relu(pair) ** 2)
            total = total + positive + negative + torch.stack(pairs).mean()
        return total / num_samples
