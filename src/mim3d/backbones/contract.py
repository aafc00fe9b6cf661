"""The contract that every encoder keeps, whatever its architecture, and what some encoders can do besides."""

import importlib.util
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple

#: Most voxels of an input.
LARGEST_VOXELS = 2**25

# Shape suffixes: B batch, C channels, X Y Z space, L all tokens, V visible tokens, E embedding.


class Encoder(nn.Module, ABC):
    """Maps a volume to feature maps.

    Attributes:
        recipe: The settings that built it.
        strides: Down-sampling of each feature map along every axis, finest first, such as ``(2, 4, 8, 16)``. A network
            of one resolution has one.
        widths: Channels of each feature map.
    """

    recipe: "Backbone"
    strides: tuple[int, ...]
    widths: tuple[int, ...]

    @abstractmethod
    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        """One map ``(B, widths[i], X / strides[i], ...)`` for each stride, finest first, with nothing hidden."""

    def forward(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        """The feature maps."""
        return self.feature_maps(volume_BCXYZ)

    @property
    def input_multiple(self) -> Triple:
        """Voxels along X, Y, Z that the sizes of an input must be multiples of."""
        return self.recipe.input_multiple

    @property
    def token_size(self) -> Triple:
        """Voxels of one token along X, Y, Z."""
        return self.recipe.token_size

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
            name: Name of the parameter, as ``named_parameters`` gives it.
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


class VisibleEncoder(Encoder):
    """An encoder that can be shown the visible tokens of a volume alone, as masked autoencoders need.

    Attributes:
        embed_dim: Width of a token.
    """

    embed_dim: int

    @abstractmethod
    def encode_visible(self, volume_BCXYZ: Tensor, visible_BV: Tensor) -> Tensor:
        """Tokens ``(B, V, E)`` that depend on the visible places alone.

        Args:
            volume_BCXYZ: The whole volume. What it holds at hidden tokens must not matter.
            visible_BV: Raster indices of the visible tokens, in ascending order.
        """


class MaskTokenEncoder(Encoder):
    """An encoder that can compute with a learned token in the places of hidden ones, as SimMIM needs (Xie et al. 2022).

    Attributes:
        stem_size: Voxels along X, Y, Z of a token of the stem, which is what the learned token replaces.
        stem_dim: Width of such a token.
    """

    stem_size: Triple
    stem_dim: int

    @abstractmethod
    def masked_feature_maps(self, volume_BCXYZ: Tensor, hidden_BXYZ: Tensor, token_E: Tensor) -> list[Tensor]:
        """The maps of :meth:`feature_maps`, with hidden places shown as the learned token.

        Args:
            volume_BCXYZ: The whole volume. What it holds at hidden places must not matter.
            hidden_BXYZ: Boolean, True where a token of the stem is hidden, ``(B, X / stem_size[0], ...)``.
            token_E: The learned token ``(stem_dim,)``.
        """


@dataclass(frozen=True, kw_only=True)
class Backbone(ABC):
    """Settings of an encoder: what a user writes and YAML stores.

    Attributes:
        in_channels: Channels of the input volume.
        segmentation_decoder: Name of the decoder that segmentation plans for its encoder.
        packages: Optional packages that the encoder needs, as they are imported -> the extra that installs each.
    """

    in_channels: int = 1

    segmentation_decoder: ClassVar[str] = "adapter"
    packages: ClassVar[Mapping[str, str]] = {}

    @property
    @abstractmethod
    def encoder_class(self) -> type[Encoder]:
        """Class of the network, which is called with these settings."""

    @property
    @abstractmethod
    def input_multiple(self) -> Triple:
        """Voxels along X, Y, Z that the sizes of an input must be multiples of."""

    @property
    def token_size(self) -> Triple:
        """Voxels of one token along X, Y, Z, by default the least input."""
        return self.input_multiple

    @property
    def learned_size(self) -> Triple | None:
        """Voxels along X, Y, Z of the volume that learned positions are for; None where positions are computed."""
        return None

    def check_machine(self) -> None:
        """Refuse a machine that lacks an optional package that the encoder needs.

        Raises:
            ConfigError: The sentence says how to install it.
        """
        for package, extra in self.packages.items():
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"backbone {type(self).__name__} needs the package {package.replace('_', '-')}, which is not "
                    f"installed; use pip install 'mim3d[{extra}]'."
                )

    def build(self) -> Encoder:
        """A freshly initialised network.

        Raises:
            ConfigError: The settings cannot work together.
        """
        return self.encoder_class(self)


