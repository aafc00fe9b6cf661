"""Predictions and the references they are scored against: label maps by their names, classes by the rows of tables."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mim3d.core.errors import DataError, listed
from mim3d.core.files import read_json
from mim3d.core.names import number_of, printable
from mim3d.core.progress import say
from mim3d.core.settings import nearest
from mim3d.datasets.cases import Case, CaseSet, pair_folders, read_cases, scans_in
from mim3d.datasets.descriptions import LabelDeclaration, read_labels
from mim3d.datasets.ids import endings_apart, matched_ids, unique_ids
from mim3d.datasets.label_maps import has_pairs, in_label_folders
from mim3d.datasets.lists import beside, channel_names, read_table
from mim3d.datasets.mistaken import not_references
from mim3d.datasets.usable import refuse_or_say
from mim3d.scans.grids import file_of, resolved
from mim3d.scans.volumes import scan_id

#: Name of the table that prediction writes into its folder.
TABLE_NAME = "predictions.csv"

#: Name of the list beside it.
CLASS_LIST_NAME = "classification.json"
#: List of predicted label maps.
LIST_NAME = "predictions.json"

#: Columns that may name a case; the first that is there counts. An image is named as cases of a list are.
ID_COLUMNS = ("id", "case", "image")
_PROBABILITY = "probability_"

#: What a warning says of the ids in these attributes of ``Pairs`` and ``ClassTable``.
_UNMATCHED = {
    "failed": "Not scored, failed to be predicted",
    "without_reference": "Not scored, predicted without a reference",
    "without_prediction": "Not scored, with a reference but no prediction",
    "scored_as_empty": "Without a prediction, scored as empty ones",
}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A label map and its reference.

    Attributes:
        id: Name of both.
        patient: Name of the patient; the id where nothing says so.
        prediction: Path of the predicted label map; None stands for an empty one.
        reference: Path of the reference.
        images: Paths of the scan's channels, where a list names them.
        labelled: Labels, by name or value, that the reference has annotations of; None stands for all.
    """

    id: str
    patient: str
    prediction: str | None
    reference: str
    images: tuple[str, ...] = ()
    labelled: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The label maps of two folders that belong together.

    Attributes:
        pairs: Pairs sorted by id.
        labels: Declared label value -> name, background 0 included; empty where nothing is declared.
        regions: Unions of labels that the predictions' own list declares, else the references: name -> label values
            or names.
        ignore_label: Label value of voxels of a reference that nothing is known of, and that count in no score.
        without_reference: Ids of predictions that no reference belongs to.
        without_prediction: Ids of references that were not predicted and are left out.
        failed: Ids left out whose prediction failed, as the predictions' own list says, and why.
        scored_as_empty: Ids of references that were not predicted and are scored as empty predictions.
    """

    pairs: tuple[Pair, ...]
    labels: dict[int, str]
    regions: dict[str, list[int | str]]
    without_reference: tuple[str, ...]
    without_prediction: tuple[str, ...]
    failed: Mapping[str, str]
    scored_as_empty: tuple[str, ...]
    ignore_label: int | None = None


def annotated_values(case: Case | Pair, names: Mapping[int, str]) -> set[int] | None:
    """Return the label values that a case has annotations of, with the background; None for all.

    Raises:
        DataError: The data set lacks a label that the case names.
    """
    if case.labelled is None:
        return None
    known = {**{str(value): value for value in names}, **{name: value for value, name in names.items()}}
    for label in case.labelled:
        if label not in known:
            raise DataError(f"case {case.id} is said to have annotations of '{label}'.{nearest(label, known)}")
    return {0, *(known[label] for label in case.labelled)}


def find_pairs(predictions: str, references: str | Sequence[str], *, missing_as_empty: bool = False) -> Pairs:
    """Match label maps by their scans where both sides name them, else by id: the file name without suffix.

    Ids may differ in spelling: upper and lower case, composed letters, ``_0000`` at the end; and in words for what a
    file is (``p1_ct``, ``p1_seg``).

    Args:
        predictions: Folder of label maps; its `predictions.json` is followed where there is one.
        references: Folder of label maps, label files, or any form of DATA with labels.
        missing_as_empty: Whether references that were not predicted are paired with an empty prediction.

    Raises:
        DataError: A side is missing or empty, two maps share an id, no id is on both sides, or an id could
            belong to several.
    """
    predicted, regions, failed = _predicted(predictions)
    referenced = _referenced(references)
    ours, theirs = ({case.id: case for case in side.cases} for side in (predicted, referenced))
    images_of = [{name: case.images for name, case in side.items()} for side in (ours, theirs)]
    matched = _matched(predictions, *images_of)
    predictions_of = {other: ours[name] for name, other in matched.items()}
    unpredicted = sorted(theirs.keys() - predictions_of.keys())
    not_held_out = _not_held_out(os.path.join(predictions, LIST_NAME), unpredicted)
    as_empty = [name for name in unpredicted if name not in not_held_out] if missing_as_empty else []
    empty = Case(images=())
    found = Pairs(
        pairs=tuple(
            Pair(
                id=name,
                patient=theirs[name].patient,
                prediction=predictions_of.get(name, empty).label,
                reference=str(theirs[name].label),
                images=predictions_of.get(name, empty).images or theirs[name].images,
                labelled=theirs[name].labelled,
            )
            for name in sorted([*predictions_of, *as_empty])
        ),
        labels=predicted.labels or referenced.labels,
        regions=regions or {name: [*members] for name, members in referenced.regions.items()},
        without_reference=tuple(sorted(ours.keys() - matched.keys())),
        without_prediction=tuple(name for name in unpredicted if name not in as_empty),
        failed={name: reason for name, reason in failed.items() if name not in as_empty},
        scored_as_empty=tuple(as_empty),
        ignore_label=predicted.ignore_label if referenced.ignore_label is None else referenced.ignore_label,
    )
    _warn_of_unmatched(found, not_held_out)
    differing = differing_names(predicted.labels, referenced.labels)
    if differing:
        warnings.warn(
            f"Predictions and references name their labels differently: {listed(differing)}; check the values.",
            stacklevel=2,
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Label maps of scans.

    Attributes:
        paths: Label map of each scan that has one, by the id of the scan.
        labels: Declared label value -> name; empty where nothing is declared.
        ignore_label: Declared value of voxels that nothing is known of.
    """

    paths: Mapping[str, str]
    labels: Mapping[int, str]
    ignore_label: int | None


