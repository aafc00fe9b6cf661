"""Families of published weights, one small table each: a new one is a file here and a line in ``FAMILIES``."""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mim3d.backbones import create_recipe
from mim3d.core.errors import ConfigError
from mim3d.core.names import cut, number_of, verb_of
from mim3d.weights.families.family import ExpectedInput, Family
from mim3d.weights.families.hi_end_mae import HI_END_MAE
from mim3d.weights.families.mae import MAE_2D, MAE_3D
from mim3d.weights.families.mim import MIM, OWN_HYBRID
from mim3d.weights.families.monai_vit import MONAI_VIT, MONAI_VIT_LINEAR
from mim3d.weights.families.nnssl import NNSSL_RESENC
from mim3d.weights.families.nnunet import NNUNET_PLAIN, NNUNET_RESENC
from mim3d.weights.families.primus import NNSSL_PRIMUS, PRIMUS, PRIMUS_DEEPER
from mim3d.weights.families.suprem import SUPREM_SEGRESNET, SUPREM_SWIN, SUPREM_UNET
from mim3d.weights.families.swinunetr import MONAI_SWINUNETR, OWN_SWIN, SWINUNETR_PRETRAINING
from mim3d.weights.families.three_dino import THREE_DINO
from mim3d.weights.families.voco import VOCO_10K, VOCO_LARGE
from mim3d.weights.states import HeldWeights

#: Every family; of those that a file could be of, the first counts.
FAMILIES: tuple[Family, ...] = (
    MIM,
    OWN_HYBRID,
    VOCO_LARGE,
    SUPREM_SWIN,
    SWINUNETR_PRETRAINING,
    VOCO_10K,
    MONAI_SWINUNETR,
    OWN_SWIN,
    SUPREM_UNET,
    SUPREM_SEGRESNET,
    HI_END_MAE,
    THREE_DINO,
    MAE_3D,
    MAE_2D,
    MONAI_VIT,
    MONAI_VIT_LINEAR,
    NNSSL_RESENC,
    NNUNET_RESENC,
    NNSSL_PRIMUS,
    PRIMUS,
    PRIMUS_DEEPER,
    NNUNET_PLAIN,
)


@dataclass(frozen=True)
class RecognisedWeights:
    """Weights of a family that is known.

    Attributes:
        family: The family.
        held: What the file holds.
        tensors: Tensors by our names: ``encoder.*``, and all others.
        shown: Settings of the backbone that shapes show, or that the family fixes.
        expects: What the network expects of its input.
    """

    family: Family
    held: HeldWeights
    tensors: dict[str, Tensor]
    shown: dict[str, Any]
    expects: ExpectedInput

    @property
    def encoder(self) -> dict[str, Tensor]:
        """Tensors of the encoder, without its prefix."""
        start = "encoder."
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}

    @property
    def open(self) -> list[str]:
        """Settings that neither shapes nor the family say."""
        return [name for name in self.family.open if name not in self.shown]

    @property
    def unfit(self) -> str:
        """Why no encoder can be made of the file, as the end of a sentence; empty where one can."""
        family = self.family
        if not family.backbone:
            return f": {family.why_not}, so its weights cannot be used here"
        inside = self.encoder
        if said := family.unfit(self.shown, inside, self.held):
            return said
        try:
            own = self.own_network
        except ConfigError as error:
            return f", but with settings that mim3d's {family.backbone} cannot have ({str(error).rstrip('.')})"
        # A part that ours lacks, or has in another shape, computes something else, whatever the others hold.
        others = [name for name, value in inside.items() if name not in own or own[name].shape != value.shape]
        if others:
            first = f"{cut(others[0], 60)} {tuple(inside[others[0]].shape)}"
            have = verb_of(len(others), "have")
            return (
                f", but {number_of(len(others), 'tensor')} of its encoder, the first {first}, {have} no place in "
                f"mim3d's {family.backbone}: it is another network, so its weights cannot be used here"
            )
        if family.last and family.last not in inside:
            return (
                f", but holds no {family.last}, the end of the encoder; it is not whole, so copy it again, or it is "
                "another network"
            )
        return ""

    @cached_property
    def own_network(self) -> dict[str, Tensor]:
        """The tensors of our encoder of these settings, by name, without values.

        Raises:
            ConfigError: The settings cannot be.
        """
        # Stand-ins of the same shapes: one head divides every width, and a table is there where the file has one.
        settings = {"num_heads": 1, "positions": "sincos"}
        settings = {name: value for name, value in settings.items() if name in self.open} | self.shown
        with torch.device("meta"):
            return create_recipe({"name": self.family.backbone, **settings}).build().state_dict()

    @property
    def size(self) -> str:
        """The settings in words, without the number of channels, which fits the data."""
        return ", ".join(f"{name} {value}" for name, value in self.shown.items() if name != "in_channels")


def recognised(held: HeldWeights) -> RecognisedWeights | None:
    """The family of weights, by names and shapes; None where none fits."""
    for family in FAMILIES:
        if family.is_of(held):
            expects = family.expects_in_file(held) or family.expects
            found = RecognisedWeights(family, held, family.own_tensors(held), {}, expects)
            if not family.backbone:
                return found
            encoder = found.encoder
            shown = {**family.settings(encoder), **family.settings_in_file(encoder, held)}
            for name, pattern in family.shown_by:
                if not any(re.search(pattern, path) for path in held.tensors):
                    shown.pop(name, None)
            return replace(found, shown=shown, expects=expects.of_channels(shown["in_channels"]))
    return None


def unknown_layout(held: HeldWeights) -> str:
    """What weights of no known family look like, and the nearest of them, in words."""
    names = list(held.tensors)
    # The first, the middle and the last one show more than three in a row.
    chosen = [names[place] for place in dict.fromkeys((0, len(names) // 2, len(names) - 1))]
    shown = ", ".join(f"{cut(name, 60)} {tuple(held.tensors[name].shape)}" for name in chosen)
    told = f"{number_of(len(names), 'tensor')} such as {shown}"
    nearest = max(FAMILIES, key=lambda family: family.nearness(held))
    if nearest.nearness(held) <= 0:
        return f"{told}; none of the families of weights that mim3d knows is near"
    lacks = nearest.lacks(held)
    return f"{told}; the nearest family is {nearest.name}{f', but the file lacks {lacks[0]}' if lacks else ''}"


__all__ = ["FAMILIES", "ExpectedInput", "Family", "RecognisedWeights", "recognised", "unknown_layout"]
