"""MiM's network and losses: reconstruction at every level, alignment between adjacent levels."""

import torch
from torch import Tensor, nn

from mim3d.backbones.base import Encoder
from mim3d.data.transforms import resize_image
from mim3d.methods.hierarchy import Geometry, Hierarchy
from mim3d.nn.blocks import Mlp, init_linear
from mim3d.nn.decoder import TokenDecoder
from mim3d.nn.losses import (
    alignment_logits,
    contrastive_alignment,
    cosine_alignment,
    reconstruction_loss,
)
from mim3d.nn.masks import split_units, take_tokens, visible_indices
from mim3d.nn.patches import patchify, unpatchify
from mim3d.objective import Batch, Objective, StepOutput

# Shape suffixes: B samples, n volumes of a level per sample, M = B x n, C channels, X Y Z space, L tokens, H hidden
# units or tokens, D decoder width, A alignment width.

#: A place whose voxels vary less than this (in mapped intensities) is air: no negative for any child.
CONSTANT_STD = 1e-3


class MiMObjective(Objective):
    """One shared encoder and decoder over all levels of a hierarchy.

    Args:
        encoder: maps visible tokens.
        hierarchy: the checked levels.
        in_channels: channels of the input.
        decoder_dim: width of the decoder.
        decoder_depth: its blocks.
        decoder_num_heads: its heads.
        normalise_targets: reconstruct each token's voxels at mean 0 and variance 1.
        contrastive: cross-entropy over places, else the cosine form.
        alignment_weight: weight of each alignment term.
        alignment_dim: width of the shared MLP's output.
        temperature: of the contrastive form.
        batch_negatives: contrast with the hidden places of every parent in the batch.
        chunk_size: volumes per encoder call; None for all of a level.
    """

    def __init__(
        self,
        encoder: Encoder,
        hierarchy: Hierarchy,
        *,
        in_channels: int,
        decoder_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        normalise_targets: bool,
        contrastive: bool,
        alignment_weight: float,
        alignment_dim: int,
        temperature: float,
        batch_negatives: bool,
        chunk_size: int | None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.hierarchy = hierarchy
        self.in_channels = in_channels
        self.normalise_targets = normalise_targets
        self.contrastive = contrastive
        self.alignment_weight = alignment_weight
        self.temperature = temperature
        self.batch_negatives = batch_negatives
        self.chunk_size = chunk_size
        voxels = encoder.patch_size**3 * in_channels
        self.decoder = TokenDecoder(encoder.embed_dim, decoder_dim, decoder_depth, decoder_num_heads, voxels)
        children = [geometry.level.name for geometry in hierarchy.levels[1:]]
        self.project = nn.ModuleDict({name: Mlp(decoder_dim, decoder_dim, alignment_dim) for name in children})
        self.predict = nn.ModuleDict(
            {} if contrastive else {name: Mlp(alignment_dim, alignment_dim, alignment_dim) for name in children}
        )
        self.project.apply(init_linear)
        self.predict.apply(init_linear)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Sum of the levels' reconstruction losses and the weighted alignment terms, each logged by name."""
        volumes = self.level_volumes(batch)
        logs: dict[str, Tensor] = {}
        features: list[Tensor] = []
        losses: list[Tensor] = []
        for geometry, volume_MCXYZ in zip(self.hierarchy.levels, volumes, strict=True):
            hidden_ML = batch[f"hidden/{geometry.level.name}"].flatten(0, 1)
            features_MLD, predicted_MHP = self._autoencode(volume_MCXYZ, hidden_ML, geometry)
            target_MHP = take_tokens(patchify(volume_MCXYZ, self.encoder.patch_size), visible_indices(~hidden_ML))
            loss = reconstruction_loss(predicted_MHP, target_MHP, normalised=self.normalise_targets)
            logs[f"loss/{geometry.level.name}"] = loss.detach()
            losses.append(geometry.level.loss_weight * loss)
            features.append(features_MLD)
        for index in range(1, len(features)):
            loss, named = self._align(batch, index, volumes[index - 1], features[index - 1], features[index])
            losses.append(self.alignment_weight * loss)
            logs.update(named)
        return StepOutput(torch.stack(losses).sum(), logs)

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

    def _autoencode(self, volume_MCXYZ: Tensor, hidden_ML: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        chunk = self.chunk_size or len(volume_MCXYZ)
        visible = [
            self.encoder.encode_visible(volume, hidden)
            for volume, hidden in zip(torch.split(volume_MCXYZ, chunk), torch.split(hidden_ML, chunk), strict=True)
        ]
        features_MLD = self.decoder(torch.cat(visible), hidden_ML, geometry.token_grid)
        return features_MLD, self.decoder.predict_hidden(features_MLD, hidden_ML)

    def _align(
        self, batch: Batch, index: int, parent_volume: Tensor, parent_MLD: Tensor, child_MLD: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Alignment of the children at level ``index`` with the hidden places of their parents."""
        parent, name = self.hierarchy.levels[index - 1], self.hierarchy.levels[index].level.name
        hidden_units = self._hidden_units(batch, parent)
        places_MHA = self.project[name](self._hidden_places(parent_MLD, hidden_units, parent))
        usable_MH = self._varied_places(parent_volume, hidden_units, parent)
        child_A = self.project[name](child_MLD.mean(1))
        num_children = parent.level.num_children
        parent_of = torch.arange(len(places_MHA), device=child_A.device).repeat_interleave(num_children)
        place = batch[f"place/{name}"].flatten(0, 1)
        own = (hidden_units[parent_of] == place[:, None]).int().argmax(1)
        if self.batch_negatives:
            own_place = own + parent_of * places_MHA.shape[1]
            logits = alignment_logits(child_A, places_MHA.flatten(0, 1), self.temperature)
            usable = usable_MH.flatten().expand_as(logits)
        else:
            own_place = own
            logits = alignment_logits(child_A, places_MHA[parent_of], self.temperature)
            usable = usable_MH[parent_of]
        loss, accuracy = contrastive_alignment(logits, own_place, usable)
        if not self.contrastive:
            loss = cosine_alignment(self.predict[name](child_A), places_MHA[parent_of, own])
        normed = nn.functional.normalize(child_A.detach().float(), dim=-1)
        spread = normed.std(0, correction=0).mean() * normed.shape[1] ** 0.5
        chance = loss.new_tensor(1.0 / logits.shape[1])
        named = {"loss": loss.detach(), "accuracy": accuracy.detach(), "chance": chance, "spread": spread}
        return loss, {f"{key}/align_{name}": value for key, value in named.items()}

    def _hidden_units(self, batch: Batch, parent: Geometry) -> Tensor:
        """Raster indices ``(M, H)`` of the parent's hidden units."""
        hidden_ML = batch[f"hidden/{parent.level.name}"].flatten(0, 1)
        by_unit = split_units(hidden_ML.reshape(-1, *parent.token_grid, 1), parent.unit_grid)
        return visible_indices(~by_unit[:, :, 0, 0])

    @staticmethod
    def _hidden_places(features_MLD: Tensor, hidden_units: Tensor, parent: Geometry) -> Tensor:
        """Mean decoder token ``(M, H, D)`` inside each hidden place."""
        grid = features_MLD.reshape(len(features_MLD), *parent.token_grid, -1)
        return take_tokens(split_units(grid, parent.unit_grid).mean(2), hidden_units)

    @staticmethod
    def _varied_places(volume_MCXYZ: Tensor, hidden_units: Tensor, parent: Geometry) -> Tensor:
        """Hidden places ``(M, H)`` that are no air: their voxels vary."""
        by_unit = split_units(volume_MCXYZ.movedim(1, -1), parent.unit_grid)
        varied = by_unit.float().std(2, correction=0).amax(-1) > CONSTANT_STD
        return varied.gather(1, hidden_units)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Original, masked and reconstructed first volume of every level, first channel, as ``(X, Y, Z)``."""
        first = {key: value[:1] for key, value in batch.items()}
        pictures: dict[str, Tensor] = {}
        for geometry, volume in zip(self.hierarchy.levels, self.level_volumes(first), strict=True):
            name = geometry.level.name
            volume, hidden = volume[:1], first[f"hidden/{name}"][0, :1]
            patches = patchify(volume, self.encoder.patch_size).float()
            _, predicted = self._autoencode(volume, hidden, geometry)
            predicted = predicted.float()
            if self.normalise_targets:
                own = take_tokens(patches, visible_indices(~hidden))
                predicted = predicted * (own.var(-1, keepdim=True) + 1e-6).sqrt() + own.mean(-1, keepdim=True)
            masked = patches.masked_fill(hidden[..., None], 0.0)
            rebuilt = patches.masked_scatter(hidden[..., None].expand_as(patches), predicted)
            for kind, tokens in (("original", patches), ("masked", masked), ("reconstructed", rebuilt)):
                pictures[f"{name}/{kind}"] = unpatchify(tokens, geometry.token_grid, self.encoder.patch_size)[0, 0]
        return pictures


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
