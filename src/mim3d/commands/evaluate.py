"""``mim3d evaluate``: predictions against references, scored on the scan's own grid."""

from typing import Literal


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
    task: str | None = None,
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
        task: name or dotted path of a task of one's own that scores its predictions; its code is imported.

    Returns:
        Path of the file of scores.

    Raises:
        ConfigError: `out` cannot be written, a setting that cannot work, or a preset, label or class that is unknown.
        DataError: nothing to match, an unreadable file (a DICOM-SEG for one), grids that disagree, or an undeclared
            label value.
    """
    from mim3d.metrics import Bootstrap
    from mim3d.tasks.evaluation import ClassTableSettings, EvaluationSettings, LabelMapSettings
    from mim3d.workflows.evaluate import evaluate_predictions

    settings = EvaluationSettings(
        predictions=predictions,
        references=references,
        compare=compare,
        bootstrap=Bootstrap(num_bootstrap=num_bootstrap, seed=seed),
        num_workers=num_workers,
        label_maps=LabelMapSettings(
            preset=preset,
            nsd_tolerance_mm=nsd_tolerance_mm,
            labels=labels,
            regions=regions,
            lesions=lesions,
            lesion_overlap=lesion_overlap,
            lesion_matching=lesion_matching,
            lesion_min_ml=lesion_min_ml,
            missing=missing,
        ),
        class_tables=ClassTableSettings(
            class_column=class_column,
            positive=positive,
            by_patient=by_patient,
            num_bins=num_bins,
            baseline_column=baseline_column,
        ),
    )
    return evaluate_predictions(settings, out, tables=tables, task=task)
