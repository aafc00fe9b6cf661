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
from mim3d.exporting.networks import Exported, formula, label_rule
from mim3d.exporting.programs import read_own_program, write_program
from mim3d.reporting.rendering import render

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"

_EPSILON = 1e-6


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
    """Write ``configs``, ``models`` and ``docs`` of a bundle into a folder that exists and is empty.

    Raises:
        CheckpointError: The program computes something else than the network.
    """
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir()
    program = folder / "models" / "model.pt2"
    write_program(network, program)
    # The specification asks for a state dictionary too; its names are those of the program.
    packed = io.BytesIO()
    torch.save(read_own_program(program).state_dict(), packed)
    (folder / "models" / "model.pt").write_bytes(packed.getbuffer())
    write_json(folder / "configs" / "inference.json", inference_config(network))
    write_json(folder / "configs" / "metadata.json", bundle_metadata(network))
    readme = render(
        "bundle_readme.md.jinja",
        num_channels=network.num_channels,
        intensities=formula(network.card["intensity"]),
        channels=list(zip(network.form.channels, network.form.label_values, strict=True)),
    )
    write_text(folder / "docs" / "README.md", readme)
    license = network.license
    note = f"Licence of the weights: {license}" if license else "No licence of the weights was named at export."
    write_text(folder / "docs" / "license.txt", f"{note}\n")


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
    ``--sw_batch_size``, ``--overlap``, ``--device``.
    """
    files = "$sorted(glob.glob(@dataset_dir + '/*.nii*'))"
    if network.num_channels > 1:
        # Files of several channels are named as nnU-Net names them.
        files = (
            "$[[first.replace('_0000.nii', f'_{channel:04d}.nii') for channel in range("
            f"{network.num_channels})] for first in sorted(glob.glob(@dataset_dir + '/*_0000.nii*'))]"
        )
    return {
        "imports": [
            "$import collections",
            "$import functools",
            "$import glob",
            "$import monai",
            "$import numpy",
            "$import torch",
        ],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/predictions'",
        "datalist": files,
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "model_path": "$@bundle_root + '/models/model.pt2'",
        "network_def": "$torch.export.unflatten(torch.export.load(@model_path))",
        "network": "$@network_def.to(@device).eval()",
        **_intensity_helpers(network),
        "preprocessing": {"_target_": "Compose", "transforms": _preprocessing(network)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': image} for image in @datalist]",
            "transform": "@preprocessing",
        },
        "sw_batch_size": 4,
        "overlap": network.form.overlap,
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(network.patch_size),
            "sw_batch_size": "@sw_batch_size",
            "overlap": "@overlap",
            "mode": "gaussian",
            "sigma_scale": 0.125,
            "padding_mode": "constant",
        },
        # MONAI cuts Gaussian weights off at a thousandth of the largest; these go on, as in mim3d.
        "edge_weights": (
            "$lambda size: torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64) - (size - 1) / 2)"
            " / (size / 8)) ** 2)"
        ),
        "weights": (
            "$torch.einsum('x,y,z->xyz', *[@edge_weights(size) for size in @inferer.roi_size]).float()[None, None]"
        ),
        "postprocessing": {"_target_": "Compose", "transforms": _postprocessing(network)},
        "infer": "$torch.no_grad()(lambda image: @inferer(image[None].to(@device), @network)[0].cpu())",
        # A scan smaller than a window is padded with its darkest value, as in training.
        "padded_with": "$lambda image: setattr(@inferer, 'cval', float(image.min()))",
        "segment": (
            "$lambda item: (@padded_with(item['image']), "
            "@postprocessing({**item, 'pred': @infer(item['image'].as_tensor())}))"
        ),
        "initialize": ["$setattr(@inferer, 'roi_weight_map', @weights)"],
        "run": ["$collections.deque((@segment(item) for item in @dataset), maxlen=0)"],
    }


def _preprocessing(network: Exported) -> list[dict[str, Any]]:
    spacing_mm, intensity = network.card.get("spacing_mm"), network.card["intensity"]
    steps: list[dict[str, Any]] = [
        {"_target_": "LoadImaged", "keys": "image", "reader": "NibabelReader"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
    ]
    if spacing_mm is not None:
        steps.append({"_target_": "Spacingd", "keys": "image", "pixdim": list(spacing_mm), "mode": "bilinear"})
    if _standardises(network):
        steps.append({"_target_": "Lambdad", "keys": "image", "func": "@standardised"})
    else:
        low, high = intensity["window"]
        steps.append(
            {
                "_target_": "ScaleIntensityRanged",
                "keys": "image",
                "a_min": low,
                "a_max": high,
                "b_min": 0.0,
                "b_max": 1.0,
                "clip": True,
            }
        )
    return steps


def _standardises(network: Exported) -> bool:
    intensity = network.card["intensity"]
    return intensity["kind"] == "zscore" or intensity.get("window") is None


def _intensity_helpers(network: Exported) -> dict[str, str]:
    """Return the foreground's mean and standard deviation by mim3d's rule, see ``mim3d.caching.foreground``."""
    if not _standardises(network):
        return {}
    return {
        "values": "$lambda channel: channel.as_tensor().numpy().ravel()",
        "high": "$lambda values: float(numpy.percentile(values[:: max(1, values.size // 1000000)], 99.5))",
        "threshold": (
            "$lambda values: -950.0 if (values < -500).mean() >= 0.005 else "
            "float(values.min()) + 0.05 * (@high(values) - float(values.min()))"
        ),
        "above": "$lambda values: values[values > @threshold(values)]",
        "foreground": (
            "$lambda values: (@above(values) if @above(values).size >= 0.001 * values.size else values)"
            ".astype(numpy.float64)"
        ),
        "column": "$lambda numbers: torch.tensor(numbers, dtype=torch.float32)[:, None, None, None]",
        "means": "$lambda image: @column([@foreground(@values(channel)).mean() for channel in image])",
        "deviations": (
            f"$lambda image: @column([max(@foreground(@values(channel)).std(), {_EPSILON}) for channel in image])"
        ),
        "standardised": "$lambda image: (image - @means(image)) / @deviations(image)",
    }


def _postprocessing(network: Exported) -> list[dict[str, Any]]:
    each = list(network.form.label_values)
    if network.form.activation == "softmax":
        activation = "$lambda logits: torch.softmax(logits, 0)"
        values = f"torch.tensor({each})[scores.as_tensor().argmax(0, keepdim=True)]"
    else:
        activation = "$torch.sigmoid"
        values = (
            "functools.reduce(lambda labels, channel: torch.where(channel[0][None] > 0.5, channel[1], labels), "
            f"zip(scores.as_tensor(), {each}), torch.zeros(1, *scores.shape[1:], dtype=torch.int64))"
        )
    return [
        {"_target_": "Lambdad", "keys": "pred", "func": activation},
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": False,
            "to_tensor": True,
        },
        # Label values (1, X, Y, Z) of probabilities (K, X, Y, Z), with the grid and name of their scan.
        {
            "_target_": "Lambdad",
            "keys": "pred",
            "func": f"$lambda scores: monai.data.MetaTensor({values}, meta=scores.meta)",
        },
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_ext": ".nii.gz",
            "output_postfix": "",
            "output_dtype": "$numpy.uint8" if max(each) < 256 else "$numpy.int32",
            "separate_folder": False,
            "resample": False,
        },
    ]