def masks_of(masks: str, cases: Sequence[Case]) -> Masks:
    """Match label maps with scans: by the files of the scans where both sides name them, else by id, as for scores.

    Args:
        masks: Folder of label maps, with a `predictions.json` that is followed where there is one; label files; or any
            form of DATA with labels.
        cases: The scans.

    Raises:
        DataError: There are no label maps, none belongs to a scan, or one could belong to several.
    """
    is_listed = os.path.isfile(os.path.join(masks, LIST_NAME))
    found = _predicted(masks)[0] if is_listed else _referenced(masks)
    by_files = {resolved(case.images): case.id for case in found.cases if case.images}
    matched = {case.id: by_files[key] for case in cases if (key := resolved(case.images)) in by_files}
    if len(cases) == len(found.cases) == 1 and os.path.isfile(masks):
        # Whatever they are called; that they lie on one grid is seen when they are read.
        matched = {cases[0].id: found.cases[0].id}
    taken = set(matched.values())
    ours = [case.id for case in cases if case.id not in matched]
    matched |= matched_ids(ours, [c.id for c in found.cases if c.id not in taken], ("the scans", "the masks"))
    if not matched:
        raise DataError(
            f"{masks}: no mask is named like a scan; the masks are {listed(sorted(c.id for c in found.cases))}, the "
            f"scans {listed(sorted(ours))}."
        )
    differing = [
        f"{name} with {other}" for name, other in sorted(matched.items()) if name != other and other not in taken
    ]
    if differing:
        warnings.warn(f"Masks of other names than their scans: {listed(differing)}.", stacklevel=3)
    path_of = {case.id: str(case.label) for case in found.cases}
    paths = {name: path_of[other] for name, other in matched.items()}
    return Masks(paths=paths, labels=found.labels, ignore_label=found.ignore_label)


