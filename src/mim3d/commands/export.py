"""The command that brings trained networks into the formats of other programs."""

from mim3d.core.command import command
from mim3d.workflows.export import ExportSettings, export_network


@command(ExportSettings)
def export(settings: ExportSettings) -> str:
    """Export a trained network for use elsewhere: Hugging Face, ONNX, torch.export, MONAI or nnU-Net.

    Files of all formats but safetensors are read back and run beside the network, on noise and on intensities such as
    a scan has; the largest difference is printed, and a file that differs is refused and deleted.
    """
    return export_network(settings)
