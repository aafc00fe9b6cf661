"""A segmenter as a MONAI bundle that MONAI's own runner executes without mim3d."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mim3d.core.errors import CheckpointError
from mim3d.core.files import write_json, write_text
from mim3d.exporting.description import formula, label_rule
from mim3d.exporting.monai_inference import DIFFERENCES, inference_config
from mim3d.exporting.networks import Exported
from mim3d.exporting.programs import read_own_program
from mim3d.exporting.torch_program import PROGRAM_NAME, written_program

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"

#: Packages that the runner needs besides torch, numpy and MONAI: NIfTI files, and the command line.
PACKAGES = ("nibabel", "fire")


def write_monai_bundle(network: Exported, folder: Path, *, license: str | None, modality: str | None) -> None:
    """Write ``configs``, ``models`` and ``docs`` of a bundle into a folder.

    Args:
        network: a segmenter.
        folder: where to; it exists and is empty.
        license: id of the licence of the weights.
        modality: what the scans are.
    Raises:
        CheckpointError: the card lacks what preprocessing needs, or the program computes something else.
    """
    if "intensity" not in network.card:
        raise CheckpointError(f"the card of {network.located} says nothing of intensities; export the run again.")
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir()
    program = folder / "models" / PROGRAM_NAME
    written_program(network, program)
    # The specification asks for a state dictionary too; its names are those of the program.
    torch.save(read_own_program(program).state_dict(), folder / "models" / "model.pt")
    write_json(folder / "configs" / "inference.json", inference_config(network))
    write_json(folder / "configs" / "metadata.json", bundle_metadata(network, license=license, modality=modality))
    write_text(folder / "docs" / "README.md", _readme(network))
    note = f"Licence of the weights: {license}" if license else "No licence of the weights was named at export."
    write_text(folder / "docs" / "license.txt", f"{note}\n")


def bundle_metadata(network: Exported, *, license: str | None, modality: str | None) -> dict[str, Any]:
    """The content of ``configs/metadata.json``, by MONAI's bundle specification."""
    structures = ", ".join(name for name in network.form.channels if name != "background")
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported by mim3d"},
        "monai_version": version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": version("nibabel"), "fire": "0.5.0"},
        "name": f"mim3d segmenter: {structures}",
        "task": f"segmentation of {structures}",
        "description": f"A network by mim3d that labels every voxel of a scan: {structures}. {label_rule(network)}.",
        "authors": "not recorded",
        "copyright": license or "not recorded",
        "intended_use": "research; no medical device",
        "data_type": "nifti",
        "eval_metrics": dict(network.card.get("scores") or {}),
        "label_values": dict(zip(network.form.channels, network.form.painted, strict=True)),
        "network_data_format": {
            "inputs": {"image": _input_format(network, modality)},
            "outputs": {"pred": _output_format(network)},
        },
    }


def _input_format(network: Exported, modality: str | None) -> dict[str, Any]:
    is_window = network.card["intensity"].get("kind") == "window"
    return {
        "type": "image",
        "format": "magnitude",
        "modality": modality or "n/a",
        "num_channels": network.num_channels,
        "spatial_shape": list(network.patch_size),
        "dtype": "float32",
        "value_range": [0, 1] if is_window else [],
        "is_patch_data": True,
        "channel_def": {str(number): f"image {number}" for number in range(network.num_channels)},
    }


def _output_format(network: Exported) -> dict[str, Any]:
    return {
        "type": "image",
        "format": "labels" if network.form.activation == "softmax" else "classes",
        "num_channels": len(network.form.channels),
        "spatial_shape": list(network.patch_size),
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": True,
        "channel_def": {str(number): name for number, name in enumerate(network.form.channels)},
    }


def _readme(network: Exported) -> str:
    channels = "\n".join(
        f"| {number} | {name} | {value} |"
        for number, (name, value) in enumerate(zip(network.form.channels, network.form.painted, strict=True))
    )
    differences = "\n".join(f"- {sentence}" for sentence in DIFFERENCES)
    several = (
        ""
        if network.num_channels == 1
        else "\nChannels are files of one folder, named `NAME_0000.nii.gz`, `NAME_0001.nii.gz` and so on.\n"
    )
    return f"""# Segmenter made with mim3d

Segments all NIfTI files of a folder, each on its own grid. Needs torch, MONAI, {" and ".join(PACKAGES)}; not mim3d.

```
python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
    --dataset_dir IMAGES --output_dir PREDICTIONS
```
{several}
Intensities: {formula(network.card["intensity"])}.

| channel | name | label value |
|---|---|---|
{channels}

`models/model.pt2` is a torch.export program; `torch.export.load` can run code hidden in such a file, as can the
expressions of a bundle's configuration: run bundles from people you trust alone.

## Where its label maps differ from those of `mim3d predict`

{differences}

A research tool, no medical device.
"""
