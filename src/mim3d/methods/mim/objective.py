"""MiM's network and losses: reconstruction at every level, alignment between adjacent levels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mim3d.backbones.contract import Backbone, VisibleEncoder
from mim3d.core.types import Triple
from mim3d.methods.mim.hierarchy import Geometry
from mim3d.nn.blocks import Mlp, init_linear
from mim3d.nn.decoder import TokenDecoder, rebuilt
from mim3d.nn.losses import (
    SQUARED_ERROR,
    alignment_logits,
    contrastive_alignment,
    cosine_alignment,
    reconstruction_target,
    spread,
)
from mim3d.nn.tokens import split_tokens, split_units, take_tokens
from mim3d.nn.volumes import patchify, resize_image
from mim3d.objective import Batch, Objective, StepOutput, Tokens

if TYPE_CHECKING:
    from mim3d.methods.mim.method import MiM

# Shape suffixes: B samples, n volumes of a level per sample, M = B x n (those of a parent level in an alignment), K its
# children, C channels, X Y Z space, L tokens, V visible and H hidden tokens (or hidden units), D decoder width, A
# alignment width.

#: A place whose voxels vary less than this (in mapped intensities) is air: no negative for any child.
CONSTANT_STD = 1e-3

#: Volumes per encoder call on a CPU, whose caches hold the features of few; elsewhere all of a level at once.
CPU_CHUNK = 4


@dataclass(frozen=True)
class LevelBatch:
    """All volumes of one level in a batch, with their masks.

    Attributes:
        geometry: The level.
        volume_MCXYZ: What the network is shown.
        visible_MV: Raster indices of visible tokens.
        hidden_MH: Raster indices of hidden tokens.
    """

    geometry: Geometry
    volume_MCXYZ: Tensor
    visible_MV: Tensor
    hidden_MH: Tensor


@dataclass(frozen=True)
class Places:
    """The hidden places of parent volumes.

    Attributes:
        units_MH: Their raster indices among the parent's units.
        vectors_MHA: Their projected mean decoder tokens.
        varied_MH: False for air, which is no negative.
    """

    units_MH: Tensor
    vectors_MHA: Tensor
    varied_MH: Tensor


class MiMObjective(Objective):
    """One shared encoder and decoder over all levels of a hierarchy.

    Args:
        settings: Settings of the method.
        backbone: The encoder's recipe.
    Raises:
        ConfigError: The hierarchy or the decoder cannot work.
    """

    encoder: VisibleEncoder

    def __init__(self, settings: "MiM", backbone: Backbone) -> None:
        super().__init__()
        encoder = backbone.build()
        assert isinstance(encoder, VisibleEncoder)
        self.encoder = encoder
        self.settings = settings
        self.hierarchy = settings.hierarchy(backbone)
        self.tokens_per_sample = tuple(
            Tokens(g.level.name, g.num_volumes, math.prod(g.token_grid) - g.num_hidden_tokens, g.num_hidden_tokens)
            for g in self.hierarchy.levels
        )
        dim, depth, num_heads = settings.decoder(backbone)
        voxels = math.prod(encoder.token_size) * backbone.in_channels
        self.decoder = TokenDecoder(encoder.embed_dim, dim, depth, num_heads, voxels)
        children = [geometry.level.name for geometry in self.hierarchy.levels[1:]]
        predicted = children if settings.alignment == "cosine" else []
        width = settings.alignment_dim
        self.project = nn.ModuleDict({name: Mlp(dim, dim, width) for name in children})
        self.predict = nn.ModuleDict({name: Mlp(width, width, width) for name in predicted})
        self.project.apply(init_linear)
        self.predict.apply(init_linear)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Sum of the levels' reconstruction losses and the weighted alignment terms, each logged by name.

        Beside each is that of a guess, which knows nothing; the cosine form of alignment has none. And the share of air
        in what was read of the scans, where the batch says it.
        """
        levels = self.levels(batch)
        features = self._features(levels)
        logs: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for level, features_MLD in zip(levels, features, strict=True):
            name, volume_MCXYZ = level.geometry.level.name, level.volume_MCXYZ
            voxels_MHP = take_tokens(patchify(volume_MCXYZ, self.encoder.token_size), level.hidden_MH)
            target_MHP = reconstruction_target(voxels_MHP, normalised=self.settings.normalise_targets)
            loss = SQUARED_ERROR(self.decoder.predict(features_MLD, level.hidden_MH), target_MHP)
            logs[f"loss/{name}"] = loss.detach()
            logs[f"guess/{name}"] = SQUARED_ERROR.guess(target_MHP, volume_MCXYZ.shape[1])
            losses.append(level.geometry.level.loss_weight * loss)
        for index in range(1, len(levels)):
            loss, named = self.alignment(batch, levels[index - 1], index, features[index - 1], features[index])
            losses.append(self.settings.alignment_weight * loss)
            logs.update(named)
        if "air" in batch:
            logs["air"] = batch["air"].mean()
        return StepOutput(torch.stack(losses).sum(), logs)

    def levels(self, batch: Batch) -> list[LevelBatch]:
        """Every level's volumes and masks."""
        levels = []
        for geometry, volume_MCXYZ in zip(self.hierarchy.levels, self.level_volumes(batch), strict=True):
            hidden_ML = batch[f"hidden/{geometry.level.name}"].flatten(0, 1)
            levels.append(LevelBatch(geometry, volume_MCXYZ, *split_tokens(hidden_ML, geometry.num_hidden_tokens)))
        return levels

    def level_volumes(self, batch: Batch) -> list[Tensor]:
        """Every level's volumes ``(B n, C, *size)``: as read, or sliced from an ancestor at native resolution."""
        volumes: list[Tensor] = []
        for geometry in self.hierarchy.levels:
            name = geometry.level.name
            if geometry.source is None:
                volumes.append(batch[name].flatten(0, 1))
            else:
                corners = batch[f"corner/{name}"].flatten(0, 1)
                sliced = slice_volumes(volumes[geometry.source], corners, geometry.level.footprint)
                volumes.append(resize_image(sliced, geometry.level.size))
        return volumes

    def _features(self, levels: Sequence[LevelBatch]) -> list[Tensor]:
        """Decoder features ``(M, L, D)`` of every level; levels of one token grid are decoded as one batch."""
        chunk_size = self.settings.chunk_size
        encoded = [encode_in_chunks(self.encoder, level.volume_MCXYZ, level.visible_MV, chunk_size) for level in levels]
        by_grid: dict[Triple, list[int]] = {}
        for index, level in enumerate(levels):
            by_grid.setdefault(level.geometry.token_grid, []).append(index)
        features: dict[int, Tensor] = {}
        for grid, members in by_grid.items():
            decoded = self.decoder([(encoded[index], levels[index].visible_MV) for index in members], grid)
            features.update(zip(members, decoded.split([len(encoded[index]) for index in members]), strict=True))
        return [features[index] for index in range(len(levels))]

    def alignment(
        self, batch: Batch, parent: LevelBatch, index: int, parent_MLD: Tensor, child_MLD: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Alignment of the children at level ``index`` with the hidden places of their parents, and its logs."""
        name, geometry = self.hierarchy.levels[index].level.name, parent.geometry
        # The parent's hidden units, their projected mean tokens, and which of them are more than air.
        hidden_ML = batch[f"hidden/{geometry.level.name}"].flatten(0, 1)
        by_unit = split_units(hidden_ML.reshape(-1, *geometry.token_grid, 1), geometry.unit_grid)
        _, units_MH = split_tokens(by_unit[:, :, 0, 0], geometry.num_hidden_units)
        tokens = split_units(parent_MLD.reshape(-1, *geometry.token_grid, parent_MLD.shape[-1]), geometry.unit_grid)
        vectors_MHA = self.project[name](take_tokens(tokens.mean(2), units_MH))
        voxels = split_units(parent.volume_MCXYZ.movedim(1, -1), geometry.unit_grid)
        varied = voxels.float().std(2, correction=0).amax(-1) > CONSTANT_STD
        loss, named = align(
            self.project[name](child_MLD.mean(1)),
            Places(units_MH, vectors_MHA, varied.gather(1, units_MH)),
            batch[f"place/{name}"].flatten(0, 1),
            temperature=self.settings.temperature,
            batch_negatives=self.settings.negatives == "batch",
            predict=self.predict[name] if self.settings.alignment == "cosine" else None,
        )
        return loss, {f"{key}/align_{name}": value for key, value in named.items()}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Original, masked and reconstructed first volume of every level, first channel, as ``(X, Y, Z)``."""
        levels = self.levels({key: value[:1] for key, value in batch.items()})
        pictures: dict[str, Tensor] = {}
        for level, features_MLD in zip(levels, self._features(levels), strict=True):
            hidden_1H = level.hidden_MH[:1]
            shown = rebuilt(
                level.volume_MCXYZ[:1],
                hidden_1H,
                self.decoder.predict(features_MLD[:1], hidden_1H),
                self.encoder.token_size,
                normalised=self.settings.normalise_targets,
            )
            pictures |= {f"{level.geometry.level.name}/{kind}": picture for kind, picture in shown.items()}
        return pictures


def encode_in_chunks(
    encoder: VisibleEncoder, volume_MCXYZ: Tensor, visible_MV: Tensor, chunk_size: int | None = None
) -> Tensor:
    """Visible tokens ``(M, V, E)`` of all volumes, a few at a time.

    Args:
        encoder: The encoder.
        volume_MCXYZ: The volumes.
        visible_MV: Raster indices of their visible tokens.
        chunk_size: Volumes per call; what suits the device if not given.
    """
    default = CPU_CHUNK if volume_MCXYZ.device.type == "cpu" else len(volume_MCXYZ)
    chunks = (torch.split(tensor, chunk_size or default) for tensor in (volume_MCXYZ, visible_MV))
    return torch.cat([encoder.encode_visible(*chunk) for chunk in zip(*chunks, strict=True)])


def align(
    child_KA: Tensor,
    places: Places,
    own_unit_K: Tensor,
    *,
    temperature: float,
    batch_negatives: bool,
    predict: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Alignment loss of children with their parents' places, and what to log about it.

    Args:
        child_KA: Projected mean token of every child, children of one parent side by side.
        places: Candidate places of all parents.
        own_unit_K: The unit that each child was cut from.
        temperature: Temperature of the contrastive form.
        batch_negatives: Contrast with the hidden places of every parent, not only the child's own.
        predict: The child's predictor; the cosine form when given, else the contrastive one.
    """
    num_parents, num_places = places.units_MH.shape
    parent_K = torch.arange(num_parents, device=child_KA.device).repeat_interleave(len(child_KA) // num_parents)
    own_K = (places.units_MH[parent_K] == own_unit_K[:, None]).int().argmax(1)
    if batch_negatives:
        label_K = own_K + parent_K * num_places
        logits = alignment_logits(child_KA, places.vectors_MHA.flatten(0, 1), temperature)
        usable = places.varied_MH.flatten().expand_as(logits)
    else:
        label_K = own_K
        logits = alignment_logits(child_KA, places.vectors_MHA[parent_K], temperature)
        usable = places.varied_MH[parent_K]
    loss, accuracy, guess, chance = contrastive_alignment(logits, label_K, usable)
    guesses = {"guess": guess}
    if predict is not None:
        loss, guesses = cosine_alignment(predict(child_KA), places.vectors_MHA[parent_K, own_K]), {}
    return loss, {
        "loss": loss.detach(),
        **guesses,
        "accuracy": accuracy.detach(),
        "chance": chance.detach(),
        "spread": spread(child_KA.detach()),
    }


def slice_volumes(volume_NCXYZ: Tensor, corners_M3: Tensor, footprint: tuple[int, int, int]) -> Tensor:
    """Slices ``(M, C, *footprint)`` of ``N`` volumes; consecutive slices belong to one volume, ``M / N`` each.

    Indexed in one operation, so that corners on a GPU need not come back to the host.
    """
    per_volume = len(corners_M3) // len(volume_NCXYZ)
    device = volume_NCXYZ.device
    volume = torch.arange(len(volume_NCXYZ), device=device).repeat_interleave(per_volume)[:, None, None, None]
    x, y, z = (corners_M3[:, axis, None] + torch.arange(footprint[axis], device=device) for axis in range(3))
    sliced = volume_NCXYZ.movedim(1, -1)[volume, x[:, :, None, None], y[:, None, :, None], z[:, None, None, :]]
    return sliced.movedim(-1, 1)
