"""Networks as graphs of the library's own operators, and whether they compute what the network computes.

The hot operations of training are operators of mim3d's own. Here they become what they compute, so that a program runs
where mim3d is not installed, on any device.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec
from torch.nn import functional as F

from mim3d.core.errors import CheckpointError
from mim3d.core.types import Triple
from mim3d.exporting.networks import Exported
from mim3d.nn.blocks import Projection

# Shape suffixes: R rows (voxels), C channels, H hidden channels.

#: Largest difference allowed, as a share of the largest value of an output. Rounding in float32 gives 1e-6 to 1e-4
#: (the most where a network has flat input to normalise); a wrong operator gives more than 1e-2.
TOLERANCE = 5e-4

#: Seed of the inputs that are compared.
SEED = 20


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
    """Compute what ``mim3d::residual_mlp`` does in float32: ``x + W2 gelu(W1 LN(x) + b1) + b2``."""
    normed_RC = F.layer_norm(features_RC, norm_weight_C.shape, norm_weight_C, norm_bias_C, eps)
    hidden_RH = F.gelu(F.linear(normed_RC, weight_HC, bias_H))
    return features_RC + F.linear(hidden_RH, out_weight_CH, out_bias_C)


@torch.no_grad()
def traced(program: nn.Module, num_channels: int, patch_size: Triple) -> ExportedProgram:
    """Trace a program as a graph over ``image`` ``(B, C, *patch_size)`` with any number ``B`` of samples.

    The spatial size is fixed: position embeddings are a table of its token grid.

    Args:
        program: The program, in evaluation mode, on the CPU.
        num_channels: Number of channels of the input.
        patch_size: Voxels of the input along X, Y, Z.
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
    """Compute what a projection does, channels last."""
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


def write_program(network: Exported, path: Path) -> tuple[ExportedProgram, dict[str, "Parity"]]:
    """Write a network as a ``.pt2`` archive, read it back and compare it.

    Returns:
        The program, and its differences to the network, see :func:`compared`.

    Raises:
        CheckpointError: The program computes something else.
    """
    graph = traced(network.form.program, network.num_channels, network.patch_size)
    with quiet():
        torch.export.save(graph, path)
    module = read_own_program(path)
    return graph, compared(network, lambda image: outputs_of(module(image)), path.name)


def read_own_program(path: Path) -> nn.Module:
    """Read an archive that was just written; ``torch.export.load`` is no safe way to read a stranger's."""
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
    """Return what a program gave as a list."""
    return list(result) if isinstance(result, (tuple, list)) else [result]


@dataclass(frozen=True)
class Parity:
    """The largest difference between a program and its network.

    Attributes:
        absolute: The difference in units of the output.
        relative: The same as a share of the largest value of that output.
    """

    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"largest difference {self.absolute:.1e} ({self.relative:.1e} of the largest value)"


def compared(network: Exported, run: Callable[[Tensor], Sequence[Tensor]], what: str) -> dict[str, Parity]:
    """Run a program and the network on the same inputs; each comparison is printed.

    Args:
        network: The network.
        run: Gives the program's outputs, in order, for ``(B, C, X, Y, Z)`` float32.
        what: Name of the file, for messages.

    Returns:
        The larger difference of all outputs, by the name of the input.

    Raises:
        CheckpointError: It differs by more than ``TOLERANCE``, or gives outputs of another number or shape.
    """
    results = {}
    for name, image in inputs_for(network).items():
        with torch.no_grad():
            parity = difference(outputs_of(network.form.program(image)), list(run(image)))
        if parity is None or not parity.relative <= TOLERANCE:
            shown = "outputs of other shapes" if parity is None else str(parity)
            raise CheckpointError(
                f"{what} does not compute what its network does ({name}: {shown}; allowed are {TOLERANCE:.0e}); it was "
                "deleted: try other versions of torch and of the format's packages."
            )
        print(f"{what}: {name}: {parity}")
        results[name] = parity
    return results


def difference(reference: Sequence[Tensor], given: Sequence[Tensor]) -> Parity | None:
    """Return the largest difference; None where number or shapes do not agree, infinite where a value is no number."""
    if [tuple(tensor.shape) for tensor in reference] != [tuple(tensor.shape) for tensor in given]:
        return None
    worst = Parity(0.0, 0.0)
    for expected, got in zip(reference, given, strict=True):
        absolute = float((expected - got).abs().max())
        relative = absolute / max(float(expected.abs().max()), 1e-12)
        if not relative <= worst.relative:
            worst = Parity(absolute, relative)
    return worst


def inputs_for(network: Exported) -> dict[str, Tensor]:
    """Return what is compared: two samples of noise, and one sample of intensities such as a scan has."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (network.num_channels, *network.patch_size)
    noise = torch.randn(2, *shape, generator=generator)
    intensity = network.card.get("intensity") or {}
    return {"random input": noise, "scan-like input": _scan_like(shape, intensity.get("kind"), generator)}


def _scan_like(shape: tuple[int, ...], kind: str | None, generator: torch.Generator) -> Tensor:
    """Air, soft tissue and bone in smooth shapes with a little noise, mapped as the network's input is."""
    channels, *size = shape
    coarse = torch.randn(1, channels, *(max(2, edge // 12) for edge in size), generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="trilinear", align_corners=True)
    image = torch.where(smooth < -0.2, 0.0, torch.where(smooth > 0.8, 1.0, 0.5))
    image = (image + 0.03 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    if kind == "zscore":
        return (image - image.mean()) / image.std()
    return image
