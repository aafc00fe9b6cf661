"""Which prediction belongs to which reference, and what their labels are called."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mim3d.core.errors import DataError, listed
from mim3d.datasets.cases import read_cases
from mim3d.datasets.dataset_json import read_json, read_labels
from mim3d.datasets.folders import pair_folders, scans_in
from mim3d.scans.volumes import scan_id


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A label map and its reference, and the images they belong to where a list names them.

    Attributes:
        id: what both are called.
        patient: whose case it is; the id where nothing says so.
        prediction: path of the label map; None stands for an empty one.
        reference: path of the reference.
        images: paths of the scan.
    """

    id: str
    patient: str
    prediction: str | None
    reference: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What two folders have in common.

    Attributes:
        pairs: sorted by id.
        labels: declared label value -> name, background 0 included; empty where nothing is declared.
        regions: unions of labels that the predictions' own list declares: name -> label values or names.
        without_reference: ids of predictions that no reference belongs to.
        without_prediction: ids of references that were not predicted and are left out.
        failed: ids left out whose prediction failed, as the predictions' own list says.
        scored_as_empty: ids of references that were not predicted and are scored as empty predictions.
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
    images: dict[str, tuple[str, ...]]
    labels: dict[int, str]
    failed: tuple[str, ...] = ()
    patients: dict[str, str] = field(default_factory=dict)
    regions: dict[str, list[int | str]] = field(default_factory=dict)


def find_pairs(predictions: str, references: str | Sequence[str], *, missing_as_empty: bool = False) -> Pairs:
    """Match label maps by id: the file name without suffix, or the id of a list.

    Args:
        predictions: a folder of label maps; its `predictions.json` is followed where there is one.
        references: a folder of label maps, label files, or any form of DATA with labels.
        missing_as_empty: pair references that were not predicted with an empty prediction.

    Raises:
        DataError: a side is missing or empty, two maps share an id, or no id is on both sides.
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
    _warn(found, ours.labels, theirs.labels)
    return found


def _warn(found: Pairs, ours: Mapping[int, str], theirs: Mapping[int, str]) -> None:
    for names, fault in (
        (found.failed, "failed to be predicted"),
        (found.without_reference, "predicted without a reference"),
        (found.without_prediction, "with a reference but no prediction"),
    ):
        if names:
            warnings.warn(f"Not scored, {fault}: {listed(names)}.", stacklevel=3)
    if found.scored_as_empty:
        warnings.warn(f"Without a prediction, scored as empty ones: {listed(found.scored_as_empty)}.", stacklevel=3)
    differing = differing_names(ours, theirs)
    if differing:
        warnings.warn(
            f"Predictions and references name their labels differently: {listed(differing)}; check the values.",
            stacklevel=3,
        )


def differing_names(ours: Mapping[int, str], theirs: Mapping[int, str]) -> list[str]:
    """The label values that two sides name differently, for a sentence: ``1 is 'liver' and 'spleen'``."""
    both = sorted(ours.keys() & theirs.keys())
    return [f"{key} is {ours[key]!r} and {theirs[key]!r}" for key in both if ours[key] != theirs[key]]


def _predicted(folder: str) -> _Maps:
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder of predictions; give what `mim3d predict` wrote as --out.")
    listing = os.path.join(folder, "predictions.json")
    if not os.path.isfile(listing):
        return _Maps(paths=_by_id(scans_in(folder)), images={}, labels=_beside(folder))
    content = read_json(listing)
    cases = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(cases, list) or not all(_is_case(case) for case in cases):
        raise DataError(f'{listing}: needs a list "cases" of entries like {{"id": ..., "prediction": ...}}.')
    return _Maps(
        paths={case["id"]: os.path.abspath(os.path.join(folder, case["prediction"])) for case in cases},
        images={case["id"]: tuple(map(str, case.get("images") or ())) for case in cases},
        labels=read_labels(content.get("labels"), listing),
        failed=tuple(str(case.get("id")) for case in content.get("failed") or () if isinstance(case, dict)),
        regions=_regions(content.get("regions"), listing),
    )


def _regions(declared: Any, listing: str) -> dict[str, list[int | str]]:
    """Unions of labels as a list of predictions declares them: name -> label values or names."""
    if declared is None:
        return {}
    if not isinstance(declared, dict) or not all(_is_region(members) for members in declared.values()):
        raise DataError(f'{listing}: "regions" needs entries like {{"tumour core": [2, 3]}}, label values or names.')
    return {str(name): list(members) for name, members in declared.items()}


def _is_region(members: Any) -> bool:
    return isinstance(members, list) and all(isinstance(each, (int, str)) for each in members)


def _is_case(case: Any) -> bool:
    return isinstance(case, dict) and isinstance(case.get("id"), str) and isinstance(case.get("prediction"), str)


def _referenced(references: str | Sequence[str]) -> _Maps:
    if not isinstance(references, str):
        if not references:
            raise DataError("No reference is given; name a folder of label maps or label files.")
        return _Maps(paths=_by_id(references), images={}, labels=_beside(os.path.dirname(references[0])))
    if _is_data(references):
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
    if os.path.isdir(references):
        return _Maps(paths=_by_id(scans_in(references)), images={}, labels=_beside(references))
    if not os.path.exists(references):
        raise DataError(f"{references}: no such file or folder of references.")
    return _Maps(paths=_by_id([references]), images={}, labels=_beside(os.path.dirname(references)))


def _is_data(path: str) -> bool:
    """Whether a path is a list or a data set with images and labels, not a plain folder of label maps."""
    if os.path.isdir(path):
        return os.path.isfile(os.path.join(path, "dataset.json")) or pair_folders(path) is not None
    return os.path.isfile(path) and path.lower().endswith((".csv", ".json"))


def _by_id(paths: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in map(os.path.abspath, paths):
        name = scan_id(path)
        if name in found:
            raise DataError(f"{path}: has the same name as {found[name]}; give each label map a name of its own.")
        found[name] = path
    return found


def _beside(folder: str) -> dict[int, str]:
    """Labels that a dataset.json in a folder or in the one above declares, if any."""
    for place in (folder, os.path.dirname(os.path.abspath(folder))):
        path = os.path.join(place, "dataset.json")
        if os.path.isfile(path):
            content = read_json(path)
            return read_labels(content.get("labels"), path) if isinstance(content, dict) else {}
    return {}
