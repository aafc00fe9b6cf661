"""``mim3d evaluate``: predictions against references, scored on the scan's own grid."""

import math
import os
from typing import TYPE_CHECKING, Any, Literal

from mim3d.core.errors import ConfigError
from mim3d.datasets.class_tables import is_class_table

if TYPE_CHECKING:
    from mim3d.datasets.published.presets import Preset


def evaluate(
    predictions: str,
    references: str | list[str],
    out: str,
    preset: str | None = None,
    nsd_tolerance_mm: float | None = None,
    labels: list[str] | None = None,
    regions: dict[str, list[int | str]] | None = None,
    lesions: bool | list[str] = False,
    lesion_overlap: float = 0.0,
    lesion_matching: Literal["many", "one_to_one"] = "many",
    lesion_min_ml: float = 0.0,
    missing: Literal["leave_out", "worst"] = "leave_out",
    compare: str | None = None,
    num_bootstrap: int = 2000,
    seed: int = 0,
    tables: bool = True,
    num_workers: int | None = None,
    class_column: str = "class",
    positive: str | None = None,
    by_patient: bool = False,
    num_bins: int = 10,
    baseline_column: str | None = None,
) -> str:
    """Score predictions of any tool against references: label maps per label, or classes.

    Label maps: Dice, 95 % Hausdorff distance, normalised surface distance and volume error, in millimetres and
    millilitres on the scan's own grid, and the detection of lesions. Files are matched by name without suffix.
    Classes: a table predictions.csv against a table of references, matched by id.
    Means have 95 % bootstrap intervals over patients. The file of scores states its conventions.

    Args:
        predictions: folder that `mim3d predict` wrote, a folder of label maps by any other tool, or a table of
            classes (.csv with id, predicted and a column probability_CLASS for each class).
        references: folder of label maps (labelsTr), label files, or any form of DATA with labels; with a table of
            classes, a .csv with id, case or image, and a class. A column patient says which cases belong together.
        out: file of scores to write, ending in .json; a table of the cases (.csv) comes beside it.
        preset: published data set, such as COVID-19-20, that gives the tolerance of surfaces, the names of labels and
            the regions, as far as the settings below do not.
        nsd_tolerance_mm: distance in mm up to which two surfaces agree; that of the preset, or 1 mm, if left out.
        labels: names or values of the labels to score; every declared one if left out.
        regions: unions of labels to score in place of single ones, such as '{whole tumour: [1, 2, 3]}', by value or
            name; if left out, those of the preset, or that the predictions' own list declares. --labels adds single
            ones.
        lesions: true scores the lesions of every label one by one; names, those of these labels or regions.
        lesion_overlap: least intersection over union for a lesion to count as found; 0 asks for one shared voxel.
        lesion_matching: many lets a lesion count for several others, one_to_one for one at most.
        lesion_min_ml: connected components smaller than this many ml are no lesions.
        missing: a reference without a prediction is left out with a warning (leave_out), or scored as an empty
            prediction (worst).
        compare: predictions of another method, in the same form: differences case by case, with intervals and tests.
        num_bootstrap: how often patients are drawn anew for the intervals; 0 makes none.
        seed: of these draws.
        tables: write Markdown (.md) and LaTeX (.tex) tables beside the file of scores.
        num_workers: processes that score cases; if left out one per core, as far as work and memory reach.
        class_column: column of the references that holds the class.
        positive: the positive class of two; the last in sorted order if left out.
        by_patient: score patients by the mean probabilities of their scans, not scans.
        num_bins: bins of the calibration error.
        baseline_column: a number in the references, such as a diameter, whose AUC is held against the classifier's.

    Returns:
        Path of the file of scores.

    Raises:
        ConfigError: `out` cannot be written, a setting that cannot work, or a preset, label or class that is unknown.
        DataError: nothing to match, an unreadable file (a DICOM-SEG for one), grids that disagree, or an undeclared
            label value.
    """
    given = dict(locals())
    _check_settings(out, nsd_tolerance_mm, num_workers)
    if is_class_table(predictions):
        _refuse_others(given, _FOR_MAPS, "label maps", "a table of classes")
        return _evaluate_classes(given)
    _refuse_others(given, _FOR_CLASSES, "tables of classes", "a folder of label maps")
    return _evaluate_labels(given)


