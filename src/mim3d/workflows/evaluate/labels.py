"""Label maps against their references: which, how, and the file of scores that comes of it."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mim3d.core.errors import DataError, listed
from mim3d.core.files import write_json
from mim3d.core.progress import counted
from mim3d.datasets.score_pairs import Pair, Pairs, differing_names, find_pairs
from mim3d.metrics import (
    ABSENT,
    CONVENTIONS,
    Bootstrap,
    LabelScore,
    LesionScore,
    LesionSettings,
    compare_paired,
    paired,
    summarise,
)
from mim3d.scans.grids import require_same_grid
from mim3d.scans.volumes import read_grid
from mim3d.workflows.evaluate import score_files
from mim3d.workflows.evaluate.scored_names import Scored, chosen_lesions, scored_names
from mim3d.workflows.evaluate.scoring import Scoring, label_name, processes_for, scored

if TYPE_CHECKING:
    from mim3d.datasets.published.presets import Preset

#: SOP classes of DICOM-SEG: Segmentation Storage and Label Map Segmentation Storage (PS3.4 B.5).
_DICOM_SEG = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")

CaseScores = Mapping[str, LabelScore]


@dataclass(frozen=True, kw_only=True)
class LabelEvaluation:
    """The settings of `mim3d evaluate` for label maps."""

    predictions: str
    references: str | Sequence[str]
    out: str
    preset: "Preset | None"
    nsd_tolerance_mm: float
    labels: Sequence[str] | None
    regions: Mapping[str, Sequence[int | str]] | None
    lesions: bool | Sequence[str]
    lesion_settings: LesionSettings
    missing: str
    compare: str | None
    bootstrap: Bootstrap
    tables: bool
    num_workers: int | None

    def run(self) -> str:
        """Score, write and show; the path of the file of scores."""
        found = self._pairs(self.predictions)
        names = scored_names(found.labels, self.labels, found.regions if self.regions is None else self.regions)
        scoring = self._scoring(found, names)
        others = None if self.compare is None else self._compared(found, self.compare)
        pairs = [*found.pairs, *(others.pairs if others else ())]
        for pair in pairs:
            if pair.prediction is not None:
                require_same_grid(read_grid(pair.reference), read_grid(pair.prediction))
        work = scored(pairs, scoring, processes_for(pairs, self.num_workers))
        scores = list(counted(work, len(pairs), "scoring"))
        if not names.regions:
            names = _held(scores, self.predictions)
        completed = [self._complete(case, names) for case in scores]
        ours, theirs = completed[: len(found.pairs)], completed[len(found.pairs) :]
        content = self._content(found, ours, names)
        if others is not None:
            content["conventions"] = {**content["conventions"], **paired.CONVENTIONS}
            content["comparison"] = self._comparison(found, others, ours, theirs, list(names.regions))
        write_json(self.out, content, indent=1, allow_nan=False)
        score_files.write_label_rows(self.out, content)
        score_files.show_labels(content)
        if self.tables:
            score_files.write_tables(self.out, content)
        print(f"Scores of {len(ours)} cases: {self.out}")
        return self.out

    def _pairs(self, predictions: str) -> Pairs:
        """What is to be scored, under the names of the preset."""
        try:
            found = find_pairs(predictions, self.references, missing_as_empty=self.missing == "worst")
        except DataError:
            # A folder of nothing but DICOM-SEG seems to hold no label map at all.
            references = [self.references] if isinstance(self.references, str) else self.references
            _refuse_dicom_seg([*_files(predictions), *(file for path in references for file in _files(path))])
            raise
        _refuse_dicom_seg([path for pair in found.pairs for path in (pair.prediction, pair.reference) if path])
        return found if self.preset is None else _renamed(found, self.preset, predictions)

    def _scoring(self, found: Pairs, names: Scored) -> Scoring:
        asked = self.lesions if isinstance(self.lesions, bool) else True
        is_strict = self.labels is None and self.regions is None and bool(found.labels)
        return Scoring(
            regions=names.regions,
            allowed=frozenset(value for value in found.labels if value) if is_strict else None,
            nsd_tolerance_mm=self.nsd_tolerance_mm,
            lesions=self.lesion_settings if asked else None,
            lesions_of=chosen_lesions(self.lesions, list(names.regions)),
        )

    def _compared(self, found: Pairs, compare: str) -> Pairs:
        """Pairs of the other method, of the cases that both have."""
        others = self._pairs(compare)
        differing = differing_names(found.labels, others.labels)
        if differing:
            warnings.warn(
                f"{self.predictions} and {compare} name their labels differently: {listed(differing)}; check the "
                "values.",
                stacklevel=2,
            )
        shared = {pair.id for pair in found.pairs}
        pairs = tuple(pair for pair in others.pairs if pair.id in shared)
        if not pairs:
            raise DataError(f"{compare}: has no prediction of a case that {self.predictions} has; compare others.")
        return replace(others, pairs=pairs)

    def _complete(self, case: CaseScores, names: Scored) -> dict[str, LabelScore]:
        """A case's scores of every name; a label that it does not hold is absent."""
        absent = LabelScore(status="absent", lesions=LesionScore()) if self.lesions is True else ABSENT
        return {name: case.get(name, absent) for name in names.regions}

    def _settings(self) -> dict[str, Any]:
        references = self.references
        return {
            "predictions": os.path.abspath(self.predictions),
            "references": os.path.abspath(references) if isinstance(references, str) else references,
            "preset": self.preset and self.preset.name,
            "nsd_tolerance_mm": self.nsd_tolerance_mm,
            "labels": self.labels,
            "regions": self.regions,
            "lesions": self.lesions,
            **{f"lesion_{key}": value for key, value in asdict(self.lesion_settings).items()},
            "missing": self.missing,
            "compare": self.compare and os.path.abspath(self.compare),
            **asdict(self.bootstrap),
        }

    def _content(self, found: Pairs, scores: Sequence[CaseScores], names: Scored) -> dict[str, Any]:
        """What the file of scores holds."""
        patients = [pair.patient for pair in found.pairs]
        return {
            "kind": "segmentation",
            "labels": {str(value): name for value, name in names.labels.items()},
            "regions": {name: list(members) for name, members in names.unions.items()},
            "settings": self._settings(),
            "conventions": {
                **CONVENTIONS,
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
                "failed": found.failed,
                "without_reference": found.without_reference,
                "without_prediction": found.without_prediction,
            },
            "scored_as_empty": found.scored_as_empty,
            **summarise(scores, list(names.regions), patients, self.bootstrap),
            "cases": [_row(pair, case) for pair, case in zip(found.pairs, scores, strict=True)],
        }

    def _comparison(
        self,
        found: Pairs,
        others: Pairs,
        ours: Sequence[CaseScores],
        theirs: Sequence[CaseScores],
        names: Sequence[str],
    ) -> dict[str, Any]:
        """Both methods on the cases that both have."""
        by_id = {pair.id: case for pair, case in zip(found.pairs, ours, strict=True)}
        mine = [by_id[pair.id] for pair in others.pairs]
        patients = [pair.patient for pair in others.pairs]
        assert self.compare is not None
        return {
            "predictions": os.path.abspath(self.compare),
            "num_cases": len(others.pairs),
            "only_in_predictions": sorted(by_id.keys() - {pair.id for pair in others.pairs}),
            "this": summarise(mine, names, patients, self.bootstrap),
            "compared": summarise(theirs, names, patients, self.bootstrap),
            "paired": compare_paired(mine, theirs, names, patients, self.bootstrap),
            "cases": [_row(pair, case) for pair, case in zip(others.pairs, theirs, strict=True)],
        }


