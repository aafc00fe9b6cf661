"""What shapes and names show of a plain transformer in the names of timm, and its tensors by ours."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mim3d.nn.tokens import sincos_positions
from mim3d.weights.families.family import Family, Tensors
from mim3d.weights.states import HeldWeights

ANCHORS = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight")
#: With what other transformers have besides, by which they are known to be others.
ENCODER = (
    r"((cls|dist|reg)_token|register_tokens|pos_embed(_\w+)?)$|"
    r"(patch_embed|blocks\.\d+|norm|norm_pre|fc_norm|rope\w*)\."
)
RENAMES = (
    (r"^reg_token$", "register_tokens"),
    (r"^patch_embed\.proj\.", "embed."),
    (r"\.ls([12])\.gamma$", r".scale\1"),
    # A gated MLP as DINOv2 has it.
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


def settings_of_vit(heads: Mapping[tuple[int, int], int]) -> Callable[[Tensors], dict[str, Any]]:
    """Reads the settings of our ViT off the tensors of an encoder by our names.

    Args:
        heads: Attention heads of the networks that were published, by width and depth.
    """

    def read(tensors: Tensors) -> dict[str, Any]:
        width, in_channels, edge, *_ = tensors["embed.weight"].shape
        blocks = (int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d{1,4})\.", name)))
        depth = 1 + max(blocks, default=-1)
        shown: dict[str, Any] = {"width": width, "depth": depth, "token_edge": edge, "in_channels": in_channels}
        shown |= {"num_heads": heads[width, depth]} if (width, depth) in heads else {}
        hidden, back = (tensors.get(f"blocks.0.mlp.fc{number}.weight") for number in (1, 2))
        if width and hidden is not None and back is not None and hidden.ndim == back.ndim == 2:
            gated = hidden.shape[0] == 2 * back.shape[1]
            shown["mlp"] = "swiglu" if gated else "gelu"
            shown["mlp_ratio"] = back.shape[1] * (1.5 if gated else 1) / max(width, 1)
        registers, table = tensors.get("registers"), tensors.get("position_table")
        shown["num_registers"] = 0 if registers is None else len(registers)
        shown["positions"] = "sincos" if table is None else "learned"
        if table is not None:
            shown["position_grid"] = [_edge(len(table))] * 3
        if "blocks.0.scale1" in tensors:
            shown["layer_scale"] = 1e-5
        return shown

    return read


def unfit_vit(heads: Mapping[tuple[int, int], int]) -> Callable[[Mapping[str, Any], Tensors, HeldWeights], str]:
    """Says what is in the way of our ViT: tokens that are no cubes, a grid that is none, blocks that were lost.

    Args:
        heads: Attention heads of the networks that were published, by width and depth.
    """
    depths = dict(heads.keys())

    def say(shown: Mapping[str, Any], tensors: Tensors, _: HeldWeights) -> str:
        edges = tuple(tensors["embed.weight"].shape[2:])
        if len(set(edges)) != 1:
            return f": its tokens have {edges} voxels, mim3d's are cubes, so its weights cannot be used here"
        table = tensors.get("position_table")
        if table is not None and shown["positions"] != "sincos" and math.prod(shown["position_grid"]) != len(table):
            return f": it has positions for {len(table)} tokens, whose grid nothing says, so it cannot be used here"
        whole = depths.get(shown["width"], shown["depth"])
        if shown["depth"] < whole:
            return f", but holds {shown['depth']} of its {whole} blocks; it is not whole, so copy it again"
        return ""

    return say


def to_own_vit(tensors: Tensors, _: HeldWeights) -> Tensors:
    """Tensors by our names: a class token, with its own position, is a register; fixed positions are computed.

    Attention does not see the order of tokens, so that a class token is a register that has a position.
    """
    width = len(tensors["embed.weight"])
    token, more, table = (
        tensors.pop(name)
        if name in tensors and tensors[name].ndim == 3 and tensors[name].shape[::2] == (1, width)
        else None
        for name in ("cls_token", "register_tokens", "pos_embed")
    )
    if table is not None:
        rows_LE = table[0]
        first = 1 if token is not None and _edge(len(rows_LE) - 1) ** 3 == len(rows_LE) - 1 else 0
        if first and token is not None:
            token = token + rows_LE[:1]
        if not is_fixed(rows_LE[first:], atol=1e-5):
            tensors["position_table"] = rows_LE[first:]
    extra = [one[0] for one in (token, more) if one is not None]
    return {**tensors, **({"registers": torch.cat(extra)} if extra else {})}


def _edge(number: int) -> int:
    return round(max(0, number) ** (1 / 3))


def is_fixed(rows_LE: Tensor, atol: float) -> bool:
    """Whether positions are the sines and cosines that mim3d computes, of a grid of equal edges.

    Args:
        rows_LE: Positions, (L, E).
        atol: How far those in float32 may be off; in other precisions it is a hundredth.
    """
    edge = _edge(len(rows_LE))
    if edge == 0 or edge**3 != len(rows_LE):
        return False
    expected = sincos_positions((edge, edge, edge), rows_LE.shape[1])
    return torch.allclose(rows_LE.float(), expected, atol=atol if rows_LE.dtype == torch.float32 else 1e-2)


def family_of_vit(heads: Mapping[tuple[int, int], int]) -> Family:
    """What all families of plain transformers have in common.

    Args:
        heads: Attention heads of the networks that were published, by width and depth.
    """
    return Family(
        name="plain transformer",
        source="https://github.com/huggingface/pytorch-image-models",
        anchors=ANCHORS,
        encoder=ENCODER,
        renames=RENAMES,
        convert=to_own_vit,
        last="norm.weight",
        backbone="vit",
        settings=settings_of_vit(heads),
        unfit=unfit_vit(heads),
        open=("num_heads", "positions"),
        shown_by=(("positions", r"(^|\.)((encoder_)?pos_embed|position_embeddings)$"),),
    )
