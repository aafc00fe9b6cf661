"""Export of a trained network: checks before any work begins, then one folder for each format."""

import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from mim3d.core.errors import ConfigError
from mim3d.core.files import atomic_folder
from mim3d.core.progress import say
from mim3d.core.settings import nearest
from mim3d.core.types import Named, Triple
from mim3d.core.warned import LicenceWarning, checked_rows, merged
from mim3d.core.warned import published as published_rows
from mim3d.exporting.hub_folder import ListedScans, check_license, write_hub_folder
from mim3d.exporting.monai_bundle import require_segmenter, write_monai_bundle
from mim3d.exporting.named_for_monai import INDEX_NAME, check_einops, require_monai_network, write_monai_weights
from mim3d.exporting.networks import load_exported
from mim3d.exporting.nnunet import PLAN_NAME, Axes, require_nnunet, write_nnunet
from mim3d.exporting.origin import ENTRY, evaluation_of, stages_of
from mim3d.exporting.programs import check_onnx, write_onnx, write_torch_program
from mim3d.weights import WeightsOrigin
from mim3d.workflows.shared.leakage import SEEN_NAME, Seen, published, read_seen, seen_file, write_seen

#: Formats but safetensors and nnunet, which have settings of their own -> what writes them.
WRITERS = {
    "onnx": write_onnx,
    "torch-export": write_torch_program,
    "monai": write_monai_bundle,
    "monai-weights": write_monai_weights,
}
FORMATS = ("safetensors", *WRITERS, "nnunet")

#: Of each format a file, below its folder, by which an earlier export is known.
MARKS = ("card.json", "metadata.json", "configs/metadata.json", INDEX_NAME, PLAN_NAME)


@dataclass(frozen=True)
class ExportSettings:
    """Settings of `mim3d export`.

    Attributes:
        weights: Run, exported folder, weights file or Hugging Face id (owner/name, hf://owner/name@revision).
        out: Folder for the export; of several formats each gets a folder of its name inside.
        format: Format, or several: safetensors (a folder ready for Hugging Face), onnx, torch-export (.pt2), monai (a
            bundle of a segmenter), monai-weights (a swin for SwinUNETR, a vit for ViT and UNETR) or nnunet (a resenc
            or primus that nnU-Net fine-tunes from).
        network: Kind of network: encoder, segmenter or classifier; the run's own if not given. The encoder of a
            fine-tuned run can be taken out of it.
        patch_size: Voxels of a program's input along X, Y, Z, or of the crops that nnU-Net is to train on; those of
            training if not given (96 for an encoder).
        axes: Order of the axes of exported kernels (nnunet): XYZ, as they are; or ZYX, turned so that nnU-Net, whose
            arrays run so, computes the same features of a scan.
        license: Id of the licence of the weights, as Hugging Face lists them, such as cc-by-4.0; none is named if not
            given.
        modality: What the scans are, such as CT or T1-weighted MRI, for the README or the metadata.
        include_seen: List of the scans it learned from, by which others are warned when they test on one. If not given,
            it holds salted digests and marks, which show nothing of a scan (whoever has a scan can tell from it whether
            it was among them); true adds fingerprints, which are coarse images, false leaves the list out.
        task: Name or dotted path of the task, where the card names one that is not mim3d's own; its code is imported.
        backbone: Encoder, where the card names a class that is not mim3d's own; its code is imported.
        overwrite: Replace an earlier export in OUT.
    """

    weights: str
    out: str
    _: KW_ONLY
    format: str | list[str] = "safetensors"
    network: str | None = None
    patch_size: Triple | None = None
    axes: Axes = "XYZ"
    license: str | None = None
    modality: str | None = None
    include_seen: bool | None = None
    task: str | None = None
    backbone: Named | None = None
    overwrite: bool = False

    @property
    def formats(self) -> list[str]:
        """Every format that is named, once."""
        return list(dict.fromkeys([self.format] if isinstance(self.format, str) else self.format))


