"""Primus: the transformer of nnU-Net and nnssl (Wald et al. 2025), whose positions are both learned and rotary."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mim3d.backbones import BACKBONES, ViT
from mim3d.backbones.vit import PRIMUS as RECIPE
from mim3d.core.types import Triple
from mim3d.weights.families.family import ExpectedInput, Family, Tensors
from mim3d.weights.families.nnssl import OF_NNSSL, OPENMIND
from mim3d.weights.families.resenc_shapes import ORIENTATION, architecture_of, expected_by_plan, plan_of, within
from mim3d.weights.families.vit_shapes import settings_of_vit, unfit_vit
from mim3d.weights.states import HeldWeights

#: Heads of the published sizes, by width and depth.
HEADS = {
    (one.width, one.depth): one.num_heads
    for size in ("s", "b", "m", "l")
    if isinstance(one := BACKBONES[f"primus_{size}"], ViT)
}

#: Settings that all files share and that shapes do not show.
_FIXED = ("rotary_base", "rotary_pairs", "mlp_norm", "key_bias", "norm_eps")

#: Tensors of ours, and those of theirs that they are one after the other.
_JOINED = {
    "attn.qkv.weight": ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
    "mlp.fc1.weight": ("mlp.fc1_g.weight", "mlp.fc1_x.weight"),
    "mlp.fc1.bias": ("mlp.fc1_g.bias", "mlp.fc1_x.bias"),
}


def settings_of_primus(tensors: Tensors) -> dict[str, Any]:
    """Settings of our ViT in the form of Primus, by the tensors of an encoder by our names."""
    shown: dict[str, Any] = settings_of_vit(HEADS)(tensors)
    shown["positions"] = "learned_rotary" if "position_table" in tensors else "rotary"
    shown["attention_norm"] = "blocks.0.attn.norm.weight" in tensors
    if "layer_scale" in shown:
        shown["layer_scale"] = RECIPE.layer_scale
    return {**shown, **{name: getattr(RECIPE, name) for name in _FIXED}}


def said_of_primus(tensors: Tensors, held: HeldWeights) -> dict[str, Any]:
    """What the plan beside the weights says: the grid of the learned positions, and the number of heads."""
    said: dict[str, Any] = {}
    if heads := _heads_in_plan(tensors, held):
        said["num_heads"] = heads
    if (grid := _grid_in_file(tensors, held)) is not None:
        order = _order_of_axes(held)
        said["position_grid"] = [grid[axis] for axis in order]
    return said


def to_own_primus(tensors: Tensors, held: HeldWeights) -> Tensors:
    """Tensors by our names, with axes in the order of those of the volume."""
    own = dict(tensors)
    for block in {found[1] for name in tensors if (found := re.match(r"(blocks\.\d+\.)", name))}:
        for name, sources in _JOINED.items():
            parts = [tensors[f"{block}{source}"] for source in sources if f"{block}{source}" in tensors]
            if len(parts) == len(sources) and _fit_together(parts):
                own[f"{block}{name}"] = torch.cat(parts)
                for source in sources:
                    del own[f"{block}{source}"]
    _set_positions(own)
    if (order := _order_of_axes(held)) != (0, 1, 2):
        own |= dict(_along_other_axes(own, held, order))
    if within(held.beside, "mim3d").get("axes") == "ZYX" and own["embed.weight"].ndim == 5:
        own["embed.weight"] = own["embed.weight"].transpose(2, 4)
    return own


def unfit_primus(shown: Mapping[str, Any], tensors: Tensors, held: HeldWeights) -> str:
    """What is in the way of our ViT in this form."""
    if said := unfit_vit(HEADS)(shown, tensors, held):
        return said
    if (table := tensors.get("pos_embed")) is not None:
        return f": its learned positions have the shape {tuple(table.shape)}, so it cannot be used here"
    if "position_table" not in tensors and not any(one.get("use_abs_pos_embed") is False for one in _arguments(held)):
        return ", but holds no eva.pos_embed, its learned positions; it is not whole, so copy it again"
    if _order_of_axes(held) == (0, 1, 2):
        return ""
    if _num_heads(tensors, held) is None:
        return (
            ": its positions number the axes in another order, which to undo takes the number of attention heads, and "
            "neither its size nor its plan says it, so it cannot be used here"
        )
    grid = _grid_in_file(tensors, held)
    if is_exchanged(held) and grid is not None and grid[0] != grid[1]:
        return (
            f": nnssl trained it on crops of {' x '.join(map(str, grid))} tokens with the positions of other places, "
            "which mim3d has not, so it cannot be used here"
        )
    return ""


def is_exchanged(held: HeldWeights) -> bool:
    """Whether nnssl trained the network with the first two axes of positions exchanged.

    Its networks line tokens up with the second axis first, and positions with the first one (as nnU-Net's package did
    until June 2025); that of SimMIM alone does not. Those of MAE hold a second transformer, the others name a trainer.
    """
    trainer = held.beside.get("trainer_name")
    of_nnssl = isinstance(trainer, str) and "Eva" in trainer and "SimMIM" not in trainer
    return of_nnssl or any(re.search(r"(^|\.)decoder\.blocks\.0\.attn\.q_proj\.weight$", name) for name in held.tensors)


def _order_of_axes(held: HeldWeights) -> Triple:
    """Which axis of the positions in the file each axis of a volume has."""
    if within(held.beside, "mim3d").get("axes") == "ZYX":
        return 2, 1, 0
    return (1, 0, 2) if is_exchanged(held) else (0, 1, 2)


def _expected(held: HeldWeights) -> ExpectedInput | None:
    found = expected_by_plan(held)
    if not is_exchanged(held):
        return found
    if found is None:
        found = OPENMIND if "nnssl_adaptation_plan" in held.beside else ExpectedInput()
    return replace(
        found, orientation=f"{ORIENTATION}; the first two axes of positions, which nnssl exchanges, are put right"
    )


def _fit_together(parts: list[Tensor]) -> bool:
    if any(one.layout != torch.strided or one.is_quantized or one.is_nested or one.ndim == 0 for one in parts):
        return False
    return len({(one.shape[1:], one.dtype, one.device) for one in parts}) == 1


def _set_positions(own: Tensors) -> None:
    """Learned positions, of which the first ones are those of registers; what is of another shape is left."""
    width = len(own["embed.weight"])
    for theirs, ours in (("register_tokens", "registers"), ("pos_embed", "position_table")):
        value = own.get(theirs)
        if value is not None and _fit_together([value]) and value.ndim == 3 and value.shape[::2] == (1, width):
            own[ours] = own.pop(theirs)[0]
    registers, rows = own.get("registers"), own.get("position_table")
    if registers is not None and rows is not None and len(rows) > len(registers) and _fit_together([registers, rows]):
        own["registers"], own["position_table"] = registers + rows[: len(registers)], rows[len(registers) :]


def _along_other_axes(own: Tensors, held: HeldWeights, order: Triple) -> Iterator[tuple[str, Tensor]]:
    """Learned and rotary positions with axes in another order; nothing where heads or grid are not known."""
    table, grid = own.get("position_table"), _grid_in_file(own, held)
    if table is not None and grid is not None:
        yield "position_table", table.reshape(*grid, -1).permute(*order, 3).flatten(0, 2)
    heads = _num_heads(own, held)
    for name, value in own.items():
        is_rotary = re.search(r"\.attn\.(qkv\.weight|query_bias)$", name) and _fit_together([value])
        if heads is not None and is_rotary and len(value) % (3 * heads * (3 if value.ndim > 1 else 1)) == 0:
            yield name, reordered_rotary(value, heads, order)


def reordered_rotary(value: Tensor, num_heads: int, order: Triple) -> Tensor:
    """Rows of queries and keys whose pairs of channels are turned along other axes.

    Args:
        value: Weights ``(3 E, E)`` of queries, keys and values, or the bias ``(E,)`` of queries; channels of a head are
            those of the first axis, the second, the third.
        num_heads: Attention heads.
        order: The former axis of each one.
    """
    kinds = list(value.chunk(3)) if value.ndim > 1 else [value]
    for number, rows in enumerate(kinds[:2]):
        by_axis = torch.unflatten(rows, 0, (num_heads, 3, -1))
        kinds[number] = by_axis[:, list(order)].flatten(0, 2)
    return torch.cat(kinds)


def _num_heads(tensors: Tensors, held: HeldWeights) -> int | None:
    depth = len({found[1] for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))})
    return _heads_in_plan(tensors, held) or HEADS.get((len(tensors["embed.weight"]), depth))


def _heads_in_plan(tensors: Tensors, held: HeldWeights) -> int | None:
    width = len(tensors["embed.weight"])
    found = [one.get(name) for one in _arguments(held) for name in ("encoder_eva_numheads", "eva_numheads")]
    fitting = (one for one in found if type(one) is int and one > 0 and width % one == 0 and width // one % 6 == 0)
    return next(fitting, None)


def _arguments(held: HeldWeights) -> tuple[Mapping[Any, Any], ...]:
    """Arguments of the network by the plans beside the weights, of nnssl and nnU-Net; empty without one."""
    plan = within(within(held.beside, "nnssl_adaptation_plan"), "architecture_plans")
    return within(plan, "arch_kwargs"), architecture_of(held)


def _grid_in_file(tensors: Tensors, held: HeldWeights) -> Triple | None:
    """Tokens along each axis that the learned positions are for, in the order of the file."""
    table, edges = tensors.get("position_table"), tensors["embed.weight"].shape[2:]
    if table is None or not all(edges):
        return None
    override = within(held.beside, "nnssl_adaptation_plan").get("pretrain_patch_size")
    for size in (override, plan_of(held)[1].get("patch_size")):
        if isinstance(size, (list, tuple)) and len(size) == 3 and all(type(one) is int and one > 0 for one in size):
            x, y, z = (voxels // edge for voxels, edge in zip(size, edges, strict=True))
            if x * y * z == len(table):
                return x, y, z
    edge = round(len(table) ** (1 / 3))
    return (edge, edge, edge) if math.prod((edge, edge, edge)) == len(table) else None


PRIMUS = Family(
    name="Primus (Wald et al. 2025)",
    anchors=("down_projection.proj.weight", "eva.blocks.0.attn.q_proj.weight", "eva.blocks.0.mlp.norm.weight"),
    encoder=r"(eva|down_projection\.proj)\.|register_tokens$",
    renames=(
        (r"^down_projection\.proj\.", "embed."),
        (r"^eva\.", ""),
        (r"\.gamma_([12])$", r".scale\1"),
        (r"\.attn\.q_proj\.bias$", ".attn.query_bias"),
        (r"\.attn\.v_proj\.bias$", ".attn.value_bias"),
    ),
    # The second transformer of nnssl's MAE is no decoder of ours.
    others=((r"^decoder\.", "nnssl_decoder."),),
    convert=to_own_primus,
    last="norm.weight",
    backbone="vit",
    settings=settings_of_primus,
    settings_in_file=said_of_primus,
    open=("num_heads",),
    unfit=unfit_primus,
    expects=ExpectedInput(orientation=ORIENTATION),
    expects_in_file=_expected,
    remark=(
        "its decoder (transposed convolutions, up_projection) is none of mim3d's and stays behind; until June 2025 "
        "nnU-Net numbered the first two axes of positions the other way round, which its files do not show"
    ),
    licence="of whoever trained it",
    source="https://github.com/MIC-DKFZ/dynamic-network-architectures",
)

NNSSL_PRIMUS = replace(PRIMUS, name="nnssl Primus (Wald et al. 2025)", **OF_NNSSL)

PRIMUS_DEEPER = Family(
    name="Primus with a residual network for its tokens (PrimusV2, PrimusV3)",
    anchors=("eva.blocks.0.attn.q_proj.weight", "eva.blocks.0.mlp.norm.weight"),
    axes=2,
    marks=(r"\bdown_projection\.stem\.",),
    why_not="its tokens are made by a residual network where mim3d has one convolution",
    licence=PRIMUS.licence,
    source=PRIMUS.source,
)