#: Distance up to which two surfaces agree where neither a flag nor a preset says so.
NSD_TOLERANCE_MM = 1.0

#: Settings of one kind of predictions that mean nothing to the other, with their defaults.
_FOR_MAPS = {
    "preset": None,
    "nsd_tolerance_mm": None,
    "labels": None,
    "regions": None,
    "lesions": False,
    "lesion_overlap": 0.0,
    "lesion_matching": "many",
    "lesion_min_ml": 0.0,
    "missing": "leave_out",
}
_FOR_CLASSES = {
    "class_column": "class",
    "positive": None,
    "by_patient": False,
    "num_bins": 10,
    "baseline_column": None,
}


def _evaluate_labels(given: dict[str, Any]) -> str:
    from mim3d.metrics import Bootstrap, LesionSettings
    from mim3d.workflows.evaluate.labels import LabelEvaluation

    lesions = {name: given.pop(f"lesion_{name}") for name in ("overlap", "matching", "min_ml")}
    bootstrap = Bootstrap(num_bootstrap=given.pop("num_bootstrap"), seed=given.pop("seed"))
    settings = {name: value for name, value in given.items() if name not in _FOR_CLASSES}
    settings["out"] = os.path.abspath(settings["out"])
    preset = settings["preset"] = None if settings["preset"] is None else _segmentation_preset(settings["preset"])
    if settings["nsd_tolerance_mm"] is None:
        settings["nsd_tolerance_mm"] = NSD_TOLERANCE_MM if preset is None else preset.nsd_tolerance_mm
    return LabelEvaluation(**settings, lesion_settings=LesionSettings(**lesions), bootstrap=bootstrap).run()


def _segmentation_preset(name: str) -> "Preset":
    from mim3d.datasets.published.presets import find_preset

    preset = find_preset(name)
    if preset.task != "segmentation":
        raise ConfigError(f"preset {preset.name} is for {preset.task}, but predictions are label maps; leave it out.")
    return preset


def _evaluate_classes(given: dict[str, Any]) -> str:
    from mim3d.metrics import Bootstrap
    from mim3d.workflows.evaluate.classes import ClassEvaluation

    bootstrap = Bootstrap(num_bootstrap=given.pop("num_bootstrap"), seed=given.pop("seed"))
    # A table is scored in no time: nothing to share among processes.
    settings = {name: value for name, value in given.items() if name not in {*_FOR_MAPS, "num_workers"}}
    settings["out"] = os.path.abspath(settings["out"])
    settings["references"] = _one_table(settings["references"])
    return ClassEvaluation(**settings, bootstrap=bootstrap).run()


def _refuse_others(given: dict[str, Any], defaults: dict[str, Any], theirs: str, ours: str) -> None:
    strange = [name for name, default in defaults.items() if given[name] != default]
    if strange:
        raise ConfigError(
            f"{strange[0]} is {given[strange[0]]!r}, which is a setting for {theirs}, but predictions names {ours} "
            f"({given['predictions']}); leave it out."
        )


def _one_table(references: str | list[str]) -> str:
    names = [references] if isinstance(references, str) else references
    if len(names) != 1 or not names[0].lower().endswith(".csv"):
        raise ConfigError(
            f"references is {references!r}, but classes are held against one table; name a .csv with a class column."
        )
    return names[0]


def _check_settings(out: str, nsd_tolerance_mm: float | None, num_workers: int | None) -> None:
    if not out.lower().endswith(".json"):
        raise ConfigError(f"out is {out}, but a file of scores ends in .json; use {out.rstrip('/')}.json.")
    if os.path.isdir(out):
        raise ConfigError(f"out is {out}, which is a folder; give the name of a file.")
    folder = os.path.dirname(os.path.abspath(out))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out is {out}, but {folder} cannot be made ({error.strerror}).") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"out is {out}, but {folder} cannot be written to; choose another.")
    if nsd_tolerance_mm is not None and (not math.isfinite(nsd_tolerance_mm) or nsd_tolerance_mm < 0):
        raise ConfigError(f"nsd_tolerance_mm is {nsd_tolerance_mm}, but it takes a length in mm from 0.")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}, but it takes a number from 0, or nothing for one per core.")