def check_multiple(size: Sequence[int], multiple: Triple, what: str = "input size") -> None:
    """Refuse a size with an axis that is no multiple of what it must be, naming the nearest that are.

    Args:
        size: Voxels along X, Y, Z.
        multiple: What each of them must be a multiple of.
        what: Beginning of the sentence of an error, such as ``patch_size``.

    Raises:
        ConfigError: The sentence names the axis, its value and the sizes that fit.
    """
    for axis, voxels, step in zip("XYZ", size, multiple, strict=True):
        if voxels % step or voxels <= 0:
            below = voxels // step * step
            fits = f"{below} or {below + step}" if below > 0 else f"{step}"
            raise ConfigError(f"{what} axis {axis} ({voxels}) is not a multiple of stride {step}; use {fits}.")


def check_patch(size: Sequence[int], multiple: Triple, what: str = "patch_size") -> None:
    """Refuse the size of a network's input that is no multiple of what it must be, or too large for any machine.

    Args:
        size: Voxels along X, Y, Z.
        multiple: What each of them must be a multiple of.
        what: Beginning of the sentence of an error.

    Raises:
        ConfigError: The sentence names the size.
    """
    check_multiple(size, multiple, what)
    if math.prod(size) > LARGEST_VOXELS:
        raise ConfigError(
            f"{what} {list(size)} has {math.prod(size):,} voxels; it must have at most {LARGEST_VOXELS:,}, such as 320 "
            "along every axis."
        )


def check_axes(axes: Sequence[int], what: str) -> None:
    """Refuse what are no axes, or the same axis twice.

    Args:
        axes: Axes of a volume, 0 for X, 1 for Y, 2 for Z.
        what: Beginning of the sentence of an error, such as ``mirror_axes``.

    Raises:
        ConfigError: The sentence names the axes.
    """
    if not set(axes) <= {0, 1, 2} or len(set(axes)) < len(axes):
        raise ConfigError(f"{what} {list(axes)} must name axes among 0 (X), 1 (Y) and 2 (Z), each of them once.")


def round_up(size: Sequence[float], multiple: Triple, largest: int | None = None) -> Triple:
    """The least multiples that hold a size.

    Args:
        size: Voxels along X, Y, Z.
        multiple: What each result must be a multiple of.
        largest: Edge that no result exceeds unless it is a single multiple; None for no limit.
    """
    whole = (max(1, -int(-voxels // step)) for voxels, step in zip(size, multiple, strict=True))
    limits = (max(1, largest // step) if largest else math.inf for step in multiple)
    x, y, z = (int(min(have, limit)) * step for have, limit, step in zip(whole, limits, multiple, strict=True))
    return x, y, z


def common_multiple(*sizes: Triple) -> Triple:
    """The least common multiples of sizes along X, Y, Z."""
    x, y, z = (math.lcm(*axis) for axis in zip(*sizes, strict=True))
    return x, y, z


def drop_paths_of(drop_path: float, depths: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Chance that a block is left out, by stage: l / L of the last one's for block l of L (Huang et al. 2016).

    Args:
        drop_path: Chance of the last block.
        depths: Blocks per stage.
    """
    total, number = sum(depths), itertools.count(1)
    return tuple(tuple(drop_path * next(number) / total for _ in range(depth)) for depth in depths)


def size_text(size: Triple) -> str:
    """A size in an error or a report: ``16`` for a cube, ``16 x 16 x 8`` for anything else."""
    return str(size[0]) if len(set(size)) == 1 else " x ".join(map(str, size))
