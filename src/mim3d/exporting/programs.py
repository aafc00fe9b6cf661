"""Networks as graphs of the library's own operators: what ONNX, torch.export and MONAI bundles are made of.

The hot operations of training are operators of mim3d's own. Here they become what they compute, so that a program runs
where mim3d is not installed, on any device.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.nn import functional as F

from mim3d.core.types import Triple
from mim3d.nn.blocks import Projection

# Shape suffixes: R rows (voxels), C channels, H hidden channels.


def plain_residual_mlp(
    features_RC: Tensor,
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    weight_HC: Tensor,
    bias_H: Tensor,
    out_weight_CH: Tensor,
    out_bias_C: Tensor,
    eps: float,
    products: torch.dtype,
) -> Tensor:
    """What ``mim3d::residual_mlp`` computes in float32: ``x + W2 gelu(W1 LN(x) + b1) + b2``."""
    normed_RC = F.layer_norm(features_RC, norm_weight_C.shape, norm_weight_C, norm_bias_C, eps)
    hidden_RH = F.gelu(F.linear(normed_RC, weight_HC, bias_H))
    return features_RC + F.linear(hidden_RH, out_weight_CH, out_bias_C)


@torch.no_grad()
def traced(program: nn.Module, num_channels: int, patch_size: Triple) -> ExportedProgram:
    """The program as a graph over ``image`` ``(B, C, *patch_size)`` with any number ``B`` of samples.

    The spatial size is fixed: position embeddings are a table of its token grid.

    Args:
        program: in evaluation mode, on the CPU.
        num_channels: channels of the input.
        patch_size: voxels of the input.
    """
    # A single sample would be taken for a constant.
    example = torch.zeros(2, num_channels, *patch_size)
    with quiet(), _plain_projections(program):
        graph = torch.export.export(program, (example,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=False)
        graph = graph.run_decompositions({torch.ops.mim3d.residual_mlp.default: plain_residual_mlp})
    _free_of_devices(graph)
    _free_of_paths(graph)
    # They would be stored with the program, and may be larger than it.
    graph.example_inputs = None
    return graph


@contextmanager
def _plain_projections(program: nn.Module) -> Iterator[None]:
    """Compute projections of patches as strided convolutions, which any runtime knows.

    Their own way depends on the number of voxels, which would tie a program to that of the samples it was traced with.
    """
    projections = [module for module in program.modules() if isinstance(module, Projection)]
    for module in projections:
        module.forward = partial(plain_projection, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in projections:
            del module.forward


def plain_projection(module: Projection, features_NXYZC: Tensor) -> Tensor:
    """What a projection computes, channels last."""
    features_NCXYZ = features_NXYZC.permute(0, 4, 1, 2, 3)
    out = F.conv3d(features_NCXYZ, module.weight, module.bias, stride=module.kernel_size)
    return out.permute(0, 2, 3, 4, 1)


def _free_of_devices(program: ExportedProgram) -> None:
    """Make a program that moves to another device with ``.to``, in place.

    Checks of the device that it was traced on go; views become reshapes, as other devices lay tensors out in other
    ways; and tables (position embeddings) become buffers, which move along.
    """
    aten = torch.ops.aten
    nodes = program.graph_module.graph
    for node in list(nodes.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            nodes.erase_node(node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    program.graph_module.recompile()
    inputs = program.graph_signature.input_specs
    for place, spec in enumerate(inputs):
        if spec.kind is InputKind.CONSTANT_TENSOR:
            assert spec.target is not None
            program.state_dict[spec.target] = program.constants.pop(spec.target)
            inputs[place] = InputSpec(InputKind.BUFFER, spec.arg, spec.target, persistent=True)


def _free_of_paths(program: ExportedProgram) -> None:
    """Drop the records of the lines of source code that each node came from: they name folders of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
                node.meta.pop("from_node", None)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a program as a ``.pt2`` archive."""
    with quiet():
        torch.export.save(program, path)


def read_own_program(path: Path) -> nn.Module:
    """The module of an archive that was just written; ``torch.export.load`` is no safe way to read a stranger's."""
    with quiet():
        module = torch.export.unflatten(torch.export.load(path))
    return module.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' notes on their own internals from the user; errors are raised all the same."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def outputs_of(result: Any) -> list[Tensor]:
    """What a program gave, as a list."""
    return list(result) if isinstance(result, (tuple, list)) else [result]
