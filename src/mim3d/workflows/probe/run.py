"""Probes of frozen features: encoders side by side, beside what was not learned; what is written and printed."""

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.text import Text

from mim3d.backbones import BACKBONES
from mim3d.caching.cache import Cache
from mim3d.caching.summary import CacheSummary
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import read_json, write_json
from mim3d.core.left_out import note_left_out
from mim3d.core.names import printable
from mim3d.core.progress import counted, say
from mim3d.core.resources import choose_device
from mim3d.core.settings import to_mapping, to_named
from mim3d.core.types import Named, Spacing
from mim3d.core.warned import recording
from mim3d.metrics import Bootstrap
from mim3d.probing.items import ProbeSet, View, checked_crop_size
from mim3d.probing.probe import Probed, drawn_from, probe_encoder, random_encoder, without_encoder
from mim3d.probing.scores import CONVENTIONS, Scored, differences, intervals
from mim3d.probing.settings import Probing
from mim3d.reporting.sources import short_names
from mim3d.scans.intensity import Intensity
from mim3d.tasks.evaluation import print_tables, printed_table
from mim3d.weights import MIN_COVERAGE, InputLayers, locate, weights_digest
from mim3d.workflows.probe.cases import ProbeCases, Target, choose_cases, read_source
from mim3d.workflows.shared.first_screen import fold_line
from mim3d.workflows.shared.initialisation import Initialisation, initialise
from mim3d.workflows.shared.inputs import check_channels
from mim3d.workflows.shared.leakage import check_leakage, check_pretraining, identities_of

#: Names of both classifiers, as fields of :class:`Probed`, and for people.
CLASSIFIERS = {"linear": "Linear", "neighbours": "k-NN"}

#: Follows the name of features of an encoder that learned from held-out scans.
LEAK_MARK = " *"

