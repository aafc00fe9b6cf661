"""Networks as ONNX files, run by ONNX Runtime at export and compared."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mim3d.core.files import write_json
from mim3d.exporting.description import described
from mim3d.exporting.networks import Exported
from mim3d.exporting.output import require_packages
from mim3d.exporting.parity import compared
from mim3d.exporting.programs import quiet, traced

MODEL_NAME = "model.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")

#: Tensors beyond this go into a file beside: an ONNX file holds 2 GB at most.
LARGEST_FILE_BYTES = 1_500_000_000


def check_onnx() -> None:
    """Refuse where the packages for ONNX are missing.

    Raises:
        ConfigError: naming them.
    """
    require_packages(PACKAGES, "--format onnx", "onnx")


def write_onnx(network: Exported, folder: Path, *, license: str | None, modality: str | None) -> None:
    """Write ``model.onnx`` and ``metadata.json`` into a folder.

    Args:
        network: the network.
        folder: where to; it exists and is empty.
        license: id of the licence of the weights.
        modality: what the scans are.
    Raises:
        CheckpointError: ONNX Runtime computes something else.
    """
    path = folder / MODEL_NAME
    size_bytes = sum(value.numel() * value.element_size() for value in network.form.program.state_dict().values())
    graph = traced(network.form.program, network.num_channels, network.patch_size)
    with quiet(), _silent_exporter():
        torch.onnx.export(
            graph,
            (),
            path,
            dynamo=True,
            input_names=["image"],
            output_names=list(network.form.outputs),
            external_data=size_bytes > LARGEST_FILE_BYTES,
        )
    session = _session(path)
    parity = compared(network, lambda image: _run(session, image), MODEL_NAME)
    shapes = {output.name: ["batch", *output.shape[1:]] for output in session.get_outputs()}
    write_json(folder / "metadata.json", described(network, parity, shapes, license=license, modality=modality))


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _run(session: Any, image: Tensor) -> Sequence[Tensor]:
    return [torch.from_numpy(values) for values in session.run(None, {"image": image.numpy()})]


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """The exporter logs which optional packages it does without; none of them is needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