def differing_names(ours: Mapping[int, str], theirs: Mapping[int, str]) -> list[str]:
    """The label values that two sides name differently, for a sentence: ``1 is 'liver' and 'spleen'``."""
    both = sorted(ours.keys() & theirs.keys())
    return [f"{key} is {ours[key]!r} and {theirs[key]!r}" for key in both if ours[key] != theirs[key]]


def _predicted(folder: str) -> tuple[CaseSet, dict[str, list[int | str]], dict[str, str]]:
    """The label maps that a folder holds, or that its own list names; and the regions and failures in that list."""
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder of predictions; give what `mim3d predict` wrote as --out.")
    listing = os.path.join(folder, LIST_NAME)
    if not os.path.isfile(listing):
        return _label_maps(scans_in(folder, with_predictions=True), folder), {}, {}
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
    base = os.path.join(os.path.abspath(folder), "")
    for case in cases:
        if not os.path.abspath(os.path.join(folder, case["prediction"])).startswith(base):
            raise DataError(f"{listing}: the prediction {case['prediction']!r} lies outside its folder; copy it there.")
    maps = tuple(
        Case(
            id=case["id"],
            images=tuple(map(str, case.get("images") or ())),
            label=os.path.abspath(os.path.join(folder, case["prediction"])),
        )
        for case in cases
    )
    for name, count in Counter(case.id for case in maps).items():
        if count > 1:
            raise DataError(f"{listing}: names {count} predictions of the case {name!r}; give each an id of its own.")
    labels = read_labels(content.get("labels"), listing)
    rows = [case for case in content.get("failed") or () if isinstance(case, dict)]
    failed = {str(case.get("id")): printable(str(case.get("reason") or "its list does not say why.")) for case in rows}
    regions = {printable(str(name)): list(members) for name, members in regions.items()}
    found = CaseSet(root=folder, form="json", cases=maps, labels=labels.names, ignore_label=labels.ignore_label)
    return found, regions, failed


def _referenced(references: str | Sequence[str]) -> CaseSet:
    """The cases with a label map of references in any form."""
    if not isinstance(references, str):
        if not references:
            raise DataError("No reference is given; name a folder of label maps or label files.")
        return _label_maps(references, os.path.dirname(references[0]))
    if not os.path.exists(references):
        raise DataError(f"{references}: no such file or folder of references; check the path.")
    if os.path.isdir(references):
        # A data set has a description, or images beside its labels; any other folder is one of label maps.
        if not os.path.isfile(os.path.join(references, "dataset.json")) and pair_folders(references) is None:
            try:
                paths = scans_in(references)
            except DataError as error:
                raise DataError(not_references(references) or str(error)) from error
            if not has_pairs(paths, os.path.abspath(references)):
                return _label_maps(list(in_label_folders(paths, references)) or paths, references)
    elif not references.lower().endswith((".csv", ".json")):
        return _label_maps([references], os.path.dirname(references))
    cases = read_cases(references)
    labelled = tuple(case for case in cases.cases if case.label is not None)
    if not labelled:
        raise DataError(f"{references}: none of its {len(cases.cases)} cases has a label to score against.")
    return replace(cases, cases=labelled)


