"""SwinUNETR's pre-training (Tang et al., "Self-Supervised Pre-Training of Swin Transformers", CVPR 2022)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from mim3d.backbones.contract import Backbone, check_multiple
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.methods.contract import ALL_CONSTANT, COLLAPSED_SPREAD, Method, idle_part
from mim3d.methods.crops import (
    AIR_SHARE,
    PROBABILITY,
    by_text,
    check_crop,
    median_shape,
    padding_ratio,
    require_share,
)
from mim3d.methods.swinunetr_ssl.objective import ThreeTasksObjective
from mim3d.methods.swinunetr_ssl.views import BodyCrops, CutOut
from mim3d.training.schedule import Optimisation

#: Largest edge of a planned crop, the paper's.
PUBLISHED_EDGE = 96

#: Most boxes that are drawn for a view, and largest width of the contrast.
_MOST_BOXES, _LARGEST_DIM = 4096, 2**16


@dataclass(frozen=True, kw_only=True)
class SwinUNETRSSL(Method):
    """Settings of SwinUNETR's pre-training: two turned views of a crop with boxes cut out, and three tasks.

    Attributes:
        size: Voxels of a crop along X, Y, Z, as many along X as along Y; planned from the scans when left out.
        cut_ratio: Largest share of a view's voxels that is cut out; every view draws its own, from 0 up to it.
        box_ratio: Least and largest edge of a box that is cut out, as a share of each axis.
        swap_prob: Chance that a box shows another crop of the batch instead of noise. A batch of one crop has noise
            alone.
        contrast_dim: Width of the vectors that views are told from each other by.
        temperature: Temperature of the contrast.
        loss_weights: Weights of inpainting, rotation and contrast.
        max_air: A crop of whose voxels a larger share is air is drawn anew, up to 8 times in all, and the one with
            least air is kept; null keeps every first draw.
    """

    size: Triple | None = None
    cut_ratio: float = 0.3
    box_ratio: tuple[float, float] = (0.05, 0.25)
    swap_prob: float = 0.5
    contrast_dim: int = 512
    temperature: float = 0.5
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    max_air: float | None = 0.5

    def __post_init__(self) -> None:
        if self.size is not None and (self.size[0] != self.size[1] or min(self.size) < 1):
            raise ConfigError(
                f"method.size {list(self.size)} must be as long along X as along Y, since crops are turned in that "
                f"plane; use {self.size[0]} {self.size[0]} {self.size[2]}."
            )
        if not 0 <= self.cut_ratio <= 0.9:
            raise ConfigError(f"method.cut_ratio ({self.cut_ratio}) must lie between 0 (none) and 0.9.")
        if not 0 < self.box_ratio[0] <= self.box_ratio[1] <= 1:
            raise ConfigError(
                f"method.box_ratio {list(self.box_ratio)} must be two shares of an axis, such as 0.05 0.25."
            )
        require_share("swap_prob", self.swap_prob, PROBABILITY)
        if not 1 <= self.contrast_dim <= _LARGEST_DIM:
            raise ConfigError(f"method.contrast_dim ({self.contrast_dim}) must be between 1 and {_LARGEST_DIM}.")
        if not 1e-3 <= self.temperature <= 1e3:
            raise ConfigError(f"method.temperature ({self.temperature}) must lie between 0.001 and 1000, such as 0.5.")
        if not all(0 <= weight <= 1e6 for weight in self.loss_weights) or not any(self.loss_weights):
            raise ConfigError(
                f"method.loss_weights {list(self.loss_weights)} must be zero or more, not all of them zero."
            )
        require_share("max_air", self.max_air, AIR_SHARE)

    @property
    def optimisation(self) -> Optimisation:
        """AdamW of the paper: rate 4e-4, weight decay 0.1, 500 steps of warm-up, gradients of norm 1 at most."""
        return Optimisation(learning_rate=4e-4, weight_decay=0.1, warmup_steps=500, clip_norm=1.0)

    @property
    def cut_out(self) -> CutOut:
        """What is cut out of views."""
        return CutOut(self.cut_ratio, self.box_ratio, self.swap_prob)

    def crop_size(self, backbone: Backbone) -> Triple:
        """Voxels of a crop: as planned, else the largest within the paper's."""
        return self.size or _fitting(backbone.input_multiple, (PUBLISHED_EDGE,) * 3)

    def planned(self, backbone: Backbone, shapes: Sequence[Triple]) -> Self:
        """These settings with the size of a crop; refuses crops that are mostly padding on these scans."""
        fitting = _fitting(backbone.input_multiple, median_shape(shapes))
        size = self.size or fitting
        check_multiple(size, backbone.input_multiple, "method.size")
        check_crop("method.size", size, fitting, shapes, otherwise="use a backbone whose input may be smaller")
        boxes = self.cut_out.num_boxes(size)
        if boxes > _MOST_BOXES:
            raise ConfigError(
                f"method.box_ratio {list(self.box_ratio)}: to cut out {self.cut_ratio:.0%} of a view took {boxes} such "
                f"boxes, and {_MOST_BOXES} are the most; use larger boxes, such as 0.05 0.25."
            )
        return replace(self, size=size)

    def summary(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """The crop and what is made of it, and what the contrast compares."""
        low, high = self.box_ratio
        return [
            f"two views of a crop of {by_text(self.crop_size(backbone))} voxels, turned in plane, up to "
            f"{self.cut_ratio:.0%} of each cut out in boxes of {low:.0%} to {high:.0%} of an axis",
            "contrast: with the views of the other crops of a batch, in each process on its own",
        ]

    def details(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """Padding."""
        return [f"padding: {padding_ratio(self.crop_size(backbone), shapes):.0%} of a crop on average"]

    def sampler(self, backbone: Backbone) -> BodyCrops:
        """Draws a crop."""
        return BodyCrops(self.crop_size(backbone), self.max_air)

    def build(self, backbone: Backbone) -> ThreeTasksObjective:
        """Encoder and three heads."""
        self.check_backbone(backbone)
        return ThreeTasksObjective(self, backbone)

    def idle_parts(self, final_logs: dict[str, float]) -> list[str]:
        """Tasks no better solved than by a guess, a contrast without negatives, features that have collapsed."""
        sentences = []
        for task, weight in zip(("inpainting", "rotation", "contrast"), self.loss_weights, strict=True):
            nothing = ALL_CONSTANT
            if task == "contrast":
                nothing = "a batch of one crop has no other to tell it from; use --batch_size 2 or more"
            if weight:
                sentences += idle_part(final_logs, task, task, nothing=nothing, guess="a guess")
        if final_logs.get("spread/features", 1.0) < COLLAPSED_SPREAD:
            sentences.append(
                f"the features have collapsed: their spread over views ended at {final_logs['spread/features']:.4f} "
                "(1 is as if drawn at random); lower the learning rate"
            )
        return sentences


def _fitting(multiple: Triple, shape: Triple) -> Triple:
    """The largest multiples within a shape, at least one and at most those within the paper's crop; X as long as Y."""
    plane = math.lcm(*multiple[:2])
    edges = ((plane, min(shape[:2])), (plane, min(shape[:2])), (multiple[2], shape[2]))
    x, y, z = (max(1, min(PUBLISHED_EDGE // step, voxels // step)) * step for step, voxels in edges)
    return x, y, z
