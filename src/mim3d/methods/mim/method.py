"""MiM, Mask in Mask (Zhuang et al., arXiv 2404.15580, IEEE TMI 44(9):3727-3740, 2025)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from mim3d.backbones.contract import Backbone, VisibleEncoder
from mim3d.core.errors import ConfigError
from mim3d.core.names import number_of
from mim3d.core.types import Triple
from mim3d.methods.contract import ALL_CONSTANT, COLLAPSED_SPREAD, idle_part
from mim3d.methods.crops import by_text, padding_ratio
from mim3d.methods.masked import LARGEST_DIM, MaskedAutoencoding
from mim3d.methods.mim.hierarchy import (
    Hierarchy,
    Level,
    check_padding,
    describe_levels,
    full_levels,
    plan_levels,
    why_fewer_levels,
)
from mim3d.methods.mim.objective import MiMObjective
from mim3d.methods.mim.sampler import HierarchySampler
from mim3d.training.schedule import Optimisation


@dataclass(frozen=True, kw_only=True)
class MiM(MaskedAutoencoding):
    """Settings of MiM, mask in mask: hidden places of nested crops are reconstructed, their levels aligned.

    Attributes:
        levels: The hierarchy, coarsest first; planned from the scans when left out.
        alignment: Form of the cross-level alignment.
        alignment_weight: Weight of each alignment term.
        alignment_dim: Width of the shared MLP's output.
        temperature: Temperature of the contrastive form.
        negatives: ``parent`` contrasts a child with the hidden places of its own parent, ``batch`` with those of every
            parent in the batch.
        pyramid: Read reduced levels from the cache's coarser resolutions, on whose voxels the hierarchy then lies;
            False reads full resolution, averages it, and lets the hierarchy begin at any voxel.
        chunk_size: Volumes per encoder call; what suits the device when left out (4 on a CPU, else all of a level).
    """

    levels: tuple[Level, ...] | None = None
    alignment: Literal["contrastive", "cosine"] = "contrastive"
    alignment_weight: float = 0.1
    alignment_dim: int = 256
    temperature: float = 0.1
    negatives: Literal["parent", "batch"] = "parent"
    pyramid: bool = True
    chunk_size: int | None = None

    needs = VisibleEncoder

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigError(f"method.temperature ({self.temperature}) must be positive; the default is 0.1.")
        if not 1 <= self.alignment_dim <= LARGEST_DIM:
            raise ConfigError(f"method.alignment_dim ({self.alignment_dim}) must be between 1 and {LARGEST_DIM}.")
        if self.alignment_weight < 0:
            raise ConfigError(f"method.alignment_weight ({self.alignment_weight}) must be zero or more, such as 0.1.")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ConfigError(f"method.chunk_size ({self.chunk_size}) must be at least 1 volume.")

    @property
    def optimisation(self) -> Optimisation:
        """AdamW of the paper: base rate 1e-4 for 256 hierarchies, 5 % warm-up (40 of 800 epochs), cosine to 0."""
        return Optimisation(
            base_learning_rate=1e-4,
            reference_batch=256,
            weight_decay=0.05,
            betas=(0.9, 0.95),
            warmup_ratio=0.05,
        )

    def hierarchy(self, backbone: Backbone) -> Hierarchy:
        """The checked hierarchy for a backbone's tokens; raises ConfigError as :class:`Hierarchy` does."""
        return Hierarchy(self.levels or full_levels(backbone.token_size), backbone.token_size)

    def planned(self, backbone: Backbone, shapes: Sequence[Triple]) -> Self:
        """These settings with a hierarchy and a decoder; refuses a hierarchy that is mostly padding on these scans."""
        levels = self.levels or plan_levels(backbone.token_size, shapes)
        check_padding(levels, backbone.token_size, shapes)
        dim, depth, num_heads = self.decoder(backbone)
        planned = replace(self, levels=levels, decoder_dim=dim, decoder_depth=depth, decoder_num_heads=num_heads)
        planned.hierarchy(backbone)
        return planned

    def summary(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """The hierarchy, and a note where a level has few tokens."""
        hierarchy = self.hierarchy(backbone)
        levels = [geometry.level for geometry in hierarchy.levels]
        lines = [f"hierarchy: {describe_levels(levels)}; {number_of(hierarchy.num_volumes, 'volume')} per sample"]
        lines += why_fewer_levels(levels, backbone.token_size, shapes)
        if any(min(geometry.token_grid) < 4 for geometry in hierarchy.levels):
            lines.append("note: a level with fewer than 4 tokens along an axis has little to tell hidden places by")
        if self.alignment == "cosine" and (self.temperature, self.negatives) != (MiM.temperature, MiM.negatives):
            lines.append(
                "note: temperature and negatives are of the contrastive alignment; the cosine form has neither"
            )
        return lines

    def details(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """Tokens of each level, the share of the work that it takes, alignment terms and padding."""
        hierarchy = self.hierarchy(backbone)
        levels = [geometry.level for geometry in hierarchy.levels]
        lines = []
        work = [geometry.num_volumes * math.prod(geometry.token_grid) for geometry in hierarchy.levels]
        for geometry, tokens in zip(hierarchy.levels, work, strict=True):
            lines.append(
                f"level {geometry.level.name}: {by_text(geometry.token_grid)} tokens, {geometry.num_hidden_units} of "
                f"{number_of(geometry.num_units, 'unit')} hidden, {number_of(geometry.num_volumes, 'volume')}, "
                f"{tokens / sum(work):.0%} of the tokens"
            )
        lines.append(
            f"alignment terms: {len(levels) - 1}; "
            f"padding: {padding_ratio(levels[0].footprint, shapes):.0%} of a crop on average"
        )
        return lines

    def sampler(self, backbone: Backbone) -> HierarchySampler:
        """Draws a hierarchy and its masks."""
        return HierarchySampler(self, self.hierarchy(backbone), pyramid=self.pyramid)

    def build(self, backbone: Backbone) -> MiMObjective:
        """Encoder, decoder and alignment heads."""
        self.check_backbone(backbone)
        return MiMObjective(self, backbone)

    def idle_parts(self, final_logs: dict[str, float]) -> list[str]:
        """Levels that are reconstructed, and alignments that find places, no better than by a guess; collapse.

        What has the weight 0 is not to learn anything, and nothing is said of it.
        """
        levels = self.levels or ()
        children = [level.name for level in levels[1:]] if self.alignment_weight else []
        # What aligns well learns: then it is alignment that keeps the level from it (docs/concepts/evidence.md).
        remedy = "lower alignment_weight, " if any(_finds_places(final_logs, name) for name in children) else ""
        remedy += "train longer, raise the learning rate, or leave the level out"
        sentences: list[str] = []
        for level in levels:
            if level.loss_weight:
                part = f"level {level.name}"
                sentences += idle_part(final_logs, level.name, part, nothing=ALL_CONSTANT, remedy=remedy)
        for name in children:
            sentences += _idle_alignment(final_logs, name)
        return sentences


def _idle_alignment(final_logs: dict[str, float], level: str) -> list[str]:
    """What is to be said of the alignment of a level with the one above it, if anything."""
    part, name = f"the alignment of level {level}", f"align_{level}"
    spread = final_logs.get(f"spread/{name}", 1.0)
    if spread < COLLAPSED_SPREAD:
        return [
            f"{part} has collapsed: the vectors of all its volumes are nearly the same (spread {spread:.4f}, where 1 "
            "is as if drawn at random); lower the learning rate"
        ]
    nothing = "no other hidden place of a parent is more than air, and there is none to tell a child's from"
    return idle_part(final_logs, name, part, nothing=nothing, guess="a guess")


def _finds_places(final_logs: dict[str, float], level: str) -> bool:
    """Whether children of a level find their places twice as often as by chance, and not by first weights alone."""
    accuracy, chance = (final_logs.get(f"{kind}/align_{level}") for kind in ("accuracy", "chance"))
    often = accuracy is not None and chance is not None and accuracy > 2 * chance
    return often and not _idle_alignment(final_logs, level)