def _label_maps(paths: Sequence[str], folder: str) -> CaseSet:
    """Label files as cases, with the labels that a dataset.json in or above their folder declares.

    They are named like their files, and where these have one name, after their folders.
    """
    files = [os.path.abspath(path) for path in paths]
    unnamed = [Case(images=(path,)) for path in files]
    if apart := endings_apart(unnamed):
        one, two = [files[row] for row in sorted(apart)][:2]
        raise DataError(f"{folder}: {one} and {two} are label maps of the same case; remove or rename one.")
    names = unique_ids(unnamed, os.path.abspath(folder))
    cases = tuple(Case(id=name, images=(), label=path, patient=name) for name, path in zip(names, files, strict=True))
    labels = LabelDeclaration()
    places = (os.path.join(place, "dataset.json") for place in (folder, os.path.dirname(os.path.abspath(folder))))
    description = next(filter(os.path.isfile, places), None)
    if description is not None:
        content = read_json(description)
        if isinstance(content, dict):
            labels = read_labels(content.get("labels"), description, content.get("regions_class_order"))
    return CaseSet(
        root=folder,
        form="folder",
        cases=cases,
        labels=labels.names,
        ignore_label=labels.ignore_label,
        regions=labels.regions,
    )


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """A case of both tables.

    Attributes:
        id: Name of the case in both tables.
        patient: Name of the patient; the id where neither table has one.
        true_class: Class in the references.
        predicted: Class in the predictions.
        probabilities: Probability of each class, in the order of the names.
        baseline: Number in the baseline's column, if one was asked for.
    """

    id: str
    patient: str
    true_class: str
    predicted: str
    probabilities: tuple[float, ...]
    baseline: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """The cases of a table of predictions and a table of references.

    Attributes:
        rows: Cases of both tables, sorted by id.
        class_names: Names of the classes, in the order of the predictions' columns.
        without_reference: Ids of predictions that no reference belongs to.
        without_prediction: Ids of references that were not predicted.
        unusable: Ids of cases of both tables that lack a class or probabilities, and why they cannot be scored.
    """

    rows: tuple[ClassRow, ...]
    class_names: tuple[str, ...]
    without_reference: tuple[str, ...]
    without_prediction: tuple[str, ...]
    unusable: Mapping[str, str] = field(default_factory=dict)


def is_class_table(predictions: str) -> bool:
    """Whether predictions are those of a classifier: a CSV file, or a folder with nothing but such a table."""
    if os.path.isdir(predictions):
        table, maps = (os.path.isfile(os.path.join(predictions, name)) for name in (TABLE_NAME, LIST_NAME))
        return table and not maps
    return predictions.lower().endswith(".csv")


