"""Networks as ``torch.export`` programs (.pt2), read back at export and compared."""

from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from mim3d.core.files import write_json
from mim3d.exporting.description import described
from mim3d.exporting.networks import Exported
from mim3d.exporting.parity import Parity, compared
from mim3d.exporting.programs import outputs_of, read_own_program, save_program, traced

PROGRAM_NAME = "model.pt2"


def write_torch_program(network: Exported, folder: Path, *, license: str | None, modality: str | None) -> None:
    """Write ``model.pt2`` and ``metadata.json`` into a folder.

    Args:
        network: the network.
        folder: where to; it exists and is empty.
        license: id of the licence of the weights.
        modality: what the scans are.
    Raises:
        CheckpointError: the program computes something else once it is read back.
    """
    graph, parity = written_program(network, folder / PROGRAM_NAME)
    content = described(network, parity, _shapes(network, graph), license=license, modality=modality)
    write_json(folder / "metadata.json", content)


def written_program(network: Exported, path: Path) -> tuple[ExportedProgram, dict[str, Parity]]:
    """Write a program, read it back and compare it.

    Raises:
        CheckpointError: it computes something else.
    """
    graph = traced(network.form.program, network.num_channels, network.patch_size)
    save_program(graph, path)
    module = read_own_program(path)
    return graph, compared(network, lambda image: outputs_of(module(image)), path.name)


def _shapes(network: Exported, graph: ExportedProgram) -> dict[str, list[Any]]:
    """Shape of each output, of the graph's own record."""
    results = graph.graph_module.graph.output_node().args[0]
    assert isinstance(results, (tuple, list))
    shapes = [["batch", *(int(size) for size in result.meta["val"].shape[1:])] for result in results]
    return dict(zip(network.form.outputs, shapes, strict=True))
