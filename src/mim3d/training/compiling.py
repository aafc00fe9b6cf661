"""The blocks of a network through ``torch.compile``."""

import torch
from torch import nn

from mim3d.core.errors import ConfigError
from mim3d.kernels.compiling import find_compiler
from mim3d.nn.blocks import ConvBlock, TransformerBlock

#: Shapes of input that a kind of block is compiled for: three or more stages times the levels of a hierarchy, and those
#: of validation; beyond the library's limit of 8 a block would silently not be compiled.
NUM_SHAPES = 64


def require_compiler(device_type: str) -> None:
    """Refuse to compile where nothing can.

    Raises:
        ConfigError: on a CPU without a C++ compiler.
    """
    if device_type == "cpu" and find_compiler() is None:
        raise ConfigError("compile is true, but this machine has no C++ compiler; install one, or leave it out.")


def compile_blocks(module: nn.Module) -> int:
    """Let every convolution and transformer block be compiled when it is first used; returns how many there are.

    Blocks of one kind and shape share what is compiled for them, so that it takes seconds where a whole network takes
    minutes. Names and values of parameters stay as they are.

    Raises:
        ConfigError: for a network without such blocks.
    """
    blocks = [part for part in module.modules() if isinstance(part, (ConvBlock, TransformerBlock))]
    if not blocks:
        raise ConfigError("compile is true, but this network has no blocks that mim3d compiles; leave it out.")
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, NUM_SHAPES)
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
