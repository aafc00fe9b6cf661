"""Networks as programs with a description beside them: ``torch.export`` archives (.pt2) and ONNX files."""

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mim3d.core.errors import ConfigError
from mim3d.core.files import write_json
from mim3d.exporting.description import described
from mim3d.exporting.networks import Exported
from mim3d.exporting.programs import compared, quiet, traced, write_program

#: Packages that ONNX files are made and compared with.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

#: Tensors beyond this go into a file beside: an ONNX file holds 2 GB at most.
LARGEST_FILE_BYTES = 1_500_000_000


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
    write_json(folder / "metadata.json", content)


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
    write_json(folder / "metadata.json", described(network, parity, shapes))
