"""MiM, Mask in Mask (Zhuang et al., arXiv 2404.15580, IEEE TMI 44(9):3727-3740, 2025)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

from mim3d.backbones.contract import Backbone, VisibleEncoder
from mim3d.backbones.hybrid import Hybrid
from mim3d.core.errors import ConfigError
from mim3d.core.names import number_of
from mim3d.core.types import Triple
from mim3d.methods.contract import Method
from mim3d.methods.mim.hierarchy import (
    Hierarchy,
    Level,
    check_padding,
    describe_levels,
    full_levels,
    padding_ratio,
    plan_levels,
    why_fewer_levels,
)
from mim3d.methods.mim.objective import MiMObjective
from mim3d.methods.mim.sampler import MiMSampler
from mim3d.training.schedule import Optimisation

#: A normalised reconstruction loss above this has learned nothing (1 is the loss of a constant guess).
IDLE_LOSS = 0.98

#: Width, blocks and heads of the decoder in proportion to each ready size, known by the widths of its stages.
DECODERS = {
    (24, 48, 96): (96, 2, 4),
    (24, 48, 96, 192): (288, 8, 8),
    (64, 128, 256, 512): (768, 8, 16),
    (96, 192, 384, 768): (1152, 8, 16),
}

#: The published decoder: that of the sizes tiny and base, and of every backbone that is no ready size.
PUBLISHED_DECODER = (576, 8, 16)

#: Floors under the paper's learning rate, by the largest width of the tokens that each is for: of the rates tried the
#: least at which the losses fall as far as at higher ones and the probe beats a random encoder
#: (benchmarks/learning_rates.py; docs/concepts/learning-rates.md says which widths were measured).
RATE_FLOORS = ((96, 1e-3), (192, 1e-3), (384, 3e-4), (512, 2e-4))

#: The floor of tokens wider than those, and of backbones of other kinds.
WIDEST_FLOOR = 1e-4

#: Largest width, depth and number of heads of what is learned beside the encoder.
_LARGEST_DIM = 4096


@dataclass(frozen=True, kw_only=True)
class MiM(Method):
    """Settings of MiM, mask in mask: hidden places of nested crops are reconstructed, their levels aligned.

    Attributes:
        levels: The hierarchy, coarsest first; planned from the scans when left out.
        normalise_targets: Reconstruct each token's voxels at mean 0 and variance 1.
        alignment: Form of the cross-level alignment.
        alignment_weight: Weight of each alignment term.
        alignment_dim: Width of the shared MLP's output.
        temperature: Temperature of the contrastive form.
        negatives: ``parent`` contrasts a child with the hidden places of its own parent, ``batch`` with those of every
            parent in the batch.
        decoder_dim: Width of the decoder; in proportion to the backbone when left out, see ``DECODERS``.
        decoder_depth: Its blocks.
        decoder_num_heads: Its attention heads.
        flip_prob: Probability of a flip along each axis, one draw for the whole hierarchy.
        intensity_gain: The hierarchy's intensities are multiplied by 1 plus or minus at most this.
        intensity_bias: And shifted by at most this.
        pyramid: Read reduced levels from the cache's coarser resolutions, on whose voxels the hierarchy then lies;
            False reads full resolution, averages it, and lets the hierarchy begin at any voxel.
        max_air: A hierarchy of whose voxels (those that are read; the mean over its volumes) a larger share is air is
            drawn anew, up to 8 times in all, and the one with least air is kept; null keeps every first draw, as the
            paper does.
        chunk_size: Volumes per encoder call; what suits the device when left out (4 on a CPU, else all of a level).
    """

    levels: tuple[Level, ...] | None = None
    normalise_targets: bool = True
    alignment: Literal["contrastive", "cosine"] = "contrastive"
    alignment_weight: float = 0.1
    alignment_dim: int = 256
    temperature: float = 0.1
    negatives: Literal["parent", "batch"] = "parent"
    decoder_dim: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None
    flip_prob: float = 0.5
    intensity_gain: float = 0.1
    intensity_bias: float = 0.1
    pyramid: bool = True
    max_air: float | None = 0.5
    chunk_size: int | None = None

    needs = VisibleEncoder

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(f"method.temperature ({self.temperature}) must be positive; the default is 0.1.")
        for name in ("alignment_dim", "decoder_dim", "decoder_depth", "decoder_num_heads"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= _LARGEST_DIM:
                raise ConfigError(f"method.{name} ({value}) must be between 1 and {_LARGEST_DIM}.")
        if self.alignment_weight < 0:
            raise ConfigError(f"method.alignment_weight ({self.alignment_weight}) must be zero or more, such as 0.1.")
        for name in ("intensity_gain", "intensity_bias"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"method.{name} ({getattr(self, name)}) must lie between 0 (none) and 1.")
        if not 0 <= self.flip_prob <= 1:
            raise ConfigError(f"method.flip_prob ({self.flip_prob}) is no probability; use 0 to 1.")
        if self.max_air is not None and not 0 <= self.max_air <= 1:
            raise ConfigError(f"method.max_air ({self.max_air}) is no share; use 0 to 1, or null for no limit.")
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

    def least_learning_rate(self, backbone: Backbone) -> float:
        """The floor that was measured for tokens of this width."""
        width = backbone.widths[-1] if isinstance(backbone, Hybrid) else math.inf
        return next((rate for widest, rate in RATE_FLOORS if width <= widest), WIDEST_FLOOR)

    def hierarchy(self, backbone: Backbone) -> Hierarchy:
        """The checked hierarchy for a backbone's tokens; raises ConfigError as :class:`Hierarchy` does."""
        return Hierarchy(self.levels or full_levels(backbone.token_size), backbone.token_size)

    def decoder(self, backbone: Backbone) -> tuple[int, int, int]:
        """Width, blocks and heads of the decoder: as set, else in proportion to the backbone.

        Raises:
            ConfigError: The width is no multiple of the heads.
        """
        widths = backbone.widths if isinstance(backbone, Hybrid) else ()
        own_dim, own_depth, own_heads = DECODERS.get(widths, PUBLISHED_DECODER)
        dim, num_heads = self.decoder_dim or own_dim, self.decoder_num_heads or own_heads
        if dim % num_heads:
            raise ConfigError(
                f"method.decoder_dim ({dim}) is not a multiple of method.decoder_num_heads ({num_heads}); "
                "choose heads that divide it."
            )
        return dim, self.decoder_depth or own_depth, num_heads

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
        return lines

    def details(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """Tokens of each level, the share of the work that it takes, alignment terms and padding."""
        hierarchy = self.hierarchy(backbone)
        levels = [geometry.level for geometry in hierarchy.levels]
        lines = []
        work = [geometry.num_volumes * math.prod(geometry.token_grid) for geometry in hierarchy.levels]
        for geometry, tokens in zip(hierarchy.levels, work, strict=True):
            grid = "x".join(str(count) for count in geometry.token_grid)
            lines.append(
                f"level {geometry.level.name}: {grid} tokens, {geometry.num_hidden_units} of "
                f"{number_of(geometry.num_units, 'unit')} hidden, {number_of(geometry.num_volumes, 'volume')}, "
                f"{tokens / sum(work):.0%} of the tokens"
            )
        lines.append(
            f"alignment terms: {len(levels) - 1}; "
            f"padding: {padding_ratio(levels[0].footprint, shapes):.0%} of a crop on average"
        )
        return lines

    def sampler(self, backbone: Backbone) -> MiMSampler:
        """Draws a hierarchy and its masks."""
        return MiMSampler(self, self.hierarchy(backbone))

    def build(self, backbone: Backbone) -> MiMObjective:
        """Encoder, decoder and alignment heads."""
        self.check_backbone(backbone)
        return MiMObjective(self, backbone)

    def idle_parts(self, final_logs: dict[str, float]) -> list[str]:
        """Levels whose normalised reconstruction never left the loss of a constant guess."""
        if not self.normalise_targets:
            return []
        names = [level.name for level in self.levels or ()]
        return [
            f"level {name} is idle: its reconstruction loss ended at {final_logs[f'loss/{name}']:.3f} "
            "(1 is nothing learned); train longer, raise the learning rate, or leave the level out"
            for name in names
            if final_logs.get(f"loss/{name}", 0.0) > IDLE_LOSS
        ]
