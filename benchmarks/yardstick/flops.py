"""Floating point operations that MiM needs, counted on paper: a product and a sum are two."""

import math
from dataclasses import dataclass

from mim3d.backbones.hybrid import Hybrid
from mim3d.methods.mim.method import MiM

#: A backward pass costs two forward passes: one product for the gradient of the input, one for that of the weight.
WITH_BACKWARD = 3


@dataclass(frozen=True)
class Flops:
    """Operations of one hierarchy, forward and backward.

    Attributes:
        needed: on visible tokens alone, predicting hidden ones alone.
        dense: everything at every token.
    """

    needed: float
    dense: float


def count_flops(method: MiM, recipe: Hybrid) -> Flops:
    """Operations of one sample: all volumes of one hierarchy."""
    needed = dense = 0.0
    width, depth, _ = method.decoder(recipe)
    for geometry in method.hierarchy(recipe).levels:
        tokens = math.prod(geometry.token_grid)
        hidden = geometry.num_hidden_tokens
        visible = tokens - hidden
        transformed = visible * _transformer(recipe, visible)
        decoded = visible * 2 * recipe.widths[-1] * width + tokens * _decoder(width, depth, tokens)
        predicted = 2 * width * math.prod(recipe.token_size) * recipe.in_channels
        for_convolutions = _convolutions(recipe)
        shared = transformed + decoded
        needed += geometry.num_volumes * (shared + visible * for_convolutions + hidden * predicted)
        dense += geometry.num_volumes * (shared + tokens * (for_convolutions + predicted))
    return Flops(WITH_BACKWARD * needed, WITH_BACKWARD * dense)


def _convolutions(recipe: Hybrid) -> float:
    """Per token: convolution stages, their way to the token, the last patch embedding and its linear layer."""
    total, dim_in, last = 0.0, recipe.in_channels, recipe.widths[-1]
    for stage, (dim, depth) in enumerate(zip(recipe.widths[:-1], recipe.depths[:-1], strict=True), start=1):
        edge = 2 ** (len(recipe.widths) - stage)
        block = 2 * dim * dim * (2 + 2 * recipe.mlp_ratio) + 2 * 125 * dim
        total += edge**3 * (2 * 8 * dim_in * dim + depth * block + 2 * dim * last)
        dim_in = dim
    return total + 2 * 8 * dim_in * last + 2 * last * last


def _transformer(recipe: Hybrid, length: int) -> float:
    dim = recipe.widths[-1]
    return recipe.depths[-1] * (2 * dim * dim * (4 + 2 * recipe.mlp_ratio) + 4 * length * dim)


def _decoder(dim: int, depth: int, length: int) -> float:
    return depth * (2 * dim * dim * 12 + 4 * length * dim)
