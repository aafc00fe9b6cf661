"""The command that segments scans with fine-tuned networks, each on its own grid."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from mim3d.core.errors import DataError
from mim3d.core.types import Named
from mim3d.datasets.cases import Case
from mim3d.inference import Windows
from mim3d.scans.volumes import channels_of
from mim3d.tasks.segmentation.ensemble import Ensemble, load_ensemble
from mim3d.weights import full_path, read_card
from mim3d.workflows.predict.label_maps import Cleaning, check_format, segment_to_files
from mim3d.workflows.predict.predictions import LIST_NAME, Format, Predictions, input_cases
from mim3d.workflows.shared.devices import choose_device
from mim3d.workflows.shared.held_out import held_out_by_all
from mim3d.workflows.shared.scan_progress import ScanProgress, close_scans

#: Folders of a run that hold a network this command can use.
NETWORKS = ("segmenter", "classifier")


def predict(
    weights: str | list[str],
    out: str,
    input: str | list[str] | None = None,
    overlap: float | None = None,
    batch_size: int = 4,
    mirror: bool | None = None,
    body_only: bool = True,
    probabilities: bool = False,
    largest_component: bool | list[str] = False,
    min_component_ml: float = 0.0,
    format: Format = "auto",
    backbone: Named | None = None,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> str:
    """Segment scans with a fine-tuned network, or with several that answer together.

    Every scan gives one label map on its own grid and orientation, OUT/<id>.nii.gz (or .nrrd, .mha, as its source);
    OUT/predictions.json lists them. May be stopped and run again: what is finished is kept. A scan that cannot be used
    is listed with its reason and does not stop the others. Weights of a classifier give a table of classes instead.

    Args:
        weights: Run of `mim3d finetune`, or a folder with an exported segmenter; several, such as the folds of a
            cross-validation, are an ensemble: the mean of their probabilities decides.
        out: Folder for the label maps.
        input: Scans: files, folders, DICOM trees, CSV or JSON lists; if not given, the held-out cases of the run, or
            those that all of several runs held out.
        overlap: Share of a window that its neighbour sees too; that of the task if not given.
        batch_size: Windows per call of the network.
        mirror: Average over mirrored windows, along the axes mirrored in training; as the task says if not given.
        body_only: Cover the body alone: windows over the box around it, without those that hold nothing but air or
            background; what no window covers is background. False covers the whole scan.
        probabilities: Write OUT/<id>_probabilities.nii.gz too: float32, one volume per class (background first) or
            region, before any clean-up; predictions.json names them as `channels`.
        largest_component: Keep the largest connected component (26 neighbours) alone: true for every label, or the
            names of labels.
        min_component_ml: Remove connected components (26 neighbours) smaller than this, in millilitres.
        format: nii.gz, nrrd, mha, dicom_seg (for DICOM series; needs the extra `dicom`), or auto: as the source, NIfTI
            for DICOM series.
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
    paths = [weights] if isinstance(weights, str) else list(weights)
    if paths and _is_classifier(paths[0]):
        from mim3d.workflows.predict.classify import predict_classes

        return predict_classes(paths, out, input, batch_size, backbone, accelerator, overwrite)
    ensemble = load_ensemble(paths, device=choose_device(accelerator), backbone=backbone)
    windows = _windows(ensemble, overlap=overlap, batch_size=batch_size, mirror=mirror, body_only=body_only)
    cleaning = Cleaning.of(largest_component, min_component_ml, ensemble.first.labels)
    num_channels = ensemble.first.num_channels
    cases = held_out_by_all(paths) if input is None else _channels_apart(input_cases(input), num_channels)
    check_format(format, cases)
    identity = _identity(ensemble, paths, windows, cleaning)
    predictions = Predictions.open(
        out, identity, cases, overwrite=overwrite, format=format, with_probabilities=probabilities
    )
    remaining = [case for case in cases if not predictions.is_finished(case)]
    _segment_all(ensemble, remaining, windows, cleaning, predictions)
    num_before = len(cases) - len(remaining)
    return close_scans(cases, predictions.failures, "segmented", predictions.folder, LIST_NAME, num_before=num_before)


def _is_classifier(path: str) -> bool:
    task = read_card(path, NETWORKS).get("task")
    return (task.get("name") if isinstance(task, dict) else task) == "classification"


def _channels_apart(cases: Sequence[Case], num_channels: int) -> list[Case]:
    """Cases of one file that holds all channels, as the Decathlon stores brain tumours: a path for each channel."""
    return list(cases) if num_channels == 1 else [_apart(case) for case in cases]


def _apart(case: Case) -> Case:
    try:
        return replace(case, images=channels_of(case.images[0])) if len(case.images) == 1 else case
    except DataError:
        # Told when its turn comes: one damaged file must not stop the others.
        return case


def _windows(
    ensemble: Ensemble, *, overlap: float | None, batch_size: int, mirror: bool | None, body_only: bool
) -> Windows:
    settings = ensemble.first.settings
    mirror_axes: tuple[int, ...] | None = None if mirror is None else ()
    if mirror:
        # Axes that every member saw mirrored in training.
        seen = [set(member.settings.augmentation.flip_axes or ()) for member in ensemble.members]
        mirror_axes = tuple(sorted(set.intersection(*seen)))
    windows = settings.windows(overlap=overlap, batch_size=batch_size, mirror_axes=mirror_axes)
    return replace(windows, body_only=body_only)


def _identity(ensemble: Ensemble, paths: Sequence[str], windows: Windows, cleaning: Cleaning) -> dict[str, object]:
    """What label maps come from, for their list."""
    absolute = [full_path(path) for path in paths]
    return {
        "weights": absolute[0] if len(absolute) == 1 else absolute,
        "weights_digest": ensemble.digest,
        "overlap": windows.overlap,
        "mirror_axes": list(windows.mirror_axes),
        "body_only": windows.body_only,
        "largest_component": list(cleaning.largest),
        "min_component_ml": cleaning.min_ml,
        "labels": {str(value): name for value, name in ensemble.first.labels.items()},
        "channels": list(ensemble.first.channel_names),
        "regions": {name: list(values) for name, values in (ensemble.first.settings.regions or {}).items()},
    }


def _segment_all(
    ensemble: Ensemble, cases: Sequence[Case], windows: Windows, cleaning: Cleaning, predictions: Predictions
) -> None:
    """Segment scan after scan; what keeps one from being segmented is written down."""
    with ScanProgress(len(cases)) as progress:
        for case in cases:
            progress.begin(case.id)
            try:
                segment_to_files(ensemble, case, windows, cleaning, predictions, progress.windows)
            except (DataError, OSError, MemoryError, torch.OutOfMemoryError) as error:
                predictions.add_failure(case, _reason(case, error))
                progress.say(f"not segmented: {_reason(case, error)}")
            else:
                predictions.add(case)
            progress.end()


def _reason(case: Case, error: BaseException) -> str:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"{case.images[0]}: not enough memory; use a smaller --batch_size, or fine-tune at a larger spacing_mm."
    return str(error)
