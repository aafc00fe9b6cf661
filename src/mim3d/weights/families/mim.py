"""MiM as its authors publish it (Zhuang et al. 2025), and our own hybrid without a card, which has the same names."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mim3d.backbones import BACKBONES, Hybrid
from mim3d.core.errors import CheckpointError
from mim3d.scans.intensity import CT_WINDOW_HU, Intensity
from mim3d.weights.families.family import ExpectedInput, Family, Tensors
from mim3d.weights.families.vit_shapes import is_fixed
from mim3d.weights.states import HeldWeights

#: Sizes of the published networks, whose number of heads is known from the publication.
_PUBLISHED = ("hybrid_tiny", "hybrid_small", "hybrid_base")

#: With a class token, which other networks of this kind have.
_ENCODER = r"(patch_embed|blocks)\d+\.|stage\d+_output_decode\.|norm\.|cls_token$"


def settings_of_hybrid(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of our hybrid that shapes show: widths, depths and channels, but no heads."""
    widths: list[int] = []
    depths: list[int] = []
    while (weight := tensors.get(f"patch_embed{len(widths) + 1}.proj.weight")) is not None and weight.ndim == 5:
        widths.append(weight.shape[0])
        blocks = re.compile(rf"blocks{len(widths)}\.(\d{{1,4}})\.")
        depths.append(1 + max((int(found[1]) for key in tensors if (found := blocks.match(key))), default=-1))
    return {
        "widths": widths,
        "depths": depths,
        "in_channels": tensors["patch_embed1.proj.weight"].shape[1],
    }


def alike(shown: Mapping[str, Any]) -> list[str]:
    """Names of our hybrids with the widths and depths of ``shown``."""
    size = tuple(shown["widths"]), tuple(shown["depths"])
    return [name for name, one in BACKBONES.items() if isinstance(one, Hybrid) and (one.widths, one.depths) == size]


def settings_of_published_mim(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same of a published checkpoint, with the heads of the sizes that were published."""
    shown = settings_of_hybrid(tensors)
    heads = [BACKBONES[name].num_heads for name in alike(shown) if name in _PUBLISHED]  # type: ignore[union-attr]
    return {**shown, **({"num_heads": heads[0]} if heads else {})}


def _without_positions(tensors: Tensors, held: HeldWeights) -> Tensors:
    """Tensors without the table of positions, which is computed.

    Raises:
        CheckpointError: It is not the fixed one.
    """
    table = tensors.pop("pos_embed")
    # A class token, which the encoder does not have, has the first row.
    if table.ndim == 3 and any(is_fixed(table[0, first:], atol=1e-4) for first in (0, 1)):
        return tensors
    raise CheckpointError(
        f"{held.file}: its pos_embed, of shape {tuple(table.shape)}, is not the fixed sine-cosine embedding of a grid "
        "of equal edges, with or without a class token; the network learned its positions, which mim3d's does not have."
    )


MIM = Family(
    name="MiM (Zhuang et al. 2025)",
    anchors=("patch_embed1.proj.weight", "pos_embed"),
    encoder=_ENCODER + r"|pos_embed$",
    drops=(r"\bdecoder_pos_embed$",),
    others=((r"^mask_token$", "decoder.mask_token"), (r"^decoder_", "decoder.")),
    convert=_without_positions,
    last="norm.weight",
    backbone="hybrid",
    settings=settings_of_published_mim,
    open=("num_heads",),
    expects=ExpectedInput(
        modality="CT",
        spacing="of each scan",
        orientation="RAS+",
        intensity=Intensity(window=CT_WINDOW_HU),
    ),
    source="Zhuang et al., IEEE TMI 2025",
)

OWN_HYBRID = Family(
    name="mim3d's hybrid without its card",
    anchors=("patch_embed1.proj.weight", "patch_embed2.proj.weight"),
    absent=(r"\bpos_embed$",),
    encoder=_ENCODER,
    last="norm.weight",
    backbone="hybrid",
    settings=settings_of_hybrid,
    open=("num_heads",),
    licence="of whoever trained it",
    source="mim3d",
)
