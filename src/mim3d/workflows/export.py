"""Export of a trained network: checks before any work begins, then one folder for each format."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mim3d.core.errors import ConfigError
from mim3d.core.files import atomic_folder
from mim3d.core.settings import nearest
from mim3d.core.types import Named, Triple
from mim3d.exporting.hub_folder import check_license, write_hub_folder
from mim3d.exporting.monai_bundle import require_segmenter, write_monai_bundle
from mim3d.exporting.networks import load_exported
from mim3d.exporting.program_files import check_onnx, write_onnx, write_torch_program
from mim3d.weights import WEIGHTS_NAME
from mim3d.workflows.shared.leakage import SEEN_NAME

FORMATS = ("safetensors", "onnx", "torch-export", "monai")

#: Of each format a file, below its folder, by which an earlier export is known.
MARKS = ("card.json", "metadata.json", "configs/metadata.json")


def export_network(
    weights: str,
    out: str,
    *,
    formats: Sequence[str],
    kind: str | None,
    patch_size: Triple | None,
    license: str | None,
    modality: str | None,
    include_seen: bool,
    task: str | None,
    backbone: Named | None,
    overwrite: bool,
) -> str:
    """Export a network in one or more formats; `mim3d export` describes each argument.

    Args:
        weights: Run, exported folder, weights file or Hugging Face id.
        out: Folder for the export. Of several formats each gets a folder of its name inside.
        formats: Names of the formats.
        kind: Folder of a run that holds the network; that of the weights if None.
        patch_size: Voxels of a program's input; those of training if None.
        license: Id of the licence of the weights.
        modality: What the scans are.
        include_seen: Whether the list of scans that it learned from is published too.
        task: Name or dotted path of the task, where the card names one that is not mim3d's own.
        backbone: The encoder, where the card names a class that is not mim3d's own.
        overwrite: Whether an earlier export is replaced.

    Returns:
        The folder of the export.

    Raises:
        ConfigError: An unknown format, a missing package, or a folder that holds other things, before any work begins.
        CheckpointError: Weights that cannot be read or do not suit the format, or a program that computes something
            else than its network.
    """
    names = list(dict.fromkeys(formats))
    _check_formats(names, patch_size, include_seen)
    folder = Path(out)
    targets = {name: folder / name if len(names) > 1 else folder for name in names}
    check_license(license)
    if "onnx" in names:
        check_onnx()
    for target in targets.values():
        _check_target(target, overwrite=overwrite)
    network = load_exported(weights, kind, patch_size, task=task, backbone=backbone)
    network = replace(network, license=license, modality=modality)
    if "monai" in names:
        require_segmenter(network, weights)
    seen = _seen(network.located, weights) if include_seen else None
    for name, target in targets.items():
        with atomic_folder(target) as scratch:
            if name == "safetensors":
                write_hub_folder(network, scratch, seen)
            elif name == "onnx":
                write_onnx(network, scratch)
            elif name == "torch-export":
                write_torch_program(network, scratch)
            else:
                write_monai_bundle(network, scratch)
        print(f"{name}: {network.kind} in {target}")
    return str(folder)


def _check_formats(formats: Sequence[str], patch_size: Triple | None, include_seen: bool) -> None:
    """Refuse formats that there are not, and settings that none of them has a use for.

    Raises:
        ConfigError: The sentence names the format or the setting.
    """
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"There is no format '{name}'.{nearest(name, FORMATS)}")
    if not formats:
        raise ConfigError(f"format is empty; name one or more of {', '.join(FORMATS)}.")
    if patch_size is not None and list(formats) == ["safetensors"]:
        raise ConfigError(
            f"patch_size is {list(patch_size)}, but safetensors takes windows as in training, whatever is exported; "
            "leave it out, or name a format of programs: onnx, torch-export or monai."
        )
    if include_seen and "safetensors" not in formats:
        raise ConfigError(
            f"include_seen is true, but {' and '.join(formats)} has no place for the list; leave it out, or name "
            "safetensors too."
        )


def _check_target(folder: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds anything else, before any work begins.

    Raises:
        ConfigError: A file, or a folder that is not empty: an earlier export without ``overwrite``, or other things.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is no folder; choose another --out.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not any((folder / mark).is_file() for mark in MARKS) or (folder / "checkpoints").exists():
        raise ConfigError(f"{folder} holds other things than an export; choose another --out.")
    if not overwrite:
        raise ConfigError(f"{folder} holds an export already; choose another --out, or use --overwrite true.")


def _seen(located: Path, weights: str) -> Path:
    """Find the list of scans beside the weights.

    Raises:
        ConfigError: There is none.
    """
    path = (located if located.is_dir() else located.parent) / SEEN_NAME
    if not path.is_file() or (located.is_file() and located.name != WEIGHTS_NAME):
        raise ConfigError(f"{weights} came without {SEEN_NAME}; leave out --include_seen.")
    return path
