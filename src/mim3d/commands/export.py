"""``mim3d export``: trained networks in the formats of other programs."""

from mim3d.core.types import Named, Triple


def export(
    weights: str,
    out: str,
    format: str | list[str] = "safetensors",
    network: str | None = None,
    patch_size: Triple | None = None,
    license: str | None = None,
    modality: str | None = None,
    include_seen: bool = False,
    task: str | None = None,
    backbone: Named | None = None,
    overwrite: bool = False,
) -> str:
    """Export a trained network for use elsewhere: Hugging Face, ONNX, torch.export or MONAI.

    Programs (all formats but safetensors) are read back and run beside the network, on noise and on intensities such as
    a scan has; the largest difference is printed, and a file that differs is refused and deleted.

    Args:
        weights: Run, exported folder, weights file or Hugging Face id (owner/name, hf://owner/name@revision).
        out: Folder for the export; of several formats each gets a folder of its name inside.
        format: safetensors (a folder ready for Hugging Face), onnx, torch-export (.pt2) or monai (a bundle of a
            segmenter); several may be named.
        network: encoder, segmenter or classifier; the run's own if not given. The encoder of a fine-tuned run can be
            taken out of it.
        patch_size: Voxels of a program's input along X, Y, Z; those of training if not given (96 for an encoder).
        license: Id of the licence of the weights, as Hugging Face lists them, such as cc-by-4.0; none is named if not
            given.
        modality: What the scans are, such as CT or T1-weighted MRI, for the README or the metadata.
        include_seen: Publish seen.json too (safetensors): digests and fingerprints of the scans it learned from, so
            that others are warned when they test on one. Whoever has a scan can tell from it whether it was among them.
        task: Name or dotted path of the task, where the card names one that is not mim3d's own; its code is imported.
        backbone: Encoder, where the card names a class that is not mim3d's own; its code is imported.
        overwrite: Replace an earlier export in OUT.

    Returns:
        The folder of the export.

    Raises:
        ConfigError: An unknown format, a missing package, or a folder that holds other things, before any work begins.
        CheckpointError: Weights that cannot be read or do not suit the format, or a program that computes something
            else than its network.
    """
    from mim3d.workflows.export import export_network

    return export_network(
        weights,
        out,
        formats=[format] if isinstance(format, str) else format,
        kind=network,
        patch_size=patch_size,
        license=license,
        modality=modality,
        include_seen=include_seen,
        task=task,
        backbone=backbone,
        overwrite=overwrite,
    )
