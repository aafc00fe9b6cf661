"""Whether features have collapsed: three measures that need no label."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
