"""What methods share that hide places of scans and predict them: largest share of air, decoder, least rate."""

import math
from dataclasses import dataclass

from mim3d.backbones import Hybrid, ResEnc, Swin, ViT
from mim3d.backbones.contract import Backbone
from mim3d.core.errors import ConfigError
from mim3d.methods.crops import AIR_SHARE, VariedMethod, require_share

#: Width, blocks and heads of the decoder in proportion to each ready size, known by the widths of its stages.
DECODERS = {
    (24, 48, 96): (96, 2, 4),
    (24, 48, 96, 192): (288, 8, 8),
    (64, 128, 256, 512): (768, 8, 16),
    (96, 192, 384, 768): (1152, 8, 16),
    (96,): (96, 2, 4),
    (192,): (192, 4, 4),
    (384,): (288, 8, 8),
    (768,): (576, 8, 16),
    (1024,): (768, 8, 16),
}

#: The published decoder: that of the sizes tiny and base, and of every backbone that is no ready size.
PUBLISHED_DECODER = (576, 8, 16)

#: Floors under the paper's learning rate, by the largest width of the coarsest map that each is for: of those tried the
#: least at which the losses fall as far as at higher ones and the probe beats a random encoder
#: (benchmarks/learning_rates.py; docs/concepts/learning-rates.md says which widths were measured).
RATE_FLOORS = ((96, 1e-3), (192, 1e-3), (384, 3e-4), (512, 2e-4))

#: The floor of tokens wider than those, and of backbones of other kinds.
WIDEST_FLOOR = 1e-4

#: Largest width, depth and number of heads of what is learned beside the encoder.
LARGEST_DIM = 4096


@dataclass(frozen=True, kw_only=True)
class MaskedMethod(VariedMethod):
    """Settings of a method that hides places of crops, drawn at random.

    Attributes:
        max_air: A sample of whose voxels (those that are read; the mean over its crops) a larger share is air is drawn
            anew, up to 8 times in all, and the one with least air is kept; null keeps every first draw, as the paper
            does.
    """

    max_air: float | None = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("max_air", self.max_air, AIR_SHARE)

    def least_learning_rate(self, backbone: Backbone) -> float:
        """The floor for the width of the coarsest map."""
        width = backbone.widths[-1] if isinstance(backbone, (Hybrid, ViT, Swin, ResEnc)) else math.inf
        return next((rate for widest, rate in RATE_FLOORS if width <= widest), WIDEST_FLOOR)


@dataclass(frozen=True, kw_only=True)
class MaskedAutoencoding(MaskedMethod):
    """Settings of a method that reconstructs hidden tokens from visible ones with a transformer as the decoder.

    Attributes:
        normalise_targets: Reconstruct each token's voxels at mean 0 and variance 1.
        decoder_dim: Width of the decoder; in proportion to the backbone when left out, see ``DECODERS``.
        decoder_depth: Its blocks.
        decoder_num_heads: Its attention heads.
    """

    normalise_targets: bool = True
    decoder_dim: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decoder_dim", "decoder_depth", "decoder_num_heads"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST_DIM:
                raise ConfigError(f"method.{name} ({value}) must be between 1 and {LARGEST_DIM}.")

    def decoder(self, backbone: Backbone) -> tuple[int, int, int]:
        """Width, blocks and heads of the decoder: as set, else in proportion to the backbone.

        Raises:
            ConfigError: The width is no multiple of the heads.
        """
        widths = backbone.widths if isinstance(backbone, (Hybrid, ViT)) else ()
        own_dim, own_depth, own_heads = DECODERS.get(widths, PUBLISHED_DECODER)
        dim, num_heads = self.decoder_dim or own_dim, self.decoder_num_heads or own_heads
        if dim % num_heads:
            raise ConfigError(
                f"method.decoder_dim ({dim}) is not a multiple of method.decoder_num_heads ({num_heads}); "
                "choose heads that divide it."
            )
        return dim, self.decoder_depth or own_depth, num_heads
