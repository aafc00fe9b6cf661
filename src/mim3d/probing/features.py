"""Frozen features of the items of views, and whether they have collapsed: three measures that need no label."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.backbones.contract import Encoder
from mim3d.probing.items import View

#: Rows whose singular values are taken, evenly spaced: what more of them add is small.
MAX_ROWS = 4096

CONVENTIONS = {
    "feature_std": (
        "Standard deviation over the training items of features scaled to length 1, mean over features, times the "
        "square root of their number: 1 for directions that are spread evenly, 0 for one direction alone (Chen and He, "
        "CVPR 2021)."
    ),
    "effective_rank": (
        "exp of the entropy of the singular values of the feature matrix, as shares of their sum: 1 to the number of "
        "features (RankMe; Garrido et al., ICML 2023)."
    ),
    "mean_cosine": "Mean cosine between two different training items.",
}

#: Passes batches of views on and shows how many have come.
Watch = Callable[[Sequence[Sequence[View]]], Iterable[Sequence[View]]]


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


@dataclass(frozen=True)
class Collapse:
    """The measures, see :data:`CONVENTIONS`."""

    feature_std: float
    effective_rank: float
    mean_cosine: float


def measure_collapse(features_ND: Tensor) -> Collapse:
    """Measures of features as the encoder gives them, ``(N, D)`` float64, two rows or more."""
    number, dim = features_ND.shape
    normed_ND = F.normalize(features_ND, dim=1)
    # The squared length of the sum holds every pair twice and every row with itself once.
    pairs = normed_ND.sum(0).square().sum() - normed_ND.square().sum()
    return Collapse(
        feature_std=float(normed_ND.std(0, correction=0).mean() * dim**0.5),
        effective_rank=effective_rank(features_ND),
        mean_cosine=float(pairs / (number * (number - 1))),
    )


def effective_rank(features_ND: Tensor) -> float:
    """RankMe of a feature matrix; 0 where all of it is zero."""
    rows = features_ND[:: -(-len(features_ND) // MAX_ROWS)]
    values = torch.linalg.svdvals(rows)
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
