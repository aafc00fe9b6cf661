"""How features are probed."""

from dataclasses import dataclass
from typing import Literal

from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple


@dataclass(frozen=True, kw_only=True)
class Probing:
    """Settings of a probe.

    Attributes:
        features: `last`: the tokens of the encoder's last map; `all`: beside them all other maps, averaged to tokens.
        crop_size: Voxels of the crops that the encoder sees, multiples of its token edge; None plans what the median
            scan has, at most 96 along each axis. Label maps only.
        crops_per_scan: Crops of each scan, each with a token centred on a voxel of one of its labels, in turn.
        tokens_per_label: Tokens of each label and scan, at most.
        clear_ratio: Share of a token's voxels that must carry one label, else the token is left out.
        num_neighbours: K of the nearest-neighbour classifier.
        temperature: Temperature of the votes' weights.
        l2: Weight of the squared coefficients in the linear classifier's loss.
    """

    features: Literal["last", "all"] = "last"
    crop_size: int | Triple | None = None
    crops_per_scan: int = 4
    tokens_per_label: int = 16
    clear_ratio: float = 0.6
    num_neighbours: int = 20
    temperature: float = 0.07
    l2: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("crops_per_scan", "tokens_per_label", "num_neighbours"):
            if getattr(self, name) < 1:
                raise ConfigError(f"probing.{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0.5 <= self.clear_ratio <= 1:
            raise ConfigError(f"probing.clear_ratio is {self.clear_ratio}; a majority is 0.5 to 1.")
        for name in ("temperature", "l2"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"probing.{name} is {getattr(self, name)}; it must be above 0.")
