"""Probes of features that are there already: heads on tables of them, scored on patients that they have not seen."""

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mim3d.core.errors import DataError
from mim3d.core.files import read_json
from mim3d.core.names import number_of
from mim3d.core.progress import counted, say
from mim3d.core.warned import ComparisonWarning, LeakWarning, checked_rows, recording
from mim3d.datasets.cases import Case
from mim3d.datasets.splits import Split, declared_folds, split_by_list, split_cases
from mim3d.metrics import Bootstrap
from mim3d.metrics.bootstrap import plain
from mim3d.probing.heads import HEADS, Fold, Learned, chosen_setting
from mim3d.probing.items import Floats
from mim3d.probing.scores import CONVENTIONS, NUMBER_CONVENTIONS, Scored, ScoredNumbers, differences, intervals
from mim3d.reporting.sources import short_names
from mim3d.workflows.probe.labelled import Kind, LabelledRows, labelled_rows
from mim3d.workflows.shared.feature_tables import FeatureTable, description_of, format_of_table, read_table

#: Folds inside what heads learn from, by which their settings are chosen.
INNER_FOLDS = 3

#: What is written beside the scores.
HOW = {
    "heads": (
        "Linear: logistic regression, classes weighted alike, or ridge regression, with L2 from a path of 13 values. "
        "k-NN: by cosine, weighed by exp(cosine / temperature), k from a path. Features are standardised by the items "
        "to learn from. Settings are those that err least (squared errors, classes alike) on 3 folds of the patients "
        "to learn from, or on a declared validation part."
    ),
    "folds": (
        "Every patient is scored once, by heads that learned from the other folds; answers of all folds are scored "
        "together. With a declared test part, heads learn from all others."
    ),
    "majority": "Answers with the shares of the classes, or with the mean, of the items to learn from.",
    "columns": "A number of the table of labels, or the volume of the region, alone, by the same heads.",
}


@dataclass(frozen=True, eq=False)
class Answered:
    """What both heads made of one set of features.

    Attributes:
        name: Name of the features, for people.
        kind: ``features``, or what is no feature: ``column`` or ``majority``.
        num_features: Numbers per row.
        heads: What each head answered, on the rows that are scored.
        settings: Setting of each head that was chosen in each fold.
    """

    name: str
    kind: str
    num_features: int
    heads: Mapping[str, Scored | ScoredNumbers]
    settings: Mapping[str, list[float]]


@dataclass(frozen=True, kw_only=True)
class FeatureProbe:
    """Settings of a probe of features that are there already.

    Attributes:
        features: Tables of features, several to compare.
        labels: Table of labels.
        label_column: Its column; None where it can only be one.
        label_kind: Classes or numbers; None to go by what they look like.
        region: Which rows of features; None for whole scans.
        fold: The fold that is scored; None for all, one after the other.
        num_folds: Number of folds.
        split_seed: Seed by which patients are split into folds.
        held_out_list: File with the ids of cases or patients to score on, in place of folds.
        temperature: Temperature of the votes of neighbours.
        bootstrap: How intervals are made.
    """

    features: tuple[str, ...]
    labels: str
    label_column: str | None
    label_kind: Kind | None
    region: str | None
    fold: int | None
    num_folds: int
    split_seed: int
    held_out_list: str | None
    temperature: float
    bootstrap: Bootstrap


def probe_features(probe: FeatureProbe, written: Mapping[str, Any]) -> dict[str, Any]:
    """Score heads on every table of features, beside what needs no features.

    Args:
        probe: The settings.
        written: What the file of scores says of the settings.

    Returns:
        All scores and intervals, as in the file.

    Raises:
        ConfigError: A fold that does not exist.
        DataError: Tables that cannot be read, or too few rows.
    """
    with recording() as warned:
        tables = {path: read_table(path) for path in probe.features}
        _say_leaks(probe.features)
        rows = labelled_rows(tables, probe.labels, probe.label_column, probe.label_kind, probe.region)
        splits = _splits(probe, rows)
        folds = [_places(split, rows) for split in splits]
        held_out = np.concatenate([second for _, second in folds])
        what = "numbers" if rows.names is None else f"{len(rows.names)} classes"
        say(
            f"labels: {number_of(len(rows.cases), 'row')} of {number_of(len(set(rows.patients)), 'patient')}, {what} "
            f"({rows.label_column}); scored on {number_of(len(held_out), 'row')} in {number_of(len(folds), 'fold')}"
        )
        sets = _feature_sets(tables, rows)
        inner = [_inner_folds([rows.cases[place] for place in first], probe) for first, _ in folds]
        answered = [_majority(rows, folds)]
        for name, kind, values in counted(sets, len(sets), "features"):
            answered.append(_answered(name, kind, values, rows, folds, inner, probe.temperature))
        answered = [*answered[1:], answered[0]]
        if held_out.size < 30:
            warnings.warn(
                f"scores are of {number_of(int(held_out.size), 'row')} alone: their intervals say how little that is.",
                category=ComparisonWarning,
                stacklevel=2,
            )
    content = _content(answered, rows, folds, written, probe.bootstrap)
    if warned.rows:
        content["warnings"] = warned.rows
    return content


