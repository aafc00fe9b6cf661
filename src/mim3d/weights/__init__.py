"""Weights on disk: our own export (safetensors and a card), foreign checkpoints in, and what of them fitted.

Wherever weights are asked for, a run, an exported folder, a file or a Hugging Face id will do.
"""

from mim3d.weights.cards import card_settings, read_card, require_described
from mim3d.weights.description import IN_CARD, WeightsDescription, WeightsOrigin, describe, origin_of
from mim3d.weights.families import FAMILIES, ExpectedInput, Family
from mim3d.weights.folders import (
    CARD_FORMAT,
    CARD_NAME,
    RUN_NETWORKS,
    WEIGHTS_NAME,
    full_path,
    is_hub_id,
    locate,
    save_network,
    weights_digest,
)
from mim3d.weights.loading import (
    MIN_COVERAGE,
    CoverageReport,
    InputLayers,
    adapt_input,
    load_encoder,
    load_into,
    recipe_of,
    recipe_of_card,
    require_share,
)
from mim3d.weights.opened import OpenedWeights
from mim3d.weights.states import PREFIXES, WRAPPERS, read_state, read_weights

__all__ = [
    "CARD_FORMAT",
    "CARD_NAME",
    "FAMILIES",
    "IN_CARD",
    "MIN_COVERAGE",
    "PREFIXES",
    "RUN_NETWORKS",
    "WEIGHTS_NAME",
    "WRAPPERS",
    "CoverageReport",
    "ExpectedInput",
    "Family",
    "InputLayers",
    "OpenedWeights",
    "WeightsDescription",
    "WeightsOrigin",
    "adapt_input",
    "card_settings",
    "describe",
    "full_path",
    "is_hub_id",
    "load_encoder",
    "load_into",
    "locate",
    "origin_of",
    "read_card",
    "read_state",
    "read_weights",
    "recipe_of",
    "recipe_of_card",
    "require_described",
    "require_share",
    "save_network",
    "weights_digest",
]
