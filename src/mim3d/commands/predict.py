"""The command that segments scans with a fine-tuned network, each on its own grid."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mim3d.commands.held_out import held_out_cases
from mim3d.commands.predictions import LIST_NAME, Predictions, input_cases
from mim3d.commands.scan_progress import ScanProgress
from mim3d.data.cases import Case
from mim3d.data.volumes import write_volume
from mim3d.errors import ConfigError, DataError
from mim3d.tasks.segmenter import load_segmenter
from mim3d.types import Named


def predict(
    weights: str,
    out: str,
    input: str | list[str] | None = None,
    overlap: float | None = None,
    batch_size: int = 4,
    mirror: bool | None = None,
    backbone: Named | None = None,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> str:
    """Segment scans with a fine-tuned network.

    Every scan gives one label map on its own grid and orientation, OUT/<id>.nii.gz (or .nrrd, .mha, as its source);
    OUT/predictions.json lists them. May be stopped and run again: what is finished is kept. A scan that cannot be used
    is listed with its reason and does not stop the others.

    Args:
        weights: Run of `mim3d finetune`, or a folder with an exported segmenter.
        out: Folder for the label maps.
        input: Scans: files, folders, DICOM trees, CSV or JSON lists; the held-out cases of the run if not given.
        overlap: Share of a window that its neighbour sees too; that of the task if not given.
        batch_size: Windows per call of the network.
        mirror: Average over mirrored windows, along the axes mirrored in training; as the task says if not given.
        backbone: Encoder, where the card names a class that is not mim3d's own.
        accelerator: auto, cpu, cuda or mps.
        overwrite: Do scans again that are finished, and replace label maps of another network.

    Returns:
        The folder of the label maps.

    Raises:
        ConfigError: Settings that cannot work, or a folder with other predictions, before any work begins.
        CheckpointError: Weights that are no segmenter.
        DataError: No scan to segment; or, once all others are done, scans that could not be.
    """
    device = _device(accelerator)
    segmenter = load_segmenter(weights, device=device, backbone=backbone)
    mirror_axes = None if mirror is None else (segmenter.settings.augmentation.flip_axes or ()) if mirror else ()
    windows = segmenter.settings.windows(overlap=overlap, batch_size=batch_size, mirror_axes=mirror_axes)
    cases = held_out_cases(Path(weights)) if input is None else input_cases(input)
    identity = {
        "weights": os.path.abspath(weights),
        "weights_digest": segmenter.digest,
        "overlap": windows.overlap,
        "mirror_axes": list(windows.mirror_axes),
        "labels": {str(value): name for value, name in segmenter.labels.items()},
    }
    predictions = Predictions.open(out, identity, cases, overwrite=overwrite)
    remaining = [case for case in cases if not predictions.is_finished(case)]
    with ScanProgress(len(remaining)) as progress:
        for case in remaining:
            progress.begin(case.id)
            try:
                label, grid = segmenter.segment(case, windows, progress.windows)
                write_volume(predictions.path_of(case), label, grid)
            except (DataError, OSError, MemoryError, torch.OutOfMemoryError) as error:
                predictions.add_failure(case, _reason(case, error))
                progress.say(f"not segmented: {_reason(case, error)}")
            else:
                predictions.add(case)
            progress.end()
    return _close(predictions, cases, num_before=len(cases) - len(remaining))


def _device(accelerator: str) -> torch.device:
    known = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "mps": "mps"}
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if accelerator == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    if accelerator not in known:
        raise ConfigError(f"accelerator is '{accelerator}'; use one of auto, {', '.join(known)}.")
    if not available[known[accelerator]]:
        raise ConfigError(f"accelerator '{accelerator}' is not there on this machine; use auto or cpu.")
    return torch.device(known[accelerator])


def _reason(case: Case, error: BaseException) -> str:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"{case.images[0]}: not enough memory; use a smaller --batch_size, or fine-tune at a larger spacing_mm."
    return str(error)


def _close(predictions: Predictions, cases: Sequence[Case], *, num_before: int) -> str:
    failed = [case.id for case in cases if case.id in predictions.failures]
    before = f", {num_before} of them before" if num_before else ""
    print(f"{len(cases) - len(failed)} of {len(cases)} scans segmented{before}: {predictions.folder}")
    if failed:
        raise DataError(
            f"{len(failed)} of {len(cases)} scans could not be segmented, the first because of "
            f"{predictions.failures[failed[0]]} All reasons are in {predictions.folder / LIST_NAME}."
        )
    return str(predictions.folder)
