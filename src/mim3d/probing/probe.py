"""One probe: features of a probe set, the two classifiers on them, and what they score."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mim3d.backbones.contract import Encoder
from mim3d.core.errors import DataError
from mim3d.nn.tokens import sincos_positions
from mim3d.probing.classifiers import linear_probabilities, neighbour_probabilities, standardised
from mim3d.probing.features import Collapse, Watch, features_of, measure_collapse
from mim3d.probing.items import ProbeSet, classes_of
from mim3d.probing.scores import Scored
from mim3d.probing.settings import Probing

#: Width of the embedding of places.
PLACE_DIM = 48

#: Voxels of the views that go through the encoder together, and views at most.
_BATCH_VOXELS, _BATCH_VIEWS = 2 * 96**3, 8


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
