"""The two classifiers of a probe: multinomial logistic regression and weighted nearest neighbours.

Both see standardised features, in float64 on the CPU, and draw nothing at random: the same features give the same
scores. Legend: N training items, M items to classify, D features, K classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

#: Steps of L-BFGS at most; the loss is strictly convex, so that it ends much earlier.
MAX_STEPS = 300

#: Largest entry of the gradient at which it ends.
TOLERANCE = 1e-6

#: Items whose similarities are held at a time.
_QUERIES_AT_ONCE = 1024


def standardised(training_ND: Tensor, features_MD: Tensor) -> Tensor:
    """Features less the mean of training features, over their deviation; a feature that does not vary becomes 0."""
    mean_D, std_D = training_ND.mean(0), training_ND.std(0, correction=0)
    varies_D = std_D > 1e-9 * (1 + mean_D.abs())
    return (features_MD - mean_D) * torch.where(varies_D, 1 / std_D.clamp_min(1e-300), 0.0)


def linear_probabilities(
    features_ND: Tensor, targets_N: Tensor, queries_MD: Tensor, num_classes: int, *, l2: float
) -> Tensor:
    """Class probabilities ``(M, K)`` of multinomial logistic regression.

    Minimises the mean cross-entropy, classes weighted alike whatever their number of items, plus ``l2 / 2`` times the
    squared coefficients (not the bias), by L-BFGS (Liu and Nocedal 1989) from zero.

    Args:
        features_ND: Standardised training features, float64.
        targets_N: Their classes, each of the K at least once.
        queries_MD: Standardised features to classify.
        num_classes: K.
        l2: Above 0, so that there is one solution.
    """
    counts_K = torch.bincount(targets_N, minlength=num_classes).to(features_ND)
    weights_N = (1 / (num_classes * counts_K))[targets_N]
    weight = torch.zeros(features_ND.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_STEPS,
        tolerance_grad=TOLERANCE,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        each_N = F.cross_entropy(features_ND @ weight + bias, targets_N, reduction="none")
        value = (weights_N * each_N).sum() + l2 / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        return (queries_MD @ weight + bias).softmax(1)


def neighbour_probabilities(
    features_ND: Tensor,
    targets_N: Tensor,
    queries_MD: Tensor,
    num_classes: int,
    *,
    num_neighbours: int,
    temperature: float,
) -> Tensor:
    """Votes ``(M, K)`` of the nearest training items by cosine, each weighing ``exp(cosine / temperature)``.

    The classifier of Wu et al. ("Unsupervised feature learning via non-parametric instance discrimination", CVPR 2018)
    with the k of 20 and temperature of 0.07 of DINO (Caron et al., ICCV 2021). Those were made for classes of one size;
    here a vote also weighs the inverse of its class's items, else rare labels would never win.

    Args:
        features_ND: Standardised training features, float64.
        targets_N: Their classes, each of the K at least once.
        queries_MD: Standardised features to classify.
        num_classes: K.
        num_neighbours: Number of neighbours that vote; all items where there are fewer.
        temperature: Temperature of the votes' weights.
    """
    known_ND = F.normalize(features_ND, dim=1)
    counts_K = torch.bincount(targets_N, minlength=num_classes).to(features_ND)
    votes = []
    for part in torch.split(F.normalize(queries_MD, dim=1), _QUERIES_AT_ONCE):
        cosines, places = (part @ known_ND.T).topk(min(num_neighbours, len(known_ND)), dim=1)
        weights = (cosines / temperature).softmax(1)
        votes_MK = weights.new_zeros(len(part), num_classes).scatter_add_(1, targets_N[places], weights) / counts_K
        votes.append(votes_MK / votes_MK.sum(1, keepdim=True))
    return torch.cat(votes)
