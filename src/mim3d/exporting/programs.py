"""Networks as programs: ``torch.export`` archives (.pt2) and ONNX files, each with a description beside it.

The hot operations of training are operators of mim3d's own. Here they become what they compute, so that a program runs
where mim3d is not installed, on any device. Every program is compared with its network before it is kept.
"""

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.core.files import write_json
from mim3d.core.progress import say
from mim3d.core.types import Triple
from mim3d.exporting.networks import Exported, formula, label_rule, terms_of
from mim3d.nn.blocks import Projection
from mim3d.weights import IN_CARD

# Shape suffixes: R rows (voxels), C channels, H hidden channels.

#: Largest difference allowed, as a share of the largest value of an output. Rounding in float32 gives 1e-6 to 1e-4
#: (the most where a network has flat input to normalise); a wrong operator gives more than 1e-2.
TOLERANCE = 5e-4

#: Seed of the inputs that are compared.
SEED = 20

#: Entries of a card that go along with a program.
_OF_CARD = ("backbone", "data_digest", "mim3d_version", "scores", "learnt", "evaluation", "warnings", IN_CARD)

#: Packages that ONNX files are made and compared with.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

#: Tensors beyond this go into a file beside: an ONNX file holds 2 GB at most.
LARGEST_FILE_BYTES = 1_500_000_000


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
    # The records of the lines of source code that each node came from name folders of this machine.
    for module in graph.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
                node.meta.pop("from_node", None)
    # They would be stored with the program, and may be larger than it.
    graph.example_inputs = None
    return graph


@contextmanager
def _plain_projections(program: nn.Module) -> Iterator[None]:
    """Compute projections of patches as strided convolutions, which any runtime knows.

    Their own way depends on the number of voxels, which would tie a program to that of the samples it was traced with.
    """

    def plain_projection(module: Projection, features_NXYZC: Tensor) -> Tensor:
        features_NCXYZ = features_NXYZC.permute(0, 4, 1, 2, 3)
        out = F.conv3d(features_NCXYZ, module.weight, module.bias, stride=module.kernel_size)
        return out.permute(0, 2, 3, 4, 1)

    projections = [module for module in program.modules() if isinstance(module, Projection)]
    for module in projections:
        module.forward = partial(plain_projection, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in projections:
            del module.forward


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


def write_program(network: Exported, path: Path) -> tuple[ExportedProgram, dict[str, "Parity"]]:
    """Write a network as a ``.pt2`` archive, read it back and compare it.

    Returns:
        The program, and its differences to the network, see :func:`compared`.

    Raises:
        CheckpointError: The program computes something else.
    """
    graph = traced(network.form.program, network.num_channels, network.patch_size)
    # By way of memory, since torch's own writer ends the process where the disk is full.
    packed = io.BytesIO()
    with quiet():
        torch.export.save(graph, packed)
    path.write_bytes(packed.getbuffer())
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
        say(f"{what}: {name}: {parity}")
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
    size = network.patch_size
    noise = torch.randn(2, network.num_channels, *size, generator=generator)
    # Air, soft tissue and bone in smooth shapes with a little noise, mapped as the network's input is.
    coarse = torch.randn(1, network.num_channels, *(max(2, edge // 12) for edge in size), generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="trilinear", align_corners=True)
    image = torch.where(smooth < -0.2, 0.0, torch.where(smooth > 0.8, 1.0, 0.5))
    image = (image + 0.03 * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    if (network.card.get("intensity") or {}).get("kind") == "zscore":
        image = (image - image.mean()) / image.std()
    return {"random input": noise, "scan-like input": image}


def write_torch_program(network: Exported, folder: Path) -> None:
    """Write ``model.pt2`` and ``metadata.json`` into a folder that exists and is empty.

    Raises:
        CheckpointError: The program computes something else once it is read back.
    """
    graph, parity = write_program(network, folder / "model.pt2")
    results = graph.graph_module.graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    shapes = [["batch", *(int(size) for size in result.meta["val"].shape[1:])] for result in results]
    content = described(network, parity, dict(zip(network.form.outputs, shapes, strict=True)))
    write_json(folder / "metadata.json", content, remedy=None)


def check_onnx() -> None:
    """Refuse where the packages for ONNX are missing.

    Raises:
        ConfigError: The sentence names them, and how to install them.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format onnx needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}; install with: "
            "pip install 'mim3d[onnx]'."
        )


def write_onnx(network: Exported, folder: Path) -> None:
    """Write ``model.onnx`` and ``metadata.json`` into a folder that exists and is empty.

    Raises:
        CheckpointError: ONNX Runtime computes something else.
    """
    import onnxruntime

    path, program = folder / "model.onnx", network.form.program
    size_bytes = sum(value.numel() * value.element_size() for value in program.state_dict().values())
    graph = traced(program, network.num_channels, network.patch_size)
    # The exporter logs which optional packages it does without; none of them is needed.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet():
            torch.onnx.export(
                graph,
                (),
                path,
                dynamo=True,
                input_names=["image"],
                output_names=list(network.form.outputs),
                external_data=size_bytes > LARGEST_FILE_BYTES,
            )
    finally:
        logger.setLevel(level)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(values) for values in session.run(None, {"image": image.numpy()})]

    parity = compared(network, run, path.name)
    shapes = {output.name: ["batch", *output.shape[1:]] for output in session.get_outputs()}
    write_json(folder / "metadata.json", described(network, parity, shapes), remedy=None)


def described(
    network: Exported, parity: Mapping[str, Parity], output_shapes: Mapping[str, list[Any]]
) -> dict[str, Any]:
    """Return the content of ``metadata.json`` beside a program.

    Args:
        network: The network.
        parity: Differences between network and program that were measured at export, by the name of the input.
        output_shapes: Shape of each output by its name.
    """
    card, form = network.card, network.form
    preprocessing: dict[str, Any] = {
        "orientation": card.get("orientation", "RAS+"),
        "spacing_mm": card.get("spacing_mm"),
        "intensity": card.get("intensity"),
        "intensity_formula": formula(card.get("intensity")),
        "padding": "each channel's darkest value (of CT at least -1024 HU), mapped like all others",
    }
    if form.box is not None:
        preprocessing["box"] = dict(form.box)
    meaning = f"logits of the channels; {form.activation} gives probabilities"
    if form.activation is None:
        meaning = "feature map, one voxel for every {stride} of the input along each axis"
    content: dict[str, Any] = {
        "format": 1,
        "network": network.kind,
        "license": network.license,
        "terms": terms_of(network),
        "modality": network.modality,
        "input": {
            "name": "image",
            "dtype": "float32",
            "shape": ["batch", network.num_channels, *network.patch_size],
            "axes": "samples, channels, then X (to the right), Y (to the front), Z (to the head): RAS+ voxel order",
        },
        "preprocessing": preprocessing,
        "outputs": [
            {
                "name": name,
                "dtype": "float32",
                "shape": output_shapes[name],
                "meaning": meaning.format(stride=name.removeprefix("features_stride")),
            }
            for name in form.outputs
        ],
        "parity": {name: {"absolute": value.absolute, "relative": value.relative} for name, value in parity.items()},
        "card": {key: card[key] for key in _OF_CARD if key in card},
    }
    if form.channels:
        content["channels"] = list(form.channels)
        content["activation"] = form.activation
    if form.label_values:
        content["label_values"] = list(form.label_values)
        content["label_map"] = label_rule(network)
    return content
