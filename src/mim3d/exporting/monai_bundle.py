"""A segmenter as a MONAI bundle that MONAI's own runner executes without mim3d.

What differs from `mim3d predict` is listed in every bundle's README (the template ``bundle_readme.md.jinja``).
"""

import io
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mim3d.core.errors import CheckpointError
from mim3d.core.files import write_json, write_text
from mim3d.exporting.carried import carried_source
from mim3d.exporting.networks import Exported, formula, label_rule, terms_of
from mim3d.exporting.programs import read_own_program, write_program
from mim3d.reporting.rendering import render

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"

#: File of the bundle that prepares scans and covers them with windows.
SCRIPT = "scans.py"


def require_segmenter(network: Exported, weights: str) -> None:
    """Refuse what gives no label map.

    Raises:
        CheckpointError: The network is an encoder or a classifier.
    """
    if not network.form.label_values:
        raise CheckpointError(
            f"{weights} is exported as {network.kind}, but a MONAI bundle is made of a segmenter; use --format "
            "safetensors, onnx or torch-export, or give a run of mim3d finetune with the task segmentation."
        )


def write_monai_bundle(network: Exported, folder: Path) -> None:
    """Write ``configs``, ``models``, ``scripts`` and ``docs`` of a bundle into a folder that exists and is empty.

    Raises:
        CheckpointError: The program computes something else than the network.
    """
    for name in ("configs", "models", "docs", "scripts"):
        (folder / name).mkdir()
    program = folder / "models" / "model.pt2"
    write_program(network, program)
    # The specification asks for a state dictionary too; its names are those of the program.
    packed = io.BytesIO()
    torch.save(read_own_program(program).state_dict(), packed)
    (folder / "models" / "model.pt").write_bytes(packed.getbuffer())
    write_json(folder / "configs" / "inference.json", inference_config(network), remedy=None)
    write_json(folder / "configs" / "metadata.json", bundle_metadata(network), remedy=None)
    write_text(folder / "scripts" / SCRIPT, carried_source("mim3d.exporting.monai_scans"), remedy=None)
    readme = render(
        "bundle_readme.md.jinja",
        num_channels=network.num_channels,
        intensities=formula(network.card["intensity"]),
        channels=list(zip(network.form.channels, network.form.label_values, strict=True)),
        terms=terms_of(network),
    )
    write_text(folder / "docs" / "README.md", readme, remedy=None)
    write_text(folder / "docs" / "license.txt", f"{terms_of(network)}\n", remedy=None)


def bundle_metadata(network: Exported) -> dict[str, Any]:
    """Return the content of ``configs/metadata.json``, by MONAI's bundle specification."""
    form = network.form
    structures = ", ".join(name for name in form.channels if name != "background")
    shared = {"type": "image", "spatial_shape": list(network.patch_size), "dtype": "float32", "is_patch_data": True}
    is_window = network.card["intensity"].get("kind") == "window"
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
        "copyright": network.license or "not recorded",
        "intended_use": "research; no medical device",
        "data_type": "nifti",
        "eval_metrics": dict(network.card.get("scores") or {}),
        "label_values": dict(zip(form.channels, form.label_values, strict=True)),
        "network_data_format": {
            "inputs": {
                "image": {
                    **shared,
                    "format": "magnitude",
                    "modality": network.modality or "n/a",
                    "num_channels": network.num_channels,
                    "value_range": [0, 1] if is_window else [],
                    "channel_def": {str(number): f"image {number}" for number in range(network.num_channels)},
                }
            },
            "outputs": {
                "pred": {
                    **shared,
                    "format": "labels" if form.activation == "softmax" else "classes",
                    "num_channels": len(form.channels),
                    "value_range": [],
                    "channel_def": {str(number): name for number, name in enumerate(form.channels)},
                }
            },
        },
    }


def inference_config(network: Exported) -> dict[str, Any]:
    """Return the content of ``configs/inference.json``.

    Overridable on the command line: ``--bundle_root``, ``--dataset_dir``, ``--output_dir``, ``--datalist``,
    ``--sw_batch_size``, ``--overlap``, ``--mirror_axes``, ``--body_only``, ``--device``.
    """
    files = "$sorted(glob.glob(@dataset_dir + '/*.nii*'))"
    if network.num_channels > 1:
        # Files of several channels are named as nnU-Net names them.
        files = (
            "$[[first.replace('_0000.nii', f'_{channel:04d}.nii') for channel in range("
            f"{network.num_channels})] for first in sorted(glob.glob(@dataset_dir + '/*_0000.nii*'))]"
        )
    return {
        "imports": ["$import collections", "$import glob", "$import numpy", "$import runpy", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/predictions'",
        "datalist": files,
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "model_path": "$@bundle_root + '/models/model.pt2'",
        "network_def": "$torch.export.unflatten(torch.export.load(@model_path))",
        "network": "$@network_def.to(@device).eval()",
        # Found by its path, so that it matters neither where the runner is started nor what other bundles it runs.
        "scans": f"$runpy.run_path(@bundle_root + '/scripts/{SCRIPT}')",
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(network)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': image, 'files': image} for image in @datalist]",
            "transform": "@preprocessing",
        },
        "roi_size": list(network.patch_size),
        "sw_batch_size": 4,
        "overlap": network.form.overlap,
        "mirror_axes": list(network.form.mirror_axes),
        "body_only": True,
        "activation": network.form.activation,
        "channels": list(network.form.channels),
        "label_values": list(network.form.label_values),
        "inferer": (
            "$@scans['WindowsInferer'](@roi_size, overlap=@overlap, sw_batch_size=@sw_batch_size, "
            "mirror_axes=@mirror_axes, body_only=@body_only, activation=@activation, channels=@channels, "
            "label_values=@label_values)"
        ),
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(network)},
        "segment": "$lambda item: @postprocessing({**item, 'pred': @inferer(item['image'][None], @network)[0]})",
        "run": ["$collections.deque((@segment(item) for item in @dataset), maxlen=0)"],
    }


def _preprocessing(network: Exported) -> list[Any]:
    spacing_mm, intensity = network.card.get("spacing_mm"), network.card["intensity"]
    window = None if intensity.get("window") is None else list(intensity["window"])
    learned = (network.card.get("input_range") or {}).get("channels") or []
    in_hu = [bool(channel["in_hu"]) for channel in learned]
    return [
        {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader", "dtype": None},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
        f"$@scans['PrepareScand']('image', spacing_mm={None if spacing_mm is None else list(spacing_mm)}, "
        f"kind='{intensity['kind']}', window={window}, in_hu={in_hu})",
    ]


def _postprocessing(network: Exported) -> list[dict[str, Any]]:
    return [
        # Voxels already lie on the scan's own grid: axes are turned back, nothing is interpolated.
        {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image"},
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_ext": ".nii.gz",
            "output_postfix": "",
            "output_dtype": "$numpy.uint8" if max(network.form.label_values) < 256 else "$numpy.int32",
            "separate_folder": False,
            "resample": False,
        },
    ]
