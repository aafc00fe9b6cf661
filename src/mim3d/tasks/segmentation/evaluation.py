"""Evaluation of label maps: pairs with their references, names to score, and the file of scores."""

import os
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from rich.text import Text

from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.left_out import Failure, in_words
from mim3d.core.names import number_of
from mim3d.core.progress import counted
from mim3d.core.warned import ResultWarning, record_said
from mim3d.datasets.published.presets import find_preset
from mim3d.datasets.references import Pair, Pairs, differing_names, find_pairs
from mim3d.datasets.usable import refuse_or_say
from mim3d.metrics import (
    ABSENT,
    CONVENTIONS,
    SCORE_NAMES,
    LabelScore,
    LesionScore,
    LesionSettings,
    compare_paired,
    paired,
    summarise,
)
from mim3d.reporting.paper_tables import label_tables, p_cell
from mim3d.scans.grids import require_same_grid
from mim3d.scans.volumes import read_grid
from mim3d.tasks.evaluation import (
    ClassTableSettings,
    CsvTable,
    EvaluationSettings,
    LabelMapSettings,
    Scores,
    interval_cell,
    number_cell,
    printed_table,
)
from mim3d.tasks.segmentation.scoring import (
    CaseScoring,
    ScoredNames,
    chosen_lesions,
    label_name,
    processes_for,
    score_cases,
    scored_names,
)

if TYPE_CHECKING:
    from rich.table import Table

#: SOP classes of DICOM-SEG: Segmentation Storage and Label Map Segmentation Storage (PS3.4 B.5).
_DICOM_SEG = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")

#: Distance in mm up to which two surfaces agree where neither a flag nor a preset says so.
NSD_TOLERANCE_MM = 1.0

#: Scores of a case's lesions that go into the table of cases: all but the lists of single lesions.
LESION_NAMES = tuple(score.name for score in fields(LesionScore) if not score.name.startswith("reference_"))

#: What becomes of voxels of a reference that nothing is known of.
IGNORED = "Voxels of this value in a reference count in no score: both maps are background there."

CaseScores = Mapping[str, LabelScore]


