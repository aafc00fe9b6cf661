"""An encoder in the form of Primus by the names of nnU-Net's network, and what a plan says of that."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from mim3d.backbones import ViT
from mim3d.backbones.contract import Encoder
from mim3d.backbones.vit import PRIMUS
from mim3d.core.types import Triple
from mim3d.nn.tokens import resized_positions
from mim3d.weights.families.primus import HEADS, reordered_rotary

#: Settings that nnU-Net's network has no other values of.
_FIXED = ("positions", "rotary_base", "rotary_pairs", "mlp", "mlp_norm", "key_bias", "norm_eps")

#: The first letters of nnU-Net's names of sizes, by width and depth.
_SIZES = dict(zip(HEADS, "SBML", strict=True))

#: Names of ours that are several of theirs, one after the other.
_SPLIT = {
    "attn.qkv.weight": ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
    "mlp.fc1.weight": ("mlp.fc1_g.weight", "mlp.fc1_x.weight"),
    "mlp.fc1.bias": ("mlp.fc1_g.bias", "mlp.fc1_x.bias"),
}

_RENAMED = {"attn.query_bias": "attn.q_proj.bias", "attn.value_bias": "attn.v_proj.bias"}

CITATION = {
    "type": "Architecture",
    "name": "Primus",
    "apa_citations": [
        "Wald, T., Roy, S., Isensee, F., Ulrich, C., Ziegler, S., Trofimova, D., ... & Maier-Hein, K. (2025). Primus: "
        "Enforcing attention usage for 3D medical image segmentation. arXiv:2503.01835."
    ],
}


def unlike_primus(recipe: ViT) -> list[str]:
    """Settings in which an encoder differs from every Primus that nnU-Net builds, in words."""
    other = [
        f"{name} {getattr(recipe, name)} where that has {getattr(PRIMUS, name)}"
        for name in _FIXED
        if getattr(recipe, name) != getattr(PRIMUS, name)
    ]
    if recipe.num_registers:
        other.append(f"{recipe.num_registers} registers where that has none")
    hidden = (round(recipe.width * recipe.mlp_ratio * 2 / 3), int(recipe.width * (4 * 2 / 3)))
    if hidden[0] != hidden[1]:
        other.append(f"mlp_ratio {recipe.mlp_ratio:g} where that has {PRIMUS.mlp_ratio:g}")
    if recipe.width // recipe.num_heads % 6:
        other.append(f"heads of {recipe.width // recipe.num_heads} channels where that has multiples of 6")
    if recipe.token_edge < 2 or recipe.token_edge & (recipe.token_edge - 1):
        other.append(f"token_edge {recipe.token_edge} where that has powers of 2")
    return other


def size_name(recipe: ViT) -> str:
    """Name of the size in nnU-Net, such as ``PrimusM``; ``PrimusX`` for one that its arguments describe."""
    size = _SIZES.get((recipe.width, recipe.depth))
    published = recipe.token_edge == PRIMUS.token_edge and recipe.attention_norm and recipe.layer_scale is not None
    as_named = size is not None and published and HEADS[recipe.width, recipe.depth] == recipe.num_heads
    return f"Primus{size if as_named else 'X'}"


def primus_entries(recipe: ViT) -> dict[str, Any]:
    """Return the entries of a plan that say what the network is, and under which names its parts lie."""
    arguments = {
        "embed_dim": recipe.width,
        "patch_embed_size": list(recipe.token_size),
        "encoder_eva_depth": recipe.depth,
        "encoder_eva_numheads": recipe.num_heads,
        "scale_attn_inner": recipe.attention_norm,
        "init_values": recipe.layer_scale,
    }
    name = size_name(recipe)
    return {
        "architecture_plans": {
            "arch_class_name": name,
            # nnU-Net knows the sizes that have names of their own.
            "arch_kwargs": arguments if name == "PrimusX" else None,
            "arch_kwargs_requiring_import": None,
        },
        "key_to_encoder": "eva",
        "key_to_stem": "down_projection",
        "keys_to_in_proj": ["down_projection.proj"],
        "key_to_lpe": "eva.pos_embed",
    }


def primus_state(encoder: Encoder, patch_size: Triple, axes: Literal["XYZ", "ZYX"]) -> dict[str, Tensor]:
    """Return the tensors of an encoder by nnU-Net's names.

    Learned positions are those that the encoder computes with for crops of one size: nnU-Net has a table for each size.

    Args:
        encoder: The encoder.
        patch_size: Voxels of the crops along X, Y, Z of a scan. nnU-Net's arrays run Z, Y, X.
        axes: Order of the axes of kernels and positions.
    """
    recipe = encoder.recipe
    assert isinstance(recipe, ViT)
    own = dict(encoder.state_dict())
    x, y, z = (voxels // recipe.token_edge for voxels in patch_size)
    grid = (x, y, z) if axes == "ZYX" else (z, y, x)
    table_LE = resized_positions(own.pop("position_table"), recipe.position_grid, grid)
    if axes == "ZYX":
        own = dict(_turned(own, recipe.num_heads))
        table_LE = table_LE.reshape(*grid, -1).permute(2, 1, 0, 3).flatten(0, 2)
    state = {"eva.pos_embed": table_LE[None]}
    for name, value in own.items():
        state |= _by_their_names(name, value)
    return {name: value.detach().contiguous().clone() for name, value in state.items()}


def _turned(own: Mapping[str, Tensor], num_heads: int) -> Iterator[tuple[str, Tensor]]:
    """Kernels along Z, Y, X, and queries and keys whose channels are turned by places along Z, Y, X."""
    for name, value in own.items():
        if name == "embed.weight":
            yield name, value.transpose(2, 4)
        elif name.endswith((".attn.qkv.weight", ".attn.query_bias")):
            yield name, reordered_rotary(value, num_heads, (2, 1, 0))
        else:
            yield name, value


def _by_their_names(name: str, value: Tensor) -> dict[str, Tensor]:
    start, _, rest = name.partition(".")
    if start == "embed":
        return {f"down_projection.proj.{rest}": value}
    if start != "blocks":
        return {f"eva.{name}": value}
    number, _, part = rest.partition(".")
    names = _SPLIT.get(part, (_RENAMED.get(part, part.replace("scale", "gamma_")),))
    parts = value.chunk(len(names)) if len(names) > 1 else (value,)
    return {f"eva.blocks.{number}.{one}": piece for one, piece in zip(names, parts, strict=True)}