#: Sets of features in one table of labels.
COLUMNS_AT_ONCE = 4


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a probe.

    Attributes:
        weights: Encoder: a run, an exported folder or a published checkpoint; several are compared in one table.
        data: Labelled scans: MSD or nnU-Net raw folder, folder of images and labels, CSV or JSON list, a cache, or
            `phantom` for synthetic CT made on the spot.
        out: File for all scores and intervals, .json; none is written if not given.
        target: What is classified: labels (of tokens) or classes (of scans); what most scans have if not given.
        backbone: Encoder of foreign weights, a name of list_models(); that of the weights if not given.
        input_layers: For another number of channels than the weights know: mean, repeat (in turn) or new.
        min_coverage: Share of each encoder that its weights must fill, from 0 to 1; 1 refuses every partial load.
        cache: Folder for the cache of prepared scans; a temporary one if not given.
        spacing_mm: Voxel size along X, Y, Z in millimetres; that of the first weights if not given.
        intensity: Mapping of intensities to network input; that of each of the weights if not given, else planned.
        fold: Which of the folds is held out and scored on, from 0, the same as those of `mim3d finetune`.
        held_out_list: File with the ids of cases or patients to score on, one per line, in place of a fold.
        num_folds: Number of folds that the patients are split into; a declared split wins over folds.
        split_seed: Seed by which patients are split into folds.
        probing: How features are taken and classified.
        num_bootstrap: Resamples of the held-out patients for 95 % intervals; 0 for none.
        accelerator: Kind of device: auto, cpu, cuda or mps.
        num_workers: Processes that prepare scans; one per core if not given.
        seed: Seed of the choice of tokens, of the random encoder, and of layers that the weights do not fill.
        strict: Refuse what is otherwise a warning: scans that cannot be used, and held-out scans that were learned
            from.
        overwrite: Replace the scores of other weights or data.
    Raises:
        ConfigError: For a value that cannot work.
    """

    weights: str | list[str]
    data: str
    out: str | None = None
    _: KW_ONLY
    target: Target | None = None
    backbone: Named | None = None
    input_layers: InputLayers = "mean"
    min_coverage: float = MIN_COVERAGE
    cache: str | None = None
    spacing_mm: Spacing | None = None
    intensity: Intensity | None = None
    fold: int = 0
    held_out_list: str | None = None
    num_folds: int = 5
    split_seed: int = 0
    probing: Probing = Probing()
    num_bootstrap: int = 2000
    accelerator: str = "auto"
    num_workers: int | None = None
    seed: int = 0
    strict: bool = False
    overwrite: bool = False

    @property
    def paths(self) -> list[str]:
        """The weights, one or several."""
        return [self.weights] if isinstance(self.weights, str) else list(self.weights)


def run_probe(settings: ProbeSettings) -> dict[str, Any]:
    """Probe every encoder and what was not learned; print the table, and write it where a file is given."""
    _check(settings)
    bootstrap = Bootstrap(num_bootstrap=settings.num_bootstrap, seed=0)
    with recording() as warned, tempfile.TemporaryDirectory(prefix="mim3d-probe-") as scratch:
        cases = choose_cases(
            read_source(settings.data, Path(scratch) / "phantom", strict=settings.strict),
            settings.data,
            settings.target,
            fold=settings.fold,
            num_folds=settings.num_folds,
            split_seed=settings.split_seed,
            held_out_list=settings.held_out_list,
        )
        parts = cases.split
        numbers = len(parts.train), len(parts.val)
        say(fold_line(settings.fold, settings.num_folds, cases.cases, *numbers, settings.held_out_list))
        encoders: dict[str, Initialisation] = {}
        device = choose_device(settings.accelerator)
        for path in settings.paths:
            # Layers that the weights do not fill are drawn.
            with drawn_from(settings.seed):
                num_channels = len(cases.cases[0].images)
                initial = initialise(
                    settings.backbone, path, num_channels, settings.input_layers, settings.min_coverage
                )
            check_channels(cases.cases, initial.recipe)
            assert initial.encoder is not None
            checked_crop_size(settings.probing.crop_size, initial.encoder)
            initial.encoder.to(device).eval()
            encoders[path] = initial
        # All scans are of one voxel size; encoders that learned at another warn.
        first, *others = encoders.values()
        spacing_mm = first.spacing_mm(settings.spacing_mm, cases.source)
        for other in others:
            other.spacing_mm(spacing_mm, cases.source)
        folder, strict = settings.cache or f"{scratch}/cache", settings.strict
        scans = cases.prepared(folder, spacing_mm, num_workers=settings.num_workers, strict=strict)
        say(f"data: {CacheSummary.of(scans).short()}")
        held_out = identities_of(scans.subset(cases.split.val))
        within = check_leakage(identities_of(scans.subset(cases.split.train)), held_out, strict=strict)
        leaking = {path for path in encoders if check_pretraining(path, held_out, strict=strict) or within}
        rows = _rows(encoders, cases, scans, settings, leaking)
        failed = scans.failed
        if settings.out is None:
            for row in failed:
                say(f"left out: {row['reason']}")
        note_left_out(len(failed), len(scans) + len(failed), settings.out or "the lines above")
    written = {f.name: getattr(settings, f.name) for f in fields(settings)}
    about = {name: value for name, value in written.items() if name not in ("out", "cache", "num_workers", "overwrite")}
    content = content_of(rows, to_mapping(about), bootstrap)
    if warned.rows:
        content["warnings"] = warned.rows
    if failed:
        content["cases_left_out"] = [{"id": row["id"], "reason": row["reason"]} for row in failed]
    show(content)
    if settings.out is not None:
        write_json(settings.out, content, indent=1, allow_nan=False)
        say(f"scores: {settings.out}")
    return content


def _check(settings: ProbeSettings) -> None:
    if not settings.paths:
        raise ConfigError("weights is empty; name a run, an exported folder or a weights file.")
    if len(set(settings.paths)) < len(settings.paths):
        raise ConfigError("weights names the same path twice; name each once.")
    for path in settings.paths:
        locate(path)
    if settings.num_workers is not None and settings.num_workers < 0:
        raise ConfigError(f"num_workers is {settings.num_workers}; it must be 0 or more.")
    if settings.seed < 0:
        raise ConfigError(f"seed is {settings.seed}; it must be zero or more.")
    out = settings.out
    if out is None:
        return
    if not out.lower().endswith(".json") or os.path.isdir(out):
        raise ConfigError(f"out is {out}, but the scores go to a file that ends in .json; give such a name.")
    folder = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ConfigError(f"out is {out}, but {folder} is no folder that can be written to; choose another.")
    _require_own(out, settings)


def _require_own(out: str, settings: ProbeSettings) -> None:
    """Refuse to replace a file that holds no scores of a probe, or those of other weights or data unless asked to."""
    if not os.path.exists(out):
        return
    try:
        content = read_json(out)
        found = {key: content["settings"][key] for key in ("weights", "data")}
        is_probe = content["kind"] == "probe"
    except (DataError, KeyError, TypeError):
        is_probe = False
    if not is_probe:
        raise ConfigError(f"{out} exists and holds no scores of a probe; choose another --out.")
    if not settings.overwrite and found != {"weights": to_mapping(settings.weights), "data": settings.data}:
        raise ConfigError(
            f"{out} holds scores of {found['weights']} on {found['data']}; choose another --out, or use "
            "--overwrite true."
        )


@dataclass(frozen=True)
class Row:
    """Features that were probed.

    Attributes:
        name: Name of the features, for people.
        kind: ``encoder``, or what it is without learned weights: ``random``, ``intensities`` or ``place``.
        about: Further facts about them for the file of scores.
        items: The probe set.
        probed: Scores of both classifiers.
        against: The rows that they are compared with, by name.
    """

    name: str
    kind: str
    about: Mapping[str, Any]
    items: ProbeSet
    probed: Probed
    against: Mapping[str, Probed]


def _rows(
    encoders: Mapping[str, Initialisation],
    cases: ProbeCases,
    scans: Cache,
    settings: ProbeSettings,
    leaking: Collection[str],
) -> list[Row]:
    """Every encoder, then what learned nothing, for each kind; later ones against the first where items agree."""
    names = short_names([os.path.abspath(path) for path in encoders])
    found: list[Row] = []
    # For each kind of encoder its items, and what they are worth without learned weights.
    beside: dict[str, tuple[ProbeSet, dict[str, Probed]]] = {}
    owners: dict[str, str] = {}
    for path, initial in encoders.items():
        name, encoder = names[os.path.abspath(path)] + LEAK_MARK * (path in leaking), initial.encoder
        assert encoder is not None
        mapping = initial.intensity(settings.intensity, scans.subset(cases.split.train))
        kind = repr((initial.recipe, mapping))
        if kind not in beside:
            items = cases.items(scans, encoder, mapping, settings.probing, seed=settings.seed)
            random = probe_encoder(random_encoder(encoder, settings.seed), items, settings.probing, watch=_watch)
            owners[kind] = name
            beside[kind] = items, {"random": random, **without_encoder(items, settings.probing)}
        items, references = beside[kind]
        probed = probe_encoder(encoder, items, settings.probing, watch=_watch)
        against = dict(references)
        if found and found[0].items.is_scored_as(items):
            against[found[0].name] = found[0].probed
        about = {
            "weights": os.path.abspath(path),
            "weights_sha256": weights_digest(path),
            "backbone": to_named(initial.recipe, BACKBONES),
            "intensity": to_mapping(mapping),
        }
        found.append(Row(name, "encoder", about, items, probed, against))
    for title in next(iter(beside.values()))[1]:
        for kind, (items, references) in beside.items():
            name = f"{title} ({owners[kind]})" if len(beside) > 1 else title
            found.append(Row(name, title, {}, items, references[title], {}))
    return found


def _watch(batches: Sequence[Sequence[View]]) -> Iterator[Sequence[View]]:
    return counted(batches, len(batches), "features")


def content_of(rows: Sequence[Row], written: Mapping[str, Any], bootstrap: Bootstrap) -> dict[str, Any]:
    """Everything that the file of scores holds, as JSON takes it."""
    first = rows[0].items
    return {
        "kind": "probe",
        "target": first.target,
        "settings": dict(written),
        "conventions": CONVENTIONS,
        "num_scans": {"training": first.num_scans[0], "held_out": first.num_scans[1]},
        "num_patients_held_out": rows[0].probed.linear.num_patients,
        "features": [
            {
                "name": row.name,
                "kind": row.kind,
                **row.about,
                "num_features": row.probed.num_features,
                "view_size": list(row.items.size),
                "token_edge": row.items.token_edge,
                "items": {
                    name: {"training": training, "held_out": held_out}
                    for name, (training, held_out) in row.items.counts().items()
                },
                "left_out": list(row.items.left_out),
                **{name: _classifier(row, name, bootstrap) for name in CLASSIFIERS},
                "collapse": None if row.probed.collapse is None else asdict(row.probed.collapse),
            }
            for row in rows
        ],
    }


def _classifier(row: Row, name: str, bootstrap: Bootstrap) -> dict[str, Any]:
    scored: Scored = getattr(row.probed, name)
    return {
        **scored.values(),
        "ci95": intervals(scored, bootstrap),
        "per_class_f1": dict(zip(row.items.names, scored.f1(), strict=True)),
        "less": {other: differences(scored, getattr(probed, name), bootstrap) for other, probed in row.against.items()},
    }


def show(content: Mapping[str, Any]) -> None:
    """Print scores, intervals and differences, measures of collapse, and F1 of every label, on 80 columns."""
    rows = content["features"]
    names = ["balanced_accuracy", "f1_macro", *(["auc"] if content["target"] == "classes" else [])]
    heads = {"balanced_accuracy": "acc.", "f1_macro": "F1", "auc": "AUC"}
    _print(
        f"{content['num_scans']['held_out']} held-out scans, {content['num_scans']['training']} to learn from "
        "(acc.: balanced accuracy)",
        "Features",
        [f"{title}\n{heads[name]}" for title in CLASSIFIERS.values() for name in names],
        [[row["name"], *(_number(row[kind][name]) for kind in CLASSIFIERS for name in names)] for row in rows],
    )
    # A line for features, and one for the difference to each row that they are compared with.
    lines = []
    for row in rows:
        scored, cells = [row[kind] for kind in CLASSIFIERS], [row["name"]]
        for each in scored:
            cells += [_number(each["balanced_accuracy"]), _interval(each["ci95"]["balanced_accuracy"])]
        lines.append(cells)
        for other in scored[0]["less"]:
            cells = [f"  difference to {'a random encoder' if other == 'random' else other}"]
            for each in scored:
                less = each["less"][other]["balanced_accuracy"]
                cells += [f"{less['difference']:+.3f}", _interval(less["ci95"])]
            lines.append(cells)
    _print(
        "Balanced accuracy: 95 % intervals over patients, and paired differences",
        "Features",
        [head for title in CLASSIFIERS.values() for head in (title, "95 % interval")],
        lines,
    )
    if any(row["name"].endswith(LEAK_MARK) for row in rows):
        say("* learned from held-out scans, so its scores say nothing about new patients")
    spreads = [(row["name"], row["num_features"], row["collapse"]) for row in rows if row["collapse"]]
    _print(
        "Spread of the features to learn from: 1 is even, 0 is collapsed",
        "Features",
        ["Number", "Spread", "Rank", "Cosine"],
        [
            [name, str(num), f"{c['feature_std']:.3f}", f"{c['effective_rank']:.1f}", f"{c['mean_cosine']:.3f}"]
            for name, num, c in spreads
        ],
    )
    labels = list(dict.fromkeys(name for row in rows for name in row["items"]))
    for start in range(0, len(rows), COLUMNS_AT_ONCE):
        part = rows[start : start + COLUMNS_AT_ONCE]
        _print(
            f"F1 of each {'label' if content['target'] == 'labels' else 'class'}, linear",
            "",
            ["\n".join(wrap(row["name"], 11)) for row in part],
            [[name, *(_number(row["linear"]["per_class_f1"].get(name)) for row in part)] for name in labels],
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _print(title: str, first: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = printed_table(title, first, columns)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    print_tables([table])