class LabelEvaluation:
    """The scoring of label maps.

    Args:
        settings: What is scored against what, and how.

    Raises:
        ConfigError: Settings that mean nothing to label maps, or a preset that is unknown or of another task.
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        settings.refuse_given(ClassTableSettings, "tables of classes", "a folder of label maps")
        self.settings = settings
        self.preset = preset = None if settings.preset is None else find_preset(settings.preset)
        if preset is not None and preset.task != "segmentation":
            raise ConfigError(
                f"preset {preset.name} is for {preset.task}, but predictions are label maps; leave it out."
            )
        tolerance_mm = settings.nsd_tolerance_mm
        if tolerance_mm is None:
            tolerance_mm = NSD_TOLERANCE_MM if preset is None else preset.nsd_tolerance_mm
        self.nsd_tolerance_mm = tolerance_mm
        self.lesion_settings = LesionSettings(
            overlap=settings.lesion_overlap, matching=settings.lesion_matching, min_ml=settings.lesion_min_ml
        )

    def scores(self) -> Scores:
        """Score all cases, and compare them with those of another method where one is named.

        Raises:
            ConfigError: A label or region is unknown.
            DataError: There is nothing to match, a file is unreadable, or grids disagree.
        """
        settings = self.settings
        found = self._pairs(settings.predictions)
        names = scored_names(
            found.labels, settings.labels, found.regions if settings.regions is None else settings.regions
        )
        is_strict = settings.labels is None and settings.regions is None and bool(found.labels)
        scoring = CaseScoring(
            regions=names.regions,
            allowed=frozenset(value for value in found.labels if value) if is_strict else None,
            nsd_tolerance_mm=self.nsd_tolerance_mm,
            lesions=None if settings.lesions is False else self.lesion_settings,
            lesions_of=chosen_lesions(settings.lesions, list(names.regions)),
            ignore_label=found.ignore_label,
            names=found.labels,
        )
        others = None if settings.compare is None else self._compared(found, settings.compare)
        assumed: list[str] = []
        answers = self._score(found, others, scoring, assumed)
        failures = {
            name: Failure(f"{name}: its prediction failed: {reason}")
            for name, reason in found.failed.items()
            if name in found.without_prediction
        }
        if failures and settings.strict:
            reasons = [failure.reason for failure in failures.values()]
            refuse_or_say(settings.predictions, reasons, len(found.pairs) + len(failures), strict=True)
        failures |= {pair.id: answer for pair in found.pairs if isinstance(answer := answers[id(pair)], Failure)}
        found = _scorable(found, answers)
        if others is not None:
            others = _scorable(others, answers, {pair.id for pair in found.pairs})
        every = [*found.pairs, *(others.pairs if others else ())]
        kept = [pair for pair in every if not isinstance(answers[id(pair)], Failure)]
        scores = [answer for pair in kept if not isinstance(answer := answers[id(pair)], Failure)]
        if not names.regions:
            names = _names_held(kept, scores, settings.predictions)
        # A label that a case does not hold, or was not annotated for, is absent.
        absent = LabelScore(status="absent", lesions=LesionScore()) if settings.lesions is True else ABSENT
        completed = [{name: case.get(name, absent) for name in names.regions} for case in scores]
        ours, theirs = completed[: len(found.pairs)], completed[len(found.pairs) :]
        content = self._content(found, ours, names)
        if failures:
            unusable = [{"id": name, "reason": failure.reason} for name, failure in failures.items()]
            content["not_scored"]["unusable"] = unusable
        for sentence in assumed:
            record_said(ResultWarning.kind, sentence)
        csv_tables = {".csv": _rows(content["cases"])}
        if others is not None:
            content["conventions"] = {**content["conventions"], **paired.CONVENTIONS}
            content["comparison"] = self._comparison(found, others, ours, theirs, list(names.regions))
            csv_tables[".compared.csv"] = _rows(content["comparison"]["cases"])
        return Scores(
            content=content,
            num_cases=len(ours),
            csv_tables=csv_tables,
            printed=_printed(content),
            paper_tables=label_tables(content),
            failures=failures,
        )

    def _score(
        self, found: Pairs, others: Pairs | None, scoring: CaseScoring, assumed: list[str]
    ) -> dict[int, CaseScores | Failure]:
        """Score the pairs of both methods; scores, or why there are none, by the identity of the pair.

        What headers leave open, and what is assumed of it, is added to ``assumed`` in sentences.

        Raises:
            DataError: Nothing can be scored; or with ``strict``, a case cannot be.
        """
        pairs = [*found.pairs, *(others.pairs if others else ())]
        answers: dict[int, CaseScores | Failure] = {}

        def record(answered: Iterable[tuple[Pair, CaseScores | Failure | None]], num_pairs: int) -> None:
            reasons = []
            for pair, answer in answered:
                if answer is not None:
                    answers[id(pair)] = answer
                if isinstance(answer, Failure):
                    reasons.append(answer.reason)
            if reasons:
                refuse_or_say(self.settings.predictions, reasons, num_pairs, strict=self.settings.strict)

        # By headers before any score.
        record(((pair, _fault_of(pair, assumed)) for pair in pairs), len(pairs))
        for side in (found, *([others] if others else ())):
            _scorable(side, answers)
        usable = [pair for pair in pairs if id(pair) not in answers]
        work = score_cases(usable, scoring, processes_for(usable, self.settings.num_workers))
        record(counted(work, len(usable), "scoring"), len(usable))
        return answers

    def _pairs(self, predictions: str) -> Pairs:
        """Find what is to be scored, under the names of the preset."""
        references = self.settings.references
        try:
            found = find_pairs(predictions, references, missing_as_empty=self.settings.missing == "worst")
        except DataError:
            # A folder of nothing but DICOM-SEG seems to hold no label map at all.
            paths = [references] if isinstance(references, str) else references
            _refuse_dicom_seg([*_files(predictions), *(file for path in paths for file in _files(path))])
            raise
        if self.preset is None:
            return found
        differing = differing_names(self.preset.labels, found.labels)
        if differing:
            warnings.warn(
                f"The preset {self.preset.name} and {predictions} or its references name their labels differently: "
                f"{listed(differing)}; check the values.",
                stacklevel=2,
            )
        found = replace(found, labels=self.preset.labels)
        regions = self.preset.regions
        return found if regions is None else replace(found, regions={name: [*regions[name]] for name in regions})

    def _compared(self, found: Pairs, compare: str) -> Pairs:
        """Find the pairs of the other method, of the cases that both have."""
        predictions, others = self.settings.predictions, self._pairs(compare)
        differing = differing_names(found.labels, others.labels)
        if differing:
            warnings.warn(
                f"{predictions} and {compare} name their labels differently: {listed(differing)}; check the values.",
                stacklevel=2,
            )
        shared = {pair.id for pair in found.pairs}
        pairs = tuple(pair for pair in others.pairs if pair.id in shared)
        if not pairs:
            raise DataError(f"{compare}: has no prediction of a case that {predictions} has; compare others.")
        return replace(others, pairs=pairs)

    def _content(self, found: Pairs, scores: Sequence[CaseScores], names: ScoredNames) -> dict[str, Any]:
        """Return what the file of scores holds."""
        settings, references = self.settings, self.settings.references
        patients = [pair.patient for pair in found.pairs]
        return {
            "kind": "segmentation",
            "labels": {str(value): name for value, name in names.labels.items()},
            "regions": {name: list(members) for name, members in names.unions.items()},
            "settings": {
                "predictions": os.path.abspath(settings.predictions),
                "references": os.path.abspath(references) if isinstance(references, str) else references,
                **settings.group(LabelMapSettings),
                "preset": self.preset and self.preset.name,
                "nsd_tolerance_mm": self.nsd_tolerance_mm,
                "compare": settings.compare and os.path.abspath(settings.compare),
                **asdict(settings.bootstrap),
            },
            **({} if found.ignore_label is None else {"ignore_label": found.ignore_label}),
            "conventions": {
                **CONVENTIONS,
                **({} if found.ignore_label is None else {"ignore_label": IGNORED}),
                "missing": (
                    "A reference without a prediction, one whose prediction failed included, is left out of all scores "
                    "and named under not_scored (leave_out), or scored as an empty prediction and named under "
                    "scored_as_empty (worst)."
                ),
                "regions": "A region is scored as the union of its labels; the mean is over all rows of per_label.",
            },
            "num_cases": len(scores),
            "num_patients": len(set(patients)),
            "not_scored": {
                "failed": list(found.failed),
                "without_reference": found.without_reference,
                "without_prediction": found.without_prediction,
            },
            "scored_as_empty": found.scored_as_empty,
            **summarise(scores, list(names.regions), patients, settings.bootstrap),
            "cases": [_record(pair, case) for pair, case in zip(found.pairs, scores, strict=True)],
        }

    def _comparison(
        self,
        found: Pairs,
        others: Pairs,
        ours: Sequence[CaseScores],
        theirs: Sequence[CaseScores],
        names: Sequence[str],
    ) -> dict[str, Any]:
        """Compare both methods on the cases that both have."""
        bootstrap, compare = self.settings.bootstrap, self.settings.compare
        by_id = {pair.id: case for pair, case in zip(found.pairs, ours, strict=True)}
        mine = [by_id[pair.id] for pair in others.pairs]
        patients = [pair.patient for pair in others.pairs]
        assert compare is not None
        return {
            "predictions": os.path.abspath(compare),
            "num_cases": len(others.pairs),
            "only_in_predictions": sorted(by_id.keys() - {pair.id for pair in others.pairs}),
            "this": summarise(mine, names, patients, bootstrap),
            "compared": summarise(theirs, names, patients, bootstrap),
            "paired": compare_paired(mine, theirs, names, patients, bootstrap),
            "cases": [_record(pair, case) for pair, case in zip(others.pairs, theirs, strict=True)],
        }


def _fault_of(pair: Pair, assumed: list[str]) -> Failure | None:
    """Why a pair cannot be scored, as far as headers tell; what is assumed of its grids is added to ``assumed``."""
    paths = [pair.reference, *([] if pair.prediction is None else [pair.prediction])]
    try:
        _refuse_dicom_seg(paths[::-1])
        reference, *predicted = map(read_grid, paths)
        for grid in (reference, *predicted):
            assumed.extend(f"{grid.path}: {phrase}." for phrase in grid.assumed)
            require_same_grid(reference, grid)
    except Exception as error:  # Whatever a reader raises, it must not stop the other cases.
        return Failure.of(error, paths[-1])
    return None


def _scorable(found: Pairs, answers: Mapping[int, CaseScores | Failure], ids: Container[str] | None = None) -> Pairs:
    """The pairs that have scores, of some ids where these are given.

    Raises:
        DataError: There is none.
    """
    wanted = [pair for pair in found.pairs if ids is None or pair.id in ids]
    pairs = tuple(pair for pair in wanted if not isinstance(answers.get(id(pair)), Failure))
    if not pairs:
        reasons = [answer.reason for pair in found.pairs if isinstance(answer := answers[id(pair)], Failure)]
        raise DataError(f"none of {number_of(len(found.pairs), 'case')} can be scored: {in_words(reasons)}")
    return replace(found, pairs=pairs)


def _files(path: str) -> list[str]:
    """List the files that lie in a folder, or the file itself."""
    if not os.path.isdir(path):
        return [path]
    return sorted(entry.path for entry in os.scandir(path) if entry.is_file())


def _refuse_dicom_seg(paths: Sequence[str]) -> None:
    """Refuse DICOM-SEG: its segments are no label values, and frames without any are left out."""
    for path in paths:
        if not path.lower().endswith(".dcm"):
            continue
        from mim3d.scans.dicom.headers import read_kind

        try:
            kind = read_kind(path)
        except DataError:
            continue
        if kind in _DICOM_SEG:
            raise DataError(
                f"{path}: is a DICOM-SEG, which cannot be scored; run mim3d predict with --format nii.gz, or convert "
                "it to NIfTI."
            )


def _names_held(pairs: Sequence[Pair], scores: Sequence[CaseScores], predictions: str) -> ScoredNames:
    """Return the labels that references hold, where nothing was declared or chosen.

    A value of predictions alone would count as a label that is wrong in every case; it is named in a warning instead.
    Where references hold no label at all, those of the predictions are all there is to score.
    """
    known = {name for case in scores for name, score in case.items() if score.status in ("scored", "missed")}
    stray: dict[str, str] = {}
    for pair, case in zip(pairs, scores, strict=True):
        for name in case.keys() - known:
            stray.setdefault(name, pair.id)
    values = sorted(int(name.removeprefix(label_name(0)[:-1])) for name in known or stray)
    if not values:
        raise DataError(f"{predictions}: neither the predictions nor the references hold a label to score.")
    if known and stray:
        first = sorted(int(name.removeprefix(label_name(0)[:-1])) for name in stray)
        asked = " ".join(map(str, [*values, *first]))
        warnings.warn(
            f"{predictions} holds values that no reference holds and nothing declares: "
            f"{listed([f'{value} (first in {stray[label_name(value)]})' for value in first])}; they are not scored. "
            f"If they are labels, use --labels {asked}.",
            stacklevel=2,
        )
    return ScoredNames(
        regions={label_name(value): (value,) for value in values},
        labels={value: label_name(value) for value in values},
        unions={},
    )


def _record(pair: Pair, case: CaseScores) -> dict[str, Any]:
    """Return what the file of scores holds of a case."""
    labels = {name: asdict(score) for name, score in case.items()}
    for score in labels.values():
        if score["lesions"] is None:
            del score["lesions"]
    return {**asdict(pair), "labels": labels}


def _rows(cases: Sequence[Mapping[str, Any]]) -> CsvTable:
    """Return the table of cases: a row per case and label."""
    with_lesions = any("lesions" in score for case in cases for score in case["labels"].values())
    lesion_names = LESION_NAMES if with_lesions else ()
    rows = []
    for case in cases:
        for name, score in case["labels"].items():
            found = score.get("lesions") or {}
            numbers = [*(score[key] for key in SCORE_NAMES), *(found.get(key) for key in lesion_names)]
            rows.append([case["id"], name, score["status"], *numbers, case["patient"]])
    return ["id", "label", "status", *SCORE_NAMES, *(f"lesion_{key}" for key in lesion_names), "patient"], rows


def _printed(content: Mapping[str, Any]) -> "list[Table]":
    """Return the scores per label, those of lesions, and the comparison, for the terminal."""
    tolerance = content["settings"]["nsd_tolerance_mm"]
    heads = ("Cases", "Dice", "HD95 mm", f"NSD {tolerance:g} mm", "Volume error ml", "Missed", "False positive")
    table, keys = printed_table(None, "Label", heads), ("dice", "hd95_mm", "nsd", "volume_error_ml")
    for name, row in content["per_label"].items():
        counts = [str(row[key]) for key in ("num_cases", "num_missed", "num_invented")]
        table.add_row(Text(name), counts[0], *(number_cell(row[key], key) for key in keys), *counts[1:])
    table.add_section()
    mean, ends = content["mean"], content["mean_ci95"]
    num_unusable = len(content["not_scored"].get("unusable", ()))
    of_all = f" of {content['num_cases'] + num_unusable}" if num_unusable else ""
    table.add_row("mean", f"{content['num_cases']}{of_all}", *(number_cell(mean[key], key) for key in keys), "", "")
    if ends["dice"] is not None:
        in_two_lines = [interval_cell(ends[key], key).replace(" to ", " to\n") for key in keys]
        table.add_row("95 % interval", "", *in_two_lines, "", "")
    tables = [table]
    lesions = {name: row["lesions"] for name, row in content["per_label"].items() if "lesions" in row}
    if lesions:
        heads = ("Lesions", "Detected", "Sensitivity", "Precision", "F1", "Lesion Dice", "False per scan")
        table = printed_table("Lesions", "Label", heads)
        for name, row in lesions.items():
            counts = [str(row["num_reference"]), str(row["num_detected"])]
            values = [row[key] for key in ("sensitivity", "precision", "f1", "dice", "false_positives_per_scan")]
            table.add_row(Text(name), *counts, *(number_cell(value, "dice") for value in values))
        tables.append(table)
    if "comparison" in content:
        tables.append(_printed_comparison(content["comparison"]))
    return tables


def _printed_comparison(comparison: Mapping[str, Any]) -> "Table":
    title = f"Difference to {comparison['predictions']}, {comparison['num_cases']} cases"
    table = printed_table(title, "Label", ("Score", "Difference", "95 % interval", "p", "p after Holm"))
    for name, row in [*comparison["paired"]["per_label"].items(), ("mean", comparison["paired"]["mean"])]:
        for key in ("dice", "hd95_mm", "nsd", "lesion_f1"):
            each = row.get(key)
            if each is None:
                continue
            holm = p_cell(each["p_holm"]) if "p_holm" in each else ""
            difference = "-" if each["difference"] is None else f"{each['difference']:+.4f}"
            table.add_row(Text(name), key, difference, interval_cell(each["ci95"], key), p_cell(each["p"]), holm)
    return table