def _say_leaks(paths: Sequence[str]) -> None:
    """Repeat what was said of a table's scans that its weights were learned from, since scores are computed on them."""
    for path in paths:
        description = description_of(path, format_of_table(path))
        content: Any = None
        with suppress(DataError):
            content = read_json(str(description)) if description.is_file() else None
        for row in checked_rows(content.get("warnings") if isinstance(content, dict) else None):
            if row["kind"] == LeakWarning.kind:
                warnings.warn(f"{path}: {row['text']}", category=LeakWarning, stacklevel=3)


def _splits(probe: FeatureProbe, rows: LabelledRows) -> list[Split]:
    """The parts to learn from and to score on, of every fold that is asked for.

    Raises:
        ConfigError: A fold that does not exist.
        DataError: Too few patients, or a class of one patient.
    """
    cases = list(rows.cases)
    few = {name: {case.patient for case in cases if case.class_name == name} for name in rows.names or ()}
    for name, patients in few.items():
        if len(patients) < 2:
            raise DataError(
                f"{probe.labels}: the class {name!r} has one patient with features, who cannot be learned from and "
                "scored; take the class out, or join it with another."
            )
    if probe.held_out_list is not None:
        return [split_by_list(cases, probe.held_out_list)]
    tests = tuple(case for case in cases if case.split == "test")
    if tests:
        return [Split(tuple(case for case in cases if case.split != "test"), tests)]
    numbers: Sequence[int] = declared_folds(cases) or range(probe.num_folds)
    if probe.fold is not None or any(case.split == "val" for case in cases):
        numbers = [probe.fold or 0]
    return [split_cases(cases, fold=number, num_folds=probe.num_folds, seed=probe.split_seed) for number in numbers]


def _places(split: Split, rows: LabelledRows) -> Fold:
    place_of = {case.id: place for place, case in enumerate(rows.cases)}
    first, second = (
        np.array([place_of[case.id] for case in part], dtype=np.int64) for part in (split.train, split.val)
    )
    if rows.names is not None and len(missing := set(range(len(rows.names))) - set(rows.targets_N[first].tolist())):
        names = ", ".join(rows.names[value] for value in sorted(missing))
        raise DataError(f"No row to learn from is of the class {names}; change the split, or take the class out.")
    return first, second


def _inner_folds(cases: Sequence[Case], probe: FeatureProbe) -> list[Fold]:
    """Folds of the patients to learn from; a declared validation part is the only one; none where they are too few."""
    place_of = {case.id: place for place, case in enumerate(cases)}
    declared = any(case.split == "val" for case in cases)
    plain_cases = [
        Case(id=c.id, images=c.images, patient=c.patient, class_name=c.class_name, split=c.split if declared else None)
        for c in cases
    ]
    number = min(INNER_FOLDS, len({case.patient for case in cases}))
    if number < 2:
        return []
    splits = [
        split_cases(plain_cases, fold=fold, num_folds=number, seed=probe.split_seed)
        for fold in range(1 if declared else number)
    ]
    return [
        (np.array([place_of[c.id] for c in split.train]), np.array([place_of[c.id] for c in split.val]))
        for split in splits
    ]


def _feature_sets(tables: Mapping[str, FeatureTable], rows: LabelledRows) -> list[tuple[str, str, Floats]]:
    """Name, kind and values (N, D) of everything that heads learn from: tables, then single numbers."""
    names = short_names([os.path.abspath(path) for path in tables])
    found = [
        (names[os.path.abspath(path)], "features", table.values[places].astype(np.float64))
        for (path, table), places in zip(tables.items(), rows.places, strict=True)
    ]
    first, places = next(iter(tables.values())), rows.places[0]
    volumes_ml = np.asarray(first.keys["volume_ml"], dtype=np.float64)[places]
    numbers = {**rows.columns, **({"volume_ml": volumes_ml} if np.ptp(volumes_ml) > 0 else {})}
    return [*found, *((f"{name} alone", "column", values[:, None]) for name, values in numbers.items())]