def read_class_tables(
    predictions: str,
    references: str,
    *,
    class_column: str = "class",
    baseline_column: str | None = None,
    strict: bool = False,
) -> ClassTable:
    """Match two tables by the ids of their cases; cases without a class or probabilities are left out with a warning.

    Args:
        predictions: Table with the columns id, predicted and a probability_CLASS for each class, or its folder.
        references: Table with a column id, case or image (whose id is that of a case of a list), and a class.
        class_column: Column of the references that holds the class.
        baseline_column: Column of the references that holds a number to compare with.
        strict: Refuse tables of which a case cannot be scored.

    Raises:
        DataError: A table cannot be read, lacks a column, or names a case twice; a class was not predicted; or no case
            of both can be scored, or with ``strict`` one cannot.
    """
    path = os.path.join(predictions, TABLE_NAME) if os.path.isdir(predictions) else predictions
    (ours, our_images), (theirs, their_images) = _read_rows(path), _read_rows(references)
    columns = next(iter(ours.values()))
    class_names = tuple(name.removeprefix(_PROBABILITY) for name in columns if name.startswith(_PROBABILITY))
    if len(class_names) < 2:
        raise DataError(f"{path}: needs a column {_PROBABILITY}CLASS for each of two or more classes.")
    their_columns = next(iter(theirs.values()))
    for column in (class_column, *([baseline_column] if baseline_column else [])):
        if column not in their_columns:
            raise DataError(f"{references}: has no column {column!r}.{nearest(column, their_columns)}")
    rows = []
    unusable: dict[str, str] = {}
    # The table of predictions names no scans, but the list beside it does.
    listing = os.path.join(os.path.dirname(path), CLASS_LIST_NAME)
    entries = read_json(listing) if os.path.isfile(listing) else {}
    for case in entries.get("cases", ()) if isinstance(entries, dict) else ():
        if isinstance(case, dict) and case.get("id") in ours and isinstance(case.get("images"), list):
            our_images[case["id"]] = tuple(map(str, case["images"]))
    matched = _matched(path, our_images, their_images)
    for own_name, name in sorted(matched.items(), key=lambda pair: pair[1]):
        prediction, reference = ours[own_name], theirs[name]
        if reference[class_column] and reference[class_column] not in class_names:
            raise DataError(
                f"{references}: case {name} is of the class {reference[class_column]!r}, for which {path} has no "
                f"probability; its classes are {listed(class_names)}."
            )
        try:
            if not reference[class_column]:
                raise DataError(f"{references}: case {name} has no class; add it or take the row out.")
            probabilities = tuple(_number(prediction[f"{_PROBABILITY}{each}"], path, own_name) for each in class_names)
        except DataError as error:
            unusable[name] = str(error)
            continue
        predicted = prediction.get("predicted") or class_names[probabilities.index(max(probabilities))]
        if predicted not in class_names:
            raise DataError(f"{path}: case {name} is predicted {predicted!r}, which has no column of probabilities.")
        rows.append(
            ClassRow(
                id=name,
                patient=reference.get("patient") or prediction.get("patient") or name,
                true_class=reference[class_column],
                predicted=predicted,
                probabilities=probabilities,
                baseline=_number(reference[baseline_column], references, name) if baseline_column else None,
            )
        )
    found = ClassTable(
        rows=tuple(rows),
        class_names=class_names,
        without_reference=tuple(sorted(ours.keys() - matched.keys())),
        without_prediction=tuple(sorted(theirs.keys() - set(matched.values()))),
        unusable=unusable,
    )
    _warn_of_unmatched(found, _not_held_out(listing, found.without_prediction))
    if unusable:
        refuse_or_say(path, list(unusable.values()), len(matched), strict=strict)
    return found


def _read_rows(path: str) -> tuple[dict[str, Mapping[str, str]], dict[str, tuple[str, ...]]]:
    """Rows of a table by the id of their case, and the images that each names; every row has all columns."""
    header, lines = read_table(path)
    key = next((name for name in ID_COLUMNS if name in header), None)
    if key is None or not lines:
        what = "holds no rows" if key else f"has no column {', '.join(ID_COLUMNS[:-1])} or {ID_COLUMNS[-1]}"
        raise DataError(f"{path}: {what}; a table of classes has a header and a row per case.")
    rows: dict[str, dict[str, str]] = {}
    images: list[tuple[str, ...]] = []
    for where, cells in lines:
        if len(cells) != len(header):
            raise DataError(f"{where}: {len(cells)} cells but {len(header)} columns; quote commas.")
        row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        name, root = row[key], os.path.abspath(path)
        if not name or name in rows:
            raise DataError(f"{where}: the case {name!r} is there twice or has no name; give each its own.")
        # Channels are separated by ";", and paths lie below the folder of the table.
        images.append(tuple(beside(root, part) for part in channel_names(row.get("image", ""), root) if part))
        rows[name] = {column: printable(cell) for column, cell in row.items()}
    # Prediction names the images of a list so.
    names = unique_ids([Case(images=paths) for paths in images], os.path.abspath(path)) if key == "image" else [*rows]
    return dict(zip(names, rows.values(), strict=True)), dict(zip(names, images, strict=True))


def _number(text: str, path: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}: case {name} has {text!r} where a number is needed; correct it or take the row out.")
    return value