def export_network(settings: ExportSettings) -> str:
    """Export a network in one or more formats.

    Returns:
        The folder of the export.

    Raises:
        ConfigError: An unknown format, a missing package, or a folder that holds other things, before any work begins.
        CheckpointError: Weights that cannot be read or do not suit the format, or a program that computes something
            else than its network.
    """
    names, weights = settings.formats, settings.weights
    _check_formats(names, settings.patch_size)
    folder = Path(settings.out)
    targets = {name: folder / name if len(names) > 1 else folder for name in names}
    check_license(settings.license)
    if "onnx" in names:
        check_onnx()
    if "monai-weights" in names:
        check_einops()
    for target in targets.values():
        _check_target(target, overwrite=settings.overwrite)
    network = load_exported(
        weights, settings.network, settings.patch_size, task=settings.task, backbone=settings.backbone
    )
    evaluation = evaluation_of(network.located) if "task" in network.card else None
    known = {ENTRY: stages_of(network.located, network.card), "evaluation": evaluation}
    card = {**network.card, **{name: value for name, value in known.items() if value}}
    began = WeightsOrigin.in_card(card)
    if began is not None and began.terms:
        warnings.warn(f"{weights}: {began.terms}, which the export says.", category=LicenceWarning, stacklevel=2)
        said = published_rows([{"kind": LicenceWarning.kind, "text": began.terms}])
        card["warnings"] = merged(checked_rows(card.get("warnings")), said)
    network = replace(network, card=card, license=settings.license, modality=settings.modality)
    if "monai" in names:
        require_segmenter(network, weights)
    if "monai-weights" in names:
        require_monai_network(network, weights)
    if "nnunet" in names:
        require_nnunet(network, weights)
    seen = _list_of_scans(network.located, weights, settings.include_seen)
    with ExitStack() as all_or_none:
        # A command that is killed, or fails in one format, leaves none, so that it can simply be run again.
        for name, target in targets.items():
            scratch = all_or_none.enter_context(atomic_folder(target))
            if name in WRITERS:
                WRITERS[name](network, scratch)
            elif name == "nnunet":
                write_nnunet(network, scratch, settings.axes)
            else:
                write_hub_folder(network, scratch, _described(seen))
            if seen is not None:
                write_seen(scratch, seen, remedy=None)
    for name, target in targets.items():
        say(f"{name}: {network.kind} in {target}")
    return str(folder)


def _list_of_scans(located: Path, weights: str, asked: bool | None) -> Seen | None:
    """The list of scans in the form that is published; None where there is none, or it is to be left out.

    Raises:
        ConfigError: It was asked for, but there is none.
        CheckpointError: It is damaged.
    """
    path = seen_file(located)
    if path is None and asked:
        raise ConfigError(f"{weights} came without {SEEN_NAME}; leave out --include_seen.")
    seen = None if path is None or asked is False else read_seen(located)
    return seen if seen is None or asked else published(seen)


def _described(seen: Seen | None) -> ListedScans | None:
    if seen is None:
        return None
    return ListedScans(
        number=len(seen.scans),
        has_images=any(scan.fingerprint is not None for scan in seen.scans),
        by_digest=sum(scan.fingerprint is None and not scan.marks.number for scan in seen.scans),
    )


def _check_formats(formats: Sequence[str], patch_size: Triple | None) -> None:
    """Refuse formats that there are not, and settings that none of them has a use for."""
    for name in formats:
        if name not in FORMATS:
            raise ConfigError(f"There is no format '{name}'.{nearest(name, FORMATS)}")
    if not formats:
        raise ConfigError(f"format is empty; name one or more of {', '.join(FORMATS)}.")
    if patch_size is not None and list(formats) == ["safetensors"]:
        raise ConfigError(
            f"patch_size is {list(patch_size)}, but safetensors takes windows as in training, whatever is exported; "
            "leave it out, or name another format too: onnx, torch-export, monai, monai-weights or nnunet."
        )


def _check_target(folder: Path, *, overwrite: bool) -> None:
    """Refuse a file, and a folder that holds an earlier export without ``overwrite``, or other things."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is no folder; choose another --out.")
    nearest_there = next(place for place in folder.absolute().parents if place.exists())
    if not nearest_there.is_dir() or not os.access(nearest_there, os.W_OK):
        raise ConfigError(
            f"{folder} cannot be written: {nearest_there} is no folder, or read-only; choose another --out."
        )
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not any((folder / mark).is_file() for mark in MARKS) or (folder / "checkpoints").exists():
        raise ConfigError(f"{folder} holds other things than an export; choose another --out.")
    if not overwrite:
        raise ConfigError(f"{folder} holds an export already; choose another --out, or use --overwrite true.")