def _answered(
    name: str,
    kind: str,
    values_ND: Floats,
    rows: LabelledRows,
    folds: Sequence[Fold],
    inner: Sequence[Sequence[Fold]],
    temperature: float,
) -> Answered:
    """What both heads answer in every fold, each with the settings chosen inside what it learns from."""
    known = Learned(
        features_ND=values_ND,
        targets_N=rows.targets_N,
        num_classes=None if rows.names is None else len(rows.names),
        temperature=temperature,
    )
    answers: dict[str, list[Floats]] = {head: [] for head in HEADS}
    settings: dict[str, list[float]] = {head: [] for head in HEADS}
    for (first, second), own in zip(folds, inner, strict=True):
        learned = known.part(first)
        for head, (answer, _) in HEADS.items():
            setting = chosen_setting(head, learned, own)
            settings[head].append(setting)
            answers[head].append(answer(learned, values_ND[second], setting))
    heads = {head: _scored(np.concatenate(found), rows, folds) for head, found in answers.items()}
    return Answered(name, kind, values_ND.shape[1], heads, settings)


def _majority(rows: LabelledRows, folds: Sequence[Fold]) -> Answered:
    """What the shares of the classes, or the mean, alone answer."""
    # One answer for all folds: those of each would rank the folds, against the share of a class in it.
    known, number = (
        np.concatenate([rows.targets_N[first] for first, _ in folds]),
        sum(len(second) for _, second in folds),
    )
    if rows.names is None:
        answers = np.full(number, known.mean())
    else:
        shares = np.bincount(known.astype(np.int64), minlength=len(rows.names)) / len(known)
        answers = np.tile(shares, (number, 1))
    scored = _scored(answers, rows, folds)
    name = "mean" if rows.names is None else "majority"
    return Answered(name, "majority", 0, dict.fromkeys(HEADS, scored), {})


def _scored(answers: Floats, rows: LabelledRows, folds: Sequence[Fold]) -> Scored | ScoredNumbers:
    places = np.concatenate([second for _, second in folds])
    patients = tuple(rows.patients[place] for place in places)
    if rows.names is None:
        return ScoredNumbers(answers, rows.targets_N[places].astype(np.float64), patients)
    return Scored(answers, rows.targets_N[places].astype(np.int64), patients, with_auc=True)


def _content(
    answered: Sequence[Answered],
    rows: LabelledRows,
    folds: Sequence[Fold],
    written: Mapping[str, Any],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Everything that the file of scores holds, as JSON takes it."""
    first = answered[0]
    classes = rows.names is not None
    places = np.concatenate([second for _, second in folds])

    def head(each: Answered, name: str) -> dict[str, Any]:
        scored = each.heads[name]
        found: dict[str, Any] = {key: plain(value) for key, value in scored.values().items()}
        found["ci95"] = intervals(scored, bootstrap)
        if isinstance(scored, Scored):
            found["per_class_f1"] = dict(zip(rows.names or (), scored.f1(), strict=True))
        others = [first] if each is not first and each.kind == "features" else []
        others += [other for other in answered if other.kind != "features" and each.kind == "features"]
        found["less"] = {other.name: _plain(differences(scored, other.heads[name], bootstrap)) for other in others}
        found["chosen"] = each.settings.get(name, [])
        return found

    return {
        "kind": "probe",
        "target": "classes" if classes else "numbers",
        "settings": dict(written),
        "conventions": {**HOW, **(CONVENTIONS if classes else NUMBER_CONVENTIONS)},
        "label_column": rows.label_column,
        "num_rows": {"all": len(rows.cases), "held_out": len(places)},
        "num_patients_held_out": len({rows.patients[place] for place in places}),
        "num_folds": len(folds),
        **({"chance": {"balanced_accuracy": 1 / len(rows.names), "auc": 0.5}} if rows.names else {}),
        **({"classes": {n: int((rows.targets_N == k).sum()) for k, n in enumerate(rows.names)}} if rows.names else {}),
        "features": [
            {"name": each.name, "kind": each.kind, "num_features": each.num_features}
            | {name: head(each, name) for name in HEADS}
            for each in answered
        ],
    }


def _plain(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: {**row, "difference": plain(row["difference"])} for name, row in found.items()}
