"""VoCo, volume contrast (Wu, Zhuang, Chen, CVPR 2024, arXiv 2402.17300): which part of a scan does a crop show?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from mim3d.backbones.contract import Backbone
from mim3d.core.errors import ConfigError
from mim3d.core.names import number_of
from mim3d.core.types import Triple
from mim3d.methods.contract import COLLAPSED_SPREAD
from mim3d.methods.crops import AMOUNT, PROBABILITY, VariedMethod, padding_ratio, require_share
from mim3d.methods.voco.grid import MAX_OVERLAPPED, PUBLISHED_CELLS, PUBLISHED_EDGE, CropGrid, plan_grid
from mim3d.methods.voco.objective import VoCoObjective
from mim3d.methods.voco.sampler import VoCoSampler
from mim3d.training.schedule import Optimisation

#: Crops that are no more alike to the base crops that they overlap than to others have learned nothing.
LEAST_MARGIN = 0.02

#: Largest width of the projection.
_LARGEST_DIM = 2**16


@dataclass(frozen=True, kw_only=True)
class VoCo(VariedMethod):
    """Settings of VoCo, volume contrast: how much random crops overlap with the crops of a grid is told.

    Attributes:
        crop_size: Voxels of a crop; planned where left out: 64 along each axis, or less where scans are small.
        cells: Base crops along X, Y, Z; planned where left out: 4 x 4 x 1, or what the scans hold of them.
        num_crops: Random crops per sample.
        dim: Width of the projection, hidden and out.
        momentum: Share of itself that the teacher keeps at every step.
        crop_flip_prob: Probability of a flip of each random crop along each axis, beside those of the sample.
        crop_bias: Each random crop is shifted by at most this in intensity.
        chunk_size: Crops per encoder call; all when left out, which is quicker, on CPUs too.
    """

    crop_size: Triple | None = None
    cells: Triple | None = None
    num_crops: int = 4
    dim: int = 2048
    momentum: float = 0.9
    crop_flip_prob: float = 0.2
    crop_bias: float = 0.1
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.cells is not None and not all(1 <= number <= 16 for number in self.cells):
            raise ConfigError(f"method.cells {list(self.cells)} must be three numbers from 1 to 16, such as 4 4 1.")
        for name, most in (("num_crops", 1024), ("dim", _LARGEST_DIM)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"method.{name} ({getattr(self, name)}) must be between 1 and {most}.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"method.momentum ({self.momentum}) must be 0 or more and below 1, such as 0.9.")
        super().__post_init__()
        require_share("crop_flip_prob", self.crop_flip_prob, PROBABILITY)
        require_share("crop_bias", self.crop_bias, AMOUNT)
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ConfigError(f"method.chunk_size ({self.chunk_size}) must be at least 1 crop.")

    @property
    def optimisation(self) -> Optimisation:
        """AdamW of the paper: rate 1e-4, weight decay 0.1, warm-up in 5,000 of 250,000 steps."""
        return Optimisation(learning_rate=1e-4, weight_decay=0.1, warmup_ratio=0.02)

    def grid(self) -> CropGrid:
        """The planned grid; the paper's where nothing was planned."""
        return CropGrid(self.cells or PUBLISHED_CELLS, self.crop_size or (PUBLISHED_EDGE,) * 3)

    def planned(self, backbone: Backbone, shapes: Sequence[Triple]) -> Self:
        """These settings with a grid; refuses scans that do not hold one."""
        grid = plan_grid(backbone.input_multiple, shapes, self.crop_size, self.cells)
        return replace(self, crop_size=grid.crop_size, cells=grid.cells)

    def summary(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """The grid, and where it is smaller than the paper's, that it was planned for these scans."""
        grid, published = self.grid(), VoCo().grid()
        lines = [f"grid: {grid.describe()}, {number_of(self.num_crops, 'random crop')} among them, per sample"]
        if grid.footprint < published.footprint:
            lines.append(f"smaller than the paper's ({published.describe()}), for what the scans hold")
        if grid.num_overlapped > MAX_OVERLAPPED * grid.num_bases:
            lines.append(
                f"note: a random crop overlaps {grid.num_overlapped:.1f} of {grid.num_bases} base crops on average "
                f"({published.num_overlapped:.1f} of {published.num_bases} in the paper), so it is seldom told from "
                "one; more of them along an axis, such as --method.cells 3 3 1, change that"
            )
        return lines

    def details(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """The share of padding."""
        return [f"padding: {padding_ratio(self.grid().footprint, shapes):.0%} of a grid on average"]

    def sampler(self, backbone: Backbone) -> VoCoSampler:
        """Draws the place of the grid and the random crops."""
        return VoCoSampler(self, self.grid())

    def build(self, backbone: Backbone) -> VoCoObjective:
        """Encoder, projection and their momentum teacher."""
        self.check_backbone(backbone)
        return VoCoObjective(self, backbone)

    def idle_parts(self, final_logs: dict[str, float]) -> list[str]:
        """Features that collapsed, or that do not tell where a crop lies."""
        sentences = []
        spread = min(final_logs.get(f"spread/{kind}", 1.0) for kind in ("features", "vectors"))
        if spread < COLLAPSED_SPREAD:
            sentences.append(
                f"the features have collapsed: their spread over crops ended at {spread:.3f} (1 is as if drawn at "
                "random); lower the learning rate, or give more base crops"
            )
        positive, negative = (final_logs.get(f"similarity/{kind}") for kind in ("positive", "negative"))
        if positive is not None and negative is not None and positive - negative < LEAST_MARGIN:
            sentences.append(
                "nothing was learned of places: random crops are as alike to base crops that they do not touch "
                f"({negative:.3f}) as to those that they overlap ({positive:.3f}); train longer, or raise the learning "
                "rate"
            )
        return sentences
