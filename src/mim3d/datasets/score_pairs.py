"""Pairs of a predicted label map and its reference, and the names of their labels."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mim3d.core.errors import DataError, listed
from mim3d.core.files import read_json
from mim3d.datasets.cases import read_cases
from mim3d.datasets.dataset_json import read_labels
from mim3d.datasets.folders import pair_folders, scans_in
from mim3d.scans.volumes import scan_id


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A label map and its reference.

    Attributes:
        id: Name of both.
        patient: Name of the patient; the id where nothing says so.
        prediction: Path of the predicted label map; None stands for an empty one.
        reference: Path of the reference.
        images: Paths of the scan's channels, where a list names them.
    """

    id: str
    patient: str
    prediction: str | None
    reference: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The label maps of two folders that belong together.

    Attributes:
        pairs: Pairs sorted by id.
        labels: Declared label value -> name, background 0 included; empty where nothing is declared.
        regions: Unions of labels that the predictions' own list declares: name -> label values or names.
        without_reference: Ids of predictions that no reference belongs to.
        without_prediction: Ids of references that were not predicted and are left out.
        failed: Ids left out whose prediction failed, as the predictions' own list says.
        scored_as_empty: Ids of references that were not predicted and are scored as empty predictions.
    """

    pairs: tuple[Pair, ...]
    labels: dict[int, str]
    regions: dict[str, list[int | str]]
    without_reference: tuple[str, ...]
    without_prediction: tuple[str, ...]
    failed: tuple[str, ...]
    scored_as_empty: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Maps:
    """Label maps by id, as one side names them."""

    paths: dict[str, str]
    images: dict[str, tuple[str, ...]] = field(default_factory=dict)
    labels: dict[int, str]
    failed: tuple[str, ...] = ()
    patients: dict[str, str] = field(default_factory=dict)
    regions: dict[str, list[int | str]] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: Sequence[str], folder: str) -> "_Maps":
        """Label files by the names of their files, with the labels that a dataset.json in or above a folder declares.

        Raises:
            DataError: Two files have the same name.
        """
        found: dict[str, str] = {}
        for path in map(os.path.abspath, paths):
            name = scan_id(path)
            if name in found:
                raise DataError(f"{path}: has the same name as {found[name]}; give each label map a name of its own.")
            found[name] = path
        labels: dict[int, str] = {}
        places = (os.path.join(place, "dataset.json") for place in (folder, os.path.dirname(os.path.abspath(folder))))
        description = next(filter(os.path.isfile, places), None)
        if description is not None:
            content = read_json(description)
            labels = read_labels(content.get("labels"), description) if isinstance(content, dict) else {}
        return cls(paths=found, labels=labels)


def find_pairs(predictions: str, references: str | Sequence[str], *, missing_as_empty: bool = False) -> Pairs:
    """Match label maps by id: the file name without suffix, or the id of a list.

    Args:
        predictions: Folder of label maps; its `predictions.json` is followed where there is one.
        references: Folder of label maps, label files, or any form of DATA with labels.
        missing_as_empty: Whether references that were not predicted are paired with an empty prediction.

    Raises:
        DataError: A side is missing or empty, two maps share an id, or no id is on both sides.
    """
    ours, theirs = _predicted(predictions), _referenced(references)
    shared = sorted(ours.paths.keys() & theirs.paths.keys())
    if not shared:
        raise DataError(
            f"{predictions}: no prediction is named like a reference; the predictions are "
            f"{listed(sorted(ours.paths))}, the references {listed(sorted(theirs.paths))}."
        )
    unpredicted = sorted(theirs.paths.keys() - ours.paths.keys())
    as_empty = unpredicted if missing_as_empty else []
    found = Pairs(
        pairs=tuple(
            Pair(
                id=name,
                patient=theirs.patients.get(name, name),
                prediction=ours.paths.get(name),
                reference=theirs.paths[name],
                images=ours.images.get(name) or theirs.images.get(name, ()),
            )
            for name in sorted([*shared, *as_empty])
        ),
        labels=ours.labels or theirs.labels,
        regions=ours.regions,
        without_reference=tuple(sorted(ours.paths.keys() - theirs.paths.keys())),
        without_prediction=() if missing_as_empty else tuple(unpredicted),
        failed=tuple(name for name in ours.failed if name not in as_empty),
        scored_as_empty=tuple(as_empty),
    )
    for names, fault in (
        (found.failed, "Not scored, failed to be predicted"),
        (found.without_reference, "Not scored, predicted without a reference"),
        (found.without_prediction, "Not scored, with a reference but no prediction"),
        (found.scored_as_empty, "Without a prediction, scored as empty ones"),
    ):
        if names:
            warnings.warn(f"{fault}: {listed(names)}.", stacklevel=2)
    differing = differing_names(ours.labels, theirs.labels)
    if differing:
        warnings.warn(
            f"Predictions and references name their labels differently: {listed(differing)}; check the values.",
            stacklevel=2,
        )
    return found


def differing_names(ours: Mapping[int, str], theirs: Mapping[int, str]) -> list[str]:
    """The label values that two sides name differently, for a sentence: ``1 is 'liver' and 'spleen'``."""
    both = sorted(ours.keys() & theirs.keys())
    return [f"{key} is {ours[key]!r} and {theirs[key]!r}" for key in both if ours[key] != theirs[key]]


def _predicted(folder: str) -> _Maps:
    """The label maps that a folder holds, or that its own list names."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder of predictions; give what `mim3d predict` wrote as --out.")
    listing = os.path.join(folder, "predictions.json")
    if not os.path.isfile(listing):
        return _Maps.of(scans_in(folder), folder)
    content = read_json(listing)
    cases = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(cases, list) or not all(
        isinstance(case, dict) and isinstance(case.get("id"), str) and isinstance(case.get("prediction"), str)
        for case in cases
    ):
        raise DataError(f'{listing}: needs a list "cases" of entries like {{"id": ..., "prediction": ...}}.')
    regions = {} if content.get("regions") is None else content["regions"]
    if not isinstance(regions, dict) or not all(
        isinstance(members, list) and all(isinstance(each, (int, str)) for each in members)
        for members in regions.values()
    ):
        raise DataError(f'{listing}: "regions" needs entries like {{"tumour core": [2, 3]}}, label values or names.')
    return _Maps(
        paths={case["id"]: os.path.abspath(os.path.join(folder, case["prediction"])) for case in cases},
        images={case["id"]: tuple(map(str, case.get("images") or ())) for case in cases},
        labels=read_labels(content.get("labels"), listing),
        failed=tuple(str(case.get("id")) for case in content.get("failed") or () if isinstance(case, dict)),
        regions={str(name): list(members) for name, members in regions.items()},
    )


def _referenced(references: str | Sequence[str]) -> _Maps:
    """The label maps of references in any form."""
    if not isinstance(references, str):
        if not references:
            raise DataError("No reference is given; name a folder of label maps or label files.")
        return _Maps.of(references, os.path.dirname(references[0]))
    if not os.path.exists(references):
        raise DataError(f"{references}: no such file or folder of references.")
    if os.path.isdir(references):
        # A data set has a description, or images beside its labels; any other folder is one of label maps.
        if not os.path.isfile(os.path.join(references, "dataset.json")) and pair_folders(references) is None:
            return _Maps.of(scans_in(references), references)
    elif not references.lower().endswith((".csv", ".json")):
        return _Maps.of([references], os.path.dirname(references))
    cases = read_cases(references)
    labelled = {case.id: case for case in cases.cases if case.label is not None}
    if not labelled:
        raise DataError(f"{references}: none of its {len(cases.cases)} cases has a label to score against.")
    return _Maps(
        paths={name: str(case.label) for name, case in labelled.items()},
        images={name: case.images for name, case in labelled.items()},
        patients={name: case.patient for name, case in labelled.items()},
        labels=cases.labels,
    )