def _matched(
    predictions: str, ours: Mapping[str, tuple[str, ...]], theirs: Mapping[str, tuple[str, ...]]
) -> dict[str, str]:
    """Ids of predictions and of the references that they belong to, of which there must be some.

    Args:
        predictions: Where the predictions are, for the message.
        ours: Id of each prediction -> images of its scan, as far as they are known.
        theirs: The same of the references.
    """
    left, right = ({resolved(images): name for name, images in side.items() if images} for side in (ours, theirs))
    matched = {left[images]: right[images] for images in left.keys() & right.keys()}
    # A prediction may be called as its scan is among those of this folder, or as it was when its turn came.
    scans = {name: os.path.abspath(images[0]) for name, images in ours.items() if images}
    folder = os.path.commonpath([os.path.dirname(file_of(path)) for path in scans.values()]) if scans else ""
    names = unique_ids([Case(id=scan_id(path), images=(path,)) for path in scans.values()], folder)
    among = dict(zip(names, scans, strict=True))
    found = _paired(predictions, ({name: name for name in ours}, among), list(theirs), matched)
    doubtful = []
    for name, other in found.items():
        sizes = _num_bytes(ours[name]), _num_bytes(theirs[other])
        if name not in matched and None not in sizes and sizes[0] != sizes[1]:
            doubtful.append(f"{scans[name]} and {theirs[other][0]}")
    if doubtful:
        warnings.warn(
            "Paired by their names, although the files that both sides name as their scans differ: "
            f"{listed(sorted(doubtful))}; check that these are the same patients.",
            stacklevel=3,
        )
    return found


def _num_bytes(images: Sequence[str]) -> int | None:
    """Bytes of a scan's files; None where there is none, or one is a folder or gone."""
    files = {file_of(image) for image in images}
    return sum(map(os.path.getsize, files)) if files and all(map(os.path.isfile, files)) else None


def _paired(
    predictions: str, ours: Sequence[Mapping[str, str]], theirs: Sequence[str], known: Mapping[str, str]
) -> dict[str, str]:
    """The ids of predictions and those of their references, of which there must be some; a guess is said.

    Args:
        predictions: Where the predictions are, for the message.
        ours: What predictions are called -> their ids; what is not found by a name of the first is sought by the next.
        theirs: Ids of references.
        known: Those that are known to belong together.
    """
    matched = dict(known)
    for names in ours:
        taken = set(matched.values())
        mine, others = ([name for name in names if names[name] not in matched], [n for n in theirs if n not in taken])
        found = matched_ids(mine, others, ("the predictions", "the references"))
        matched |= {names[name]: other for name, other in found.items()}
    if not matched:
        raise DataError(
            f"{predictions}: no prediction is named like a reference; the predictions are {listed(sorted(ours[0]))}, "
            f"the references {listed(sorted(theirs))}."
        )
    differing = [f"{name} with {other}" for name, other in sorted(matched.items()) if known.get(name, name) != other]
    if differing:
        warnings.warn(f"Paired although their names differ: {listed(differing)}.", stacklevel=4)
    return matched


def _not_held_out(listing: str, unpredicted: Sequence[str]) -> list[str]:
    """Those of some references without a prediction of which none is missing: the run has learned from them.

    That is known where the list beside the predictions says that they are of all cases that a run held out.
    """
    content = read_json(listing) if os.path.isfile(listing) else {}
    if not isinstance(content, dict) or content.get("only_held_out") is not True or content.get("begun"):
        return []
    failed = {str(row.get("id")) for row in content.get("failed") or () if isinstance(row, dict)}
    return [name for name in unpredicted if name not in failed]


def _warn_of_unmatched(found: Pairs | ClassTable, not_held_out: Sequence[str]) -> None:
    if not_held_out:
        rest = number_of(len(not_held_out), "reference", "are")
        say(f"{rest} of cases that the run did not hold out, and not scored.")
    for attribute, fault in _UNMATCHED.items():
        names = [name for name in getattr(found, attribute, ()) if name not in not_held_out]
        if names:
            warnings.warn(f"{fault}: {listed(names)}.", stacklevel=3)
