"""nnU-Net's residual encoder (Isensee et al., "nnU-Net Revisited", MICCAI 2024), from the package that nnU-Net uses.

Blocks and widths are those of nnU-Net's presets. Parameters have the names that nnU-Net's checkpoints give them, so
that ``--weights`` takes those of a network that was planned with as many stages.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mim3d.backbones.contract import Backbone, Encoder, check_multiple, drop_paths_of
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.nn.blocks import InstanceNorm

# Shape suffixes: B batch, C channels, X Y Z space.

#: Slope of the leaky ReLU below zero, which the first weights are drawn for as well.
_SLOPE = 0.01


@dataclass(frozen=True, kw_only=True)
class ResEnc(Backbone):
    """Settings of the residual encoder; the defaults are ResEnc-L, as the OpenMind benchmark publishes it.

    nnU-Net's presets share blocks and widths. They differ in the crops that their memory allows, and so in the number
    of stages: each halves the grid while an edge has 8 places or more.

    Attributes:
        widths: Channels of each stage. The first works at full resolution, every other one halves the grid.
        depths: Residual blocks of each stage.
        recompute: Trade time for memory: recompute the blocks in the backward pass.
        drop_path: Chance that a sample goes without the branch of the last block, in training; falls linearly to the
            first block (stochastic depth).
    """

    widths: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    depths: tuple[int, ...] = (1, 3, 4, 6, 6, 6)
    recompute: bool = False
    drop_path: float = 0.0

    segmentation_decoder: ClassVar[str] = "nnunet"
    packages: ClassVar[Mapping[str, str]] = {"dynamic_network_architectures": "resenc"}

    def __post_init__(self) -> None:
        for name, values, most in (
            ("in_channels", (self.in_channels,), 1024),
            ("widths", self.widths, 2**16),
            ("depths", self.depths, 1000),
        ):
            if len(values) > 8 or not all(1 <= value <= most for value in values):
                shown = ", ".join(map(str, values[:9]))
                raise ConfigError(f"backbone {name} {shown} must be at most 8 numbers, each from 1 to {most}.")
        if len(self.widths) != len(self.depths) or len(self.widths) < 2:
            raise ConfigError(
                f"backbone widths {list(self.widths)} and depths {list(self.depths)} must have "
                "one entry per stage, two stages or more."
            )
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path is {self.drop_path}; it must lie between 0 and 1 (1 excluded), such as 0.1.")

    @property
    def encoder_class(self) -> "type[ResEncEncoder]":
        """The network."""
        return ResEncEncoder

    @property
    def input_multiple(self) -> Triple:
        """The stride of the last stage along each axis."""
        edge: int = 2 ** (len(self.widths) - 1)
        return edge, edge, edge


class ResEncEncoder(Encoder):
    """A convolution and residual blocks at full resolution, then stages of residual blocks at strides 2, 4, ...

    Args:
        recipe: Its settings.

    Raises:
        ConfigError: The package that the network is from is missing.
    """

    def __init__(self, recipe: ResEnc) -> None:
        super().__init__()
        recipe.check_machine()
        from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder
        from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
        from dynamic_network_architectures.initialization.weight_init import (
            InitWeights_He,
            init_last_bn_before_add_to_0,
        )

        num_stages = len(recipe.widths)
        self.recipe: ResEnc = recipe
        self.strides = tuple(2**stage for stage in range(num_stages))
        self.widths = recipe.widths
        network = ResidualEncoder(
            recipe.in_channels,
            num_stages,
            list(recipe.widths),
            nn.Conv3d,
            kernel_sizes=3,
            strides=[1] + [2] * (num_stages - 1),
            n_blocks_per_stage=list(recipe.depths),
            conv_bias=True,
            norm_op=InstanceNorm,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"negative_slope": _SLOPE, "inplace": True},
            stochastic_depth_p=recipe.drop_path,
        )
        network.apply(InitWeights_He(_SLOPE))
        network.apply(init_last_bn_before_add_to_0)
        self.stem, self.stages = network.stem, network.stages
        for module in self.modules():
            if isinstance(module, ConvDropoutNormReLU):
                # It holds its layers a second time, in their order: not in files, which must hold no tensor twice.
                module.__dict__["all_modules"] = module._modules.pop("all_modules")
        if recipe.drop_path:
            for stage, drop_paths in zip(self.stages, drop_paths_of(recipe.drop_path, recipe.depths), strict=True):
                for block, drop_path in zip(stage.blocks, drop_paths, strict=True):
                    block.drop_path.drop_prob = drop_path

    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        """Maps ``(B, widths[i], X / strides[i], ...)`` of all stages, that of full resolution first.

        Raises:
            ConfigError: An axis of the input is no multiple of the last stride.
        """
        check_multiple(tuple(volume_BCXYZ.shape[2:]), self.input_multiple)
        features = self.stem(volume_BCXYZ)
        maps = []
        for stage in self.stages:
            for block in stage.blocks:
                if self.recipe.recompute and torch.is_grad_enabled():
                    features = checkpoint(block, features, use_reentrant=False)
                else:
                    features = block(features)
            maps.append(features)
        return maps

    @property
    def num_layers(self) -> int:
        """Layers above the stem: every residual block; the last one is the output."""
        return sum(self.recipe.depths)

    def layer_of(self, name: str) -> int:
        """Layer of a parameter: 0 for the stem, then block by block over all stages."""
        if not name.startswith("stages."):
            return 0
        _, stage, _, block, *_ = name.split(".")
        firsts = [0, *itertools.accumulate(self.recipe.depths)]
        return firsts[int(stage)] + int(block) + 1
