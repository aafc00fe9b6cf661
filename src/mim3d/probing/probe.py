"""One probe: frozen features of a probe set, the two classifiers on them, and what they score.

The classifiers, multinomial logistic regression and weighted nearest neighbours, see standardised features, in float64
on the CPU, and draw nothing at random: the same features give the same scores. Legend: N training items, M items to
classify, D features, K classes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.backbones.contract import Encoder
from mim3d.core.errors import DataError
from mim3d.nn.tokens import sincos_positions
from mim3d.probing.items import ProbeSet, View, classes_of
from mim3d.probing.scores import Collapse, Scored, measure_collapse
from mim3d.probing.settings import Probing

#: Width of the embedding of places.
PLACE_DIM = 48

#: Voxels of the views that go through the encoder together, and views at most.
_BATCH_VOXELS, _BATCH_VIEWS = 2 * 96**3, 8

#: Steps of L-BFGS at most; the loss is strictly convex, so that it ends much earlier.
MAX_STEPS = 300

#: Largest entry of the gradient at which it ends.
TOLERANCE = 1e-6

#: Items whose similarities are held at a time.
_QUERIES_AT_ONCE = 1024

#: Passes batches of views on and shows how many have come.
Watch = Callable[[Sequence[Sequence[View]]], Iterable[Sequence[View]]]


@dataclass(frozen=True)
class Probed:
    """What a set of features is worth.

    Attributes:
        linear: The linear classifier on held-out items.
        neighbours: The nearest-neighbour classifier on them.
        collapse: Measures of the features to learn from; None for raw values.
        num_features: D.
    """

    linear: Scored
    neighbours: Scored
    collapse: Collapse | None
    num_features: int


def probe_encoder(encoder: Encoder, items: ProbeSet, probing: Probing, watch: Watch | None = None) -> Probed:
    """Probe the features of an encoder, in evaluation mode and as it is.

    Args:
        encoder: Encoder on any device.
        items: Made for its tokens.
        probing: How.
        watch: Passes batches of views on, to show progress.
    Raises:
        DataError: Features that are not finite.
    """
    batch_size = max(1, min(_BATCH_VIEWS, _BATCH_VOXELS // math.prod(items.size)))
    training_ND, held_out_MD = (
        features_of(encoder, views, probing.features, batch_size=batch_size, watch=watch)
        for views in (items.training, items.held_out)
    )
    if not (bool(training_ND.isfinite().all()) and bool(held_out_MD.isfinite().all())):
        raise DataError(
            "The encoder gives features that are not finite numbers; look at its weights and at the mapping of "
            "intensities."
        )
    return _probe(training_ND, held_out_MD, items, probing, measure_collapse(training_ND))


def without_encoder(items: ProbeSet, probing: Probing) -> dict[str, Probed]:
    """What needs no encoder: the mean and deviation of each item's voxels, and, of tokens, their places in their view.

    Places go by the fixed embedding that encoders add to their tokens. Where scans lie alike, place alone tells much:
    features are worth what they have over it.
    """
    parts = (items.training, items.held_out)
    training_NF, held_out_MF = (torch.from_numpy(np.concatenate([view.raw_nF for view in views])) for views in parts)
    found = {"intensities": _probe(training_NF, held_out_MF, items, probing, None)}
    if items.target == "labels":
        x, y, z = (edge // items.token_edge for edge in items.size)
        places_LE = sincos_positions((x, y, z), PLACE_DIM).double()
        training_NE, held_out_ME = (
            torch.cat([places_LE[torch.from_numpy(view.tokens_n)] for view in views if view.tokens_n is not None])
            for views in parts
        )
        found["place"] = _probe(training_NE, held_out_ME, items, probing, None)
    return found


@contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """Draw from a seed inside; the CPU's global generator, by which weights are drawn, is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def random_encoder(encoder: Encoder, seed: int) -> Encoder:
    """An encoder of the same settings with weights drawn at random."""
    with drawn_from(seed):
        return encoder.recipe.build().to(next(encoder.parameters()).device).eval()


def _probe(
    training_ND: Tensor, held_out_MD: Tensor, items: ProbeSet, probing: Probing, collapse: Collapse | None
) -> Probed:
    known, asked = (standardised(training_ND, features) for features in (training_ND, held_out_MD))
    classes_N = torch.from_numpy(classes_of(items.training))
    number = len(items.names)
    linear = linear_probabilities(known, classes_N, asked, number, l2=probing.l2)
    neighbours = neighbour_probabilities(
        known, classes_N, asked, number, num_neighbours=probing.num_neighbours, temperature=probing.temperature
    )
    truth = classes_of(items.held_out)
    patients = tuple(view.patient for view in items.held_out for _ in view.classes_n)
    scored = [Scored(found.numpy(), truth, patients, items.target == "classes") for found in (linear, neighbours)]
    return Probed(scored[0], scored[1], collapse, training_ND.shape[1])


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
