"""MONAI's ViT, UNETR and masked autoencoder, as users train them and as mim3d exports for them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mim3d.core.types import Triple
from mim3d.nn.tokens import sincos_positions
from mim3d.weights.families.family import Tensors
from mim3d.weights.families.vit_shapes import family_of_vit, settings_of_vit, unfit_vit
from mim3d.weights.states import HeldWeights

#: Heads of MONAI's defaults, by width and depth.
HEADS = {(768, 12): 12}

#: Term that MONAI's layer norms add to the variance, which is no setting there.
NORM_EPS = 1e-5

_LINEAR = "patch_embedding.patch_embeddings.1.weight"
_POSITIONS = "patch_embedding.position_embeddings"


def monai_positions(grid: Triple, embed_dim: int) -> Tensor:
    """The fixed positions of MONAI, (L, E): those of mim3d, but that the first two thirds stand for Y and X."""
    rows_LE, third = sincos_positions(grid, embed_dim), 2 * (embed_dim // 6)
    return torch.cat([rows_LE[:, third : 2 * third], rows_LE[:, :third], rows_LE[:, 2 * third :]], dim=1)


def _fixed_grid(rows_LE: Tensor, *, of_monai: bool) -> Triple | None:
    """The grid of which positions are the fixed ones of MONAI, or of mim3d; None where they are not."""
    third = 2 * (rows_LE.shape[1] // 6)
    if third == 0 or not len(rows_LE):
        return None

    def length(place: int, step: int) -> int:
        """Tokens along an axis: where its sine, which no whole number but 0 has, is 0 for the second time."""
        zeros = torch.nonzero(rows_LE[::step, place] == 0).flatten()
        return int(zeros[1]) if len(zeros) > 1 else len(rows_LE[::step])

    z = length(2 * third, 1)
    y = length(0 if of_monai else third, z)
    if len(rows_LE) % (y * z):
        return None
    grid = (len(rows_LE) // (y * z), y, z)
    fixed = monai_positions if of_monai else sincos_positions
    near = torch.allclose(rows_LE.float(), fixed(grid, rows_LE.shape[1]), atol=1e-5 if rows_LE.itemsize > 2 else 1e-2)
    return grid if near else None


def _to_own(tensors: Tensors, held: HeldWeights) -> Tensors:
    """Tensors by our names: a class token has no position here, and queries, keys and values may have no bias."""
    if tensors["embed.weight"].ndim == 2:
        tensors["embed.weight"] = _kernel(tensors["embed.weight"], held)
    width = len(tensors["embed.weight"])
    for name in [name for name in tensors if name.endswith(".attn.qkv.weight")]:
        bias = name.replace(".weight", ".bias")
        tensors.setdefault(bias, tensors[name].new_zeros(len(tensors[name])))
    token, table = tensors.pop("cls_token", None), tensors.pop("pos_embed")
    if token is not None and token.shape == (1, 1, width):
        tensors["registers"] = token[0]
    # Of a damaged file whatever there is, which no encoder takes.
    rows_LE = table[0] if table.ndim == 3 and table.shape[::2] == (1, width) else table.reshape(-1, 1)
    # Only mim3d writes its own positions under these names, which it computes for any grid.
    if _fixed_grid(rows_LE, of_monai=False) is None:
        tensors["position_table"] = rows_LE
    return tensors


def _kernel(weight_ED: Tensor, held: HeldWeights) -> Tensor:
    """The linear layer of cubes of voxels as a kernel (E, C, p, p, p); of one voxel where no cube has as many values.

    The number of channels is that which UNETR shows, else 1.
    """
    first = next(
        (value for name, value in held.tensors.items() if name.endswith("encoder1.layer.conv1.conv.weight")), None
    )
    channels = first.shape[1] if first is not None and first.ndim == 5 and first.shape[1] else 1
    edge = round((weight_ED.shape[1] / channels) ** (1 / 3))
    if edge == 0 or channels * edge**3 != weight_ED.shape[1]:
        return weight_ED[:, :, None, None, None]
    return weight_ED.reshape(-1, edge, edge, edge, channels).permute(0, 4, 1, 2, 3).contiguous()


def _settings(tensors: Tensors) -> dict[str, Any]:
    shown: dict[str, Any] = settings_of_vit(HEADS)(tensors)
    table = tensors.get("position_table")
    if table is None:
        return shown
    grid = _fixed_grid(table, of_monai=True)
    return {**shown, **({} if grid is None else {"position_grid": list(grid)}), "norm_eps": NORM_EPS}


def _unfit(shown: Mapping[str, Any], tensors: Tensors, held: HeldWeights) -> str:
    # Networks of any depth are trained: none is known to have lost blocks.
    if said := unfit_vit({})(shown, tensors, held):
        return said
    if shown["token_edge"] == 1 and any(name.endswith(_LINEAR) for name in held.tensors):
        return (
            f": it embeds tokens by a linear layer of {shown['in_channels']} values (proj_type perceptron), which are "
            "no cube of voxels of one channel and show neither edges nor channels, so it cannot be used here"
        )
    return ""


#: With tokens embedded by a convolution.
MONAI_VIT = replace(
    family_of_vit(HEADS),
    name="MONAI ViT or UNETR",
    anchors=("patch_embedding.patch_embeddings.weight", _POSITIONS, "blocks.0.attn.qkv.weight"),
    encoder=r"cls_token$|patch_embedding\.|blocks\.\d+\.|norm\.",
    # Of earlier versions of MONAI, which made them and did not use them.
    drops=(r"\b(norm_)?cross_attn\.", r"\bpatch_embedding\.cls_token$"),
    renames=(
        (r"^patch_embedding\.position_embeddings$", "pos_embed"),
        (r"^patch_embedding\.patch_embeddings\.(1\.)?", "embed."),
        # The norm at the end is the last of the blocks of MONAI's masked autoencoder.
        (r"^blocks\.\d+\.(weight|bias)$", r"norm.\1"),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.linear([12])\.", r".mlp.fc\1."),
    ),
    convert=_to_own,
    settings=_settings,
    unfit=_unfit,
    licence="of whoever trained it",
    source="https://github.com/Project-MONAI/MONAI (monai.networks.nets.ViT, UNETR, MaskedAutoEncoderViT)",
)

#: With tokens embedded by a linear layer of their voxels.
MONAI_VIT_LINEAR = replace(
    MONAI_VIT,
    name="MONAI ViT or UNETR with a perceptron for tokens",
    anchors=(_LINEAR, _POSITIONS, "blocks.0.attn.qkv.weight"),
    axes=2,
)
