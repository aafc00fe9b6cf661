"""The contract every encoder keeps, whatever its architecture."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mim3d.core.errors import ConfigError

# Shape suffixes: B batch, C channels, X Y Z space, L all tokens, V visible tokens, E embedding.


class Encoder(nn.Module, ABC):
    """Maps a volume to tokens (masked pre-training) and to feature maps (everything downstream).

    Attributes:
        recipe: the settings that built it.
        strides: down-sampling of each feature map, finest first, e.g. ``(2, 4, 8, 16)``.
        widths: channels of each feature map.
        patch_size: voxels per token edge; inputs must be multiples of it along every axis.
        embed_dim: token width.
    """

    recipe: "Backbone"
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    patch_size: int
    embed_dim: int

    @abstractmethod
    def encode_visible(self, volume_BCXYZ: Tensor, visible_BV: Tensor) -> Tensor:
        """Tokens ``(B, V, E)`` of the visible places, given as raster indices ``(B, V)`` in ascending order."""

    @abstractmethod
    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        """One map ``(B, widths[i], X / strides[i], ...)`` per stage, finest first, nothing hidden."""

    @property
    def num_layers(self) -> int:
        """Layers above the stem: one for each block, and the output above them."""
        return len(self._blocks()) + 1

    def layer_of(self, name: str) -> int:
        """How deep a parameter lies: 0 for the stem, then block by block, ``num_layers`` for the output.

        As numbered for layer-wise learning rates by BEiT (Bao et al. 2022) and MAE (He et al. 2022): tokens and
        positions belong to the stem, the last norm to the output. By default the members of the outermost module lists
        are the blocks, in the order in which they were registered; what was registered between two of them belongs to
        the later one. An encoder that registers its parts in another order says otherwise.

        Args:
            name: as ``named_parameters`` gives it.
        """
        blocks = self._blocks()
        held = [number for number, prefix in enumerate(blocks, start=1) if name.startswith(prefix)]
        if held:
            return held[0]
        # Modules in the order of registration, each before what it holds: tokens and positions of the module around the
        # blocks come before them, wherever they are registered.
        order = [module for module, _ in self.named_modules()]
        place = order.index(name.rpartition(".")[0])
        before = sum(order.index(prefix.removesuffix(".")) < place for prefix in blocks)
        return before + 1 if before else 0

    def _blocks(self) -> list[str]:
        """Prefixes of the parameters of every block, in order of depth."""
        lists: dict[str, int] = {}
        for name, module in self.named_modules():
            if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
                lists[name] = len(module)
        return [f"{name}.{number}." for name, length in lists.items() for number in range(length)]


@dataclass(frozen=True, kw_only=True)
class Backbone(ABC):
    """Settings of an encoder: what a user writes and YAML stores.

    Attributes:
        in_channels: channels of the input volume.
        decoder_dim: width of the decoder that belongs to this size in masked pre-training.
        decoder_depth: its blocks.
        decoder_num_heads: its attention heads.
    """

    in_channels: int = 1
    decoder_dim: int = 576
    decoder_depth: int = 8
    decoder_num_heads: int = 16

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Voxels per token edge."""

    @abstractmethod
    def build(self) -> Encoder:
        """The module; raises ConfigError for settings that cannot work together."""


def check_multiple(size: Sequence[int], stride: int, what: str = "input size") -> None:
    """Refuse a size with an axis that is no multiple of ``stride``, naming the nearest that are.

    Raises:
        ConfigError: naming the axis, its value and the sizes that fit.
    """
    for axis, voxels in zip("XYZ", size, strict=True):
        if voxels % stride or voxels <= 0:
            below = voxels // stride * stride
            fits = f"{below} or {below + stride}" if below > 0 else f"{stride}"
            raise ConfigError(f"{what} axis {axis} ({voxels}) is not a multiple of stride {stride}; use {fits}.")
