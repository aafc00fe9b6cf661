"""Pictures that runs save while they train: reconstructions of a pre-training, crops of a fine-tuning."""

import zipfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.reporting.drawing import PLANES, label_colour
from mim3d.reporting.overlays import View, busiest_slice, overlay_picture
from mim3d.reporting.page import Section, figure, folded, note
from mim3d.reporting.reconstructions import KINDS, history_picture, level_picture
from mim3d.reporting.sources import NamedRun

_HISTORY_STEPS = 5
_CROP = {"image", "reference", "prediction"}
_TITLE = "Pictures from training"

Group = dict[str, npt.NDArray[Any]]


def pictures_section(runs: Sequence[NamedRun]) -> Section:
    """The last pictures of every run that saved some, and how reconstructions came about."""
    body = "".join(_run(run) for run in runs)
    return Section("pictures", _TITLE, body or note("No run in here has saved pictures."))


def _run(run: NamedRun) -> str:
    files = run.record.pictures
    if not files:
        return note(f"{run.name} has saved no pictures.") if run.command == "pretrain" else ""
    try:
        history = {step: read_pictures(files[step]) for step in _spread(list(files))}
    except DataError as error:
        return note(str(error))
    step, last = list(history.items())[-1]
    levels = {name: group for name, group in last.items() if set(KINDS[:1]) <= group.keys()}
    crops = {name: group for name, group in last.items() if group.keys() >= _CROP}
    body = f"<h3>{escape(run.name)}, step {step}</h3>"
    if levels:
        body += note("Middle slices of one training crop per level; hidden patches are blue in the masked row.")
        figures = [figure(level_picture(name, level), escape(name)) for name, level in levels.items()]
        body += f'<div class="row">{"".join(figures)}</div>'
    if levels and len(history) > 1 and all("reconstructed" in level for level in levels.values()):
        caption = "Middle axial slices of every level as reconstructed; the crops change from step to step."
        body += folded("Over training", figure(history_picture(history), caption))
    for name, crop in crops.items():
        caption = f"{escape(name)}: one training crop, reference filled, prediction as a line."
        body += figure(_crop_picture(crop), caption)
    return body


def read_pictures(path: Path) -> dict[str, Group]:
    """Volumes (X, Y, Z) of a run's file of pictures, `coarse/original` as `["coarse"]["original"]`.

    Raises:
        DataError: the file cannot be read.
    """
    groups: dict[str, Group] = {}
    try:
        with np.load(path, allow_pickle=False) as pictures:
            for key in pictures.files:
                name, _, kind = key.rpartition("/")
                volume = pictures[key]
                if volume.ndim == 3:
                    groups.setdefault(name or kind, {})[kind] = volume
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: these pictures cannot be read ({error}).") from error
    return groups


def _crop_picture(crop: Mapping[str, npt.NDArray[Any]]) -> str:
    reference, prediction = crop["reference"], crop["prediction"]
    shown = reference if (reference > 0).any() else prediction
    view = View(
        image=crop["image"],
        reference=reference,
        predictions=(prediction,),
        spacing_mm=(1.0, 1.0, 1.0),
        slices=tuple(busiest_slice(shown, plane) for plane in PLANES),
    )
    values = np.union1d(reference, prediction)
    colours = {int(value): label_colour(position) for position, value in enumerate(values[values > 0])}
    return overlay_picture(view, prediction, colours)


def _spread(steps: Sequence[int]) -> list[int]:
    """At most five of the steps, evenly, with the first and the last."""
    count = min(_HISTORY_STEPS, len(steps))
    return [steps[round(position)] for position in np.linspace(0, len(steps) - 1, count)]
