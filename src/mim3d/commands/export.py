"""The command that brings trained networks into the formats of other programs."""

from collections.abc import Sequence
from pathlib import Path

from mim3d.core.errors import ConfigError
from mim3d.core.files import atomic_folder
from mim3d.core.settings import nearest
from mim3d.core.types import Triple
from mim3d.exporting.hub_folder import check_license, write_hub_folder
from mim3d.exporting.monai_bundle import write_monai_bundle
from mim3d.exporting.networks import Exported, load_exported, require_segmenter
from mim3d.exporting.onnx_file import check_onnx, write_onnx
from mim3d.exporting.output import check_target
from mim3d.exporting.torch_program import write_torch_program
from mim3d.weights import WEIGHTS_NAME
from mim3d.workflows.shared.leakage import SEEN_NAME

FORMATS = ("safetensors", "onnx", "torch-export", "monai")


def export(
    weights: str,
    out: str,
    format: str | list[str] = "safetensors",
    network: str | None = None,
    patch_size: Triple | None = None,
    license: str | None = None,
    modality: str | None = None,
    include_seen: bool = False,
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
        overwrite: Replace an earlier export in OUT.

    Returns:
        The folder of the export.

    Raises:
        ConfigError: An unknown format, a missing package, or a folder that holds other things, before any work begins.
        CheckpointError: Weights that cannot be read or do not suit the format, or a program that computes something
            else than its network.
    """
    formats = _formats(format)
    _check_uses(formats, patch_size, include_seen)
    folder = Path(out)
    targets = {name: folder / name if len(formats) > 1 else folder for name in formats}
    check_license(license)
    if "onnx" in formats:
        check_onnx()
    for target in targets.values():
        check_target(target, overwrite=overwrite)
    exported = load_exported(weights, network, patch_size)
    if "monai" in formats:
        require_segmenter(exported, weights)
    seen = _seen(exported, weights) if include_seen else None
    for name, target in targets.items():
        with atomic_folder(target) as scratch:
            if name == "safetensors":
                write_hub_folder(exported, scratch, license=license, modality=modality, seen=seen)
            elif name == "onnx":
                write_onnx(exported, scratch, license=license, modality=modality)
            elif name == "torch-export":
                write_torch_program(exported, scratch, license=license, modality=modality)
            else:
                write_monai_bundle(exported, scratch, license=license, modality=modality)
        print(f"{name}: {exported.kind} in {target}")
    return str(folder)


def _formats(format: str | Sequence[str]) -> list[str]:
    names = list(dict.fromkeys([format] if isinstance(format, str) else format))
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"There is no format '{name}'.{nearest(name, FORMATS)}")
    if not names:
        raise ConfigError(f"format is empty; name one or more of {', '.join(FORMATS)}.")
    return names


def _check_uses(formats: Sequence[str], patch_size: Triple | None, include_seen: bool) -> None:
    """Refuse what none of the formats has a use for.

    Raises:
        ConfigError: naming it.
    """
    if patch_size is not None and formats == ["safetensors"]:
        raise ConfigError(
            f"patch_size is {list(patch_size)}, but safetensors takes windows as in training, whatever is exported; "
            "leave it out, or name a format of programs: onnx, torch-export or monai."
        )
    if include_seen and "safetensors" not in formats:
        raise ConfigError(
            f"include_seen is true, but {' and '.join(formats)} has no place for the list; leave it out, or name "
            "safetensors too."
        )


def _seen(exported: Exported, weights: str) -> Path:
    """The list of scans beside the weights.

    Raises:
        ConfigError: there is none.
    """
    located = exported.located
    path = (located if located.is_dir() else located.parent) / SEEN_NAME
    if not path.is_file() or (located.is_file() and located.name != WEIGHTS_NAME):
        raise ConfigError(f"{weights} came without {SEEN_NAME}; leave out --include_seen.")
    return path
