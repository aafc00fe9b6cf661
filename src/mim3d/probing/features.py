"""Frozen features of the items of views."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.backbones.contract import Encoder
from mim3d.core.types import Triple
from mim3d.probing.items import View

#: Voxels of the views that go through the encoder together, and views at most.
_BATCH_VOXELS, _BATCH_VIEWS = 2 * 96**3, 8

#: Passes batches of views on and shows how many have come.
Watch = Callable[[Sequence[Sequence[View]]], Iterable[Sequence[View]]]


def batch_size_for(size: Triple) -> int:
    """Views of so many voxels that go through an encoder together."""
    return max(1, min(_BATCH_VIEWS, _BATCH_VOXELS // math.prod(size)))


def features_of(
    encoder: Encoder,
    views: Sequence[View],
    features: Literal["last", "all"],
    *,
    batch_size: int,
    watch: Watch | None = None,
) -> Tensor:
    """Features ``(N, D)`` of all items, float64 on the CPU.

    Args:
        encoder: Encoder in evaluation mode, on any device.
        views: Views of one size.
        features: Which of the encoder's maps.
        batch_size: Views that go through the encoder together.
        watch: Passes the batches on, to show progress.
    """
    device = next(encoder.parameters()).device
    batches = [views[start : start + batch_size] for start in range(0, len(views), batch_size)]
    found: list[Tensor] = []
    with torch.no_grad():
        for batch in batches if watch is None else watch(batches):
            images_BCXYZ = torch.stack([view.load() for view in batch]).to(device)
            tokens_BLD = token_features(encoder, images_BCXYZ, features).double().cpu()
            for view, tokens_LD in zip(batch, tokens_BLD, strict=True):
                if view.tokens_n is None:
                    found.append(tokens_LD.mean(0, keepdim=True))
                else:
                    found.append(tokens_LD[torch.from_numpy(view.tokens_n)])
    return torch.cat(found)


def token_features(encoder: Encoder, images_BCXYZ: Tensor, features: Literal["last", "all"]) -> Tensor:
    """Features ``(B, L, D)`` of every token, in raster order: the last map, or all, averaged to its tokens."""
    maps = encoder.feature_maps(images_BCXYZ)
    x, y, z = maps[-1].shape[2:]
    chosen = maps[-1:] if features == "last" else [F.adaptive_avg_pool3d(m, (x, y, z)) for m in maps]
    return torch.cat([m.float() for m in chosen], dim=1).flatten(2).transpose(1, 2)
