"""SwinUNETR's pre-training as MONAI's research code and tutorials take a step of it (Tang et al. 2022)."""

import itertools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.backbones.swin import Swin
from yardstick.monai_swin import monai_swin

#: Share of the voxels that is cut out at most, largest and least edge of a box as a share of an axis.
MAX_CUT, LARGEST, LEAST = 0.3, 0.25, 0.05


class TutorialSwinSSL(nn.Module):
    """MONAI's encoder, three heads, and a step that takes one view after the other.

    Args:
        recipe: Settings of the encoder, of four stages.
        contrast_dim: Width of the contrast.
    """

    def __init__(self, recipe: Swin, contrast_dim: int = 512) -> None:
        super().__init__()
        self.encoder = monai_swin(recipe)
        dim = recipe.widths[-1]
        self.rotation = nn.Linear(dim, 4)
        self.contrast = nn.Linear(dim, contrast_dim)
        layers: list[nn.Module] = []
        widths = [dim // 2**level for level in range(5)] + [dim // 16]
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.Conv3d(wide, narrow, 3, padding=1), nn.InstanceNorm3d(narrow), nn.LeakyReLU()]
            layers.append(nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False))
        self.inpaint = nn.Sequential(*layers, nn.Conv3d(widths[-1], recipe.in_channels, 1))
        self.random = np.random.default_rng(0)

    def forward(self, crops_BCXYZ: Tensor) -> Tensor:
        """The sum of the three losses over two views of every crop."""
        rotations, contrasts, inpainted, turns, whole = [], [], [], [], []
        for _ in range(2):
            turned, turn = self._turned(crops_BCXYZ)
            shown = self._cut(turned)
            top = self.encoder(shown)[4]
            tokens = top.flatten(2).transpose(1, 2)
            rotations.append(self.rotation(tokens[:, 0]))
            contrasts.append(F.normalize(self.contrast(tokens[:, 1]), dim=1))
            inpainted.append(self.inpaint(top))
            turns.append(turn)
            whole.append(turned)
        vectors = torch.cat(contrasts)
        cosines = F.cosine_similarity(vectors[:, None], vectors[None], dim=2)
        pairs = torch.cat([torch.diag(cosines, len(crops_BCXYZ)), torch.diag(cosines, -len(crops_BCXYZ))])
        others = (~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)).float()
        contrast = -torch.log((pairs / 0.5).exp() / (others * (cosines / 0.5).exp()).sum(1)).mean()
        rotation = F.cross_entropy(torch.cat(rotations), torch.cat(turns))
        return rotation + contrast + F.l1_loss(torch.cat(inpainted), torch.cat(whole))

    def _turned(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        turns = self.random.integers(0, 4, len(crops))
        turned = torch.stack([torch.rot90(crop, int(turn), (1, 2)) for crop, turn in zip(crops, turns, strict=True)])
        return turned, torch.from_numpy(turns).to(crops.device)

    def _cut(self, crops: Tensor) -> Tensor:
        """Boxes of noise in every crop, and boxes of another crop's content in some."""
        cut = crops.clone()
        for index, crop in enumerate(cut):
            self._drop(crop, None)
            other = int(self.random.integers(0, len(cut)))
            if other != index:
                self._drop(crop, cut[other])
        return cut

    def _drop(self, crop: Tensor, other: Tensor | None) -> None:
        sizes = crop.shape[1:]
        left = self.random.uniform(0, MAX_CUT) * np.prod(sizes)
        while left > 0:
            first = [int(self.random.integers(0, size - int(LEAST * size))) for size in sizes]
            edges = [int(self.random.integers(int(LEAST * size), int(LARGEST * size))) for size in sizes]
            box = (slice(None), *(slice(low, low + edge) for low, edge in zip(first, edges, strict=True)))
            if other is None:
                noise = torch.randn_like(crop[box])
                crop[box] = (noise - noise.min()) / (noise.max() - noise.min())
            else:
                crop[box] = other[box]
            left -= crop[box][0].numel()