def _files(path: str) -> list[str]:
    """The files that lie in a folder, or the file itself."""
    if not os.path.isdir(path):
        return [path]
    return sorted(entry.path for entry in os.scandir(path) if entry.is_file())


def _refuse_dicom_seg(paths: Sequence[str]) -> None:
    """Refuse DICOM-SEG: its segments are no label values, and frames without any are left out."""
    for path in paths:
        if path.lower().endswith(".dcm") and _is_dicom_seg(path):
            raise DataError(
                f"{path}: is a DICOM-SEG, which cannot be scored; run mim3d predict with --format nii.gz, or convert "
                "it to NIfTI."
            )


def _is_dicom_seg(path: str) -> bool:
    from mim3d.scans.dicom.headers import read_header

    try:
        header, _ = read_header(path)
    except DataError:
        return False
    return header.get("SOPClassUID") in _DICOM_SEG


def _renamed(found: Pairs, preset: "Preset", predictions: str) -> Pairs:
    """Pairs under the label names of a preset, and its regions where it has some."""
    differing = differing_names(preset.labels, found.labels)
    if differing:
        warnings.warn(
            f"The preset {preset.name} and {predictions} or its references name their labels differently: "
            f"{listed(differing)}; check the values.",
            stacklevel=2,
        )
    if preset.regions is None:
        return replace(found, labels=preset.labels)
    return replace(found, labels=preset.labels, regions={name: [*values] for name, values in preset.regions.items()})


def _held(scores: Sequence[CaseScores], predictions: str) -> Scored:
    """The labels that maps hold, where nothing was declared or chosen."""
    values = sorted({int(name.removeprefix(label_name(0)[:-1])) for case in scores for name in case})
    if not values:
        raise DataError(f"{predictions}: neither the predictions nor the references hold a label to score.")
    return Scored(
        regions={label_name(value): (value,) for value in values},
        labels={value: label_name(value) for value in values},
        unions={},
    )


def _row(pair: Pair, case: CaseScores) -> dict[str, Any]:
    return {
        "id": pair.id,
        "patient": pair.patient,
        "prediction": pair.prediction,
        "reference": pair.reference,
        "images": pair.images,
        "labels": {name: _without_none_lesions(score) for name, score in case.items()},
    }


def _without_none_lesions(score: LabelScore) -> dict[str, Any]:
    content = asdict(score)
    return content if score.lesions is not None else {key: value for key, value in content.items() if key != "lesions"}
