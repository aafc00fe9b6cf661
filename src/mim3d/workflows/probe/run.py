"""Probes of frozen features: encoders side by side, beside what was not learned; what is written and printed."""

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mim3d.backbones import BACKBONES
from mim3d.caching.cache import Cache
from mim3d.caching.summary import CacheSummary
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import read_json, write_json
from mim3d.core.left_out import note_left_out
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
from mim3d.weights import MIN_COVERAGE, InputLayers, locate, weights_digest
from mim3d.workflows.probe.cases import ProbeCases, Target, choose_cases, read_source
from mim3d.workflows.probe.from_features import FeatureProbe, probe_features
from mim3d.workflows.probe.labelled import Kind
from mim3d.workflows.probe.printing import CLASSIFIERS, LEAK_MARK, show_encoders, show_tables
from mim3d.workflows.shared.first_screen import fold_line
from mim3d.workflows.shared.initialisation import Initialisation, initialise
from mim3d.workflows.shared.inputs import check_channels
from mim3d.workflows.shared.leakage import check_leakage, check_pretraining, identities_of

#: Settings that mean something to tables of features alone, and to encoders alone.
OF_TABLES = ("features", "labels", "label_column", "label_kind", "region")
OF_ENCODERS = (
    *("weights", "data", "target", "backbone", "input_layers", "min_coverage", "cache", "spacing_mm", "intensity"),
    *("accelerator", "num_workers", "seed", "strict"),
)


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of a probe.

    Attributes:
        weights: Encoder: a run, an exported folder or a published checkpoint; several are compared in one table.
        data: Labelled scans: MSD or nnU-Net raw folder, folder of images and labels, CSV or JSON list, a cache, or
            `phantom` for synthetic CT made on the spot.
        features: Tables of `mim3d embed` in place of weights and data; several are compared.
        labels: Table (CSV) of labels for them: id, case or image, a column with the label, and patient, split, fold or
            region where it has them. Its other columns of numbers are compared with the features.
        label_column: Column of the label, for `features`; needed where several could be meant.
        label_kind: What labels are, for `features`: classes or numbers; by what they look like if not given.
        region: Which rows of `features`, such as the name of a label; whole scans if not given.
        out: File for all scores and intervals, .json; none is written if not given.
        target: What is classified: labels (of tokens) or classes (of scans); what most scans have if not given.
        backbone: Encoder of foreign weights, a name of list_models(); that of the weights if not given.
        input_layers: For another number of channels than the weights know: mean, repeat (in turn) or new.
        min_coverage: Share of each encoder that its weights must fill, from 0 to 1; 1 refuses every partial load.
        cache: Folder for the cache of prepared scans; a temporary one if not given.
        spacing_mm: Voxel size along X, Y, Z in millimetres; that of the first weights if not given.
        intensity: Mapping of intensities to network input; that of each of the weights if not given, else planned.
        fold: Which of the folds is held out and scored on, from 0, the same as those of `mim3d finetune`; 0 if not
            given, and of `features` all, each in turn.
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

    weights: str | list[str] | None = None
    data: str | None = None
    out: str | None = None
    _: KW_ONLY
    features: str | list[str] | None = None
    labels: str | None = None
    label_column: str | None = None
    label_kind: Kind | None = None
    region: str | None = None
    target: Target | None = None
    backbone: Named | None = None
    input_layers: InputLayers = "mean"
    min_coverage: float = MIN_COVERAGE
    cache: str | None = None
    spacing_mm: Spacing | None = None
    intensity: Intensity | None = None
    fold: int | None = None
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
        return [self.weights] if isinstance(self.weights, str) else list(self.weights or ())

    @property
    def tables(self) -> list[str]:
        """The tables of features, one or several; empty where encoders are probed."""
        return [self.features] if isinstance(self.features, str) else list(self.features or ())

    def written(self) -> dict[str, Any]:
        """What a file of scores says of these settings, as plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        passed_over = {"out", "cache", "num_workers", "overwrite", *(OF_ENCODERS if self.tables else OF_TABLES)}
        plain: dict[str, Any] = to_mapping({name: value for name, value in values.items() if name not in passed_over})
        return plain


def run_probe(settings: ProbeSettings) -> dict[str, Any]:
    """Probe encoders, or features that are there already; print the tables, and write them where a file is given."""
    if settings.features is not None or settings.labels is not None:
        return _probe_tables(settings)
    _check(settings)
    return _probe_encoders(settings, str(settings.data), settings.fold or 0)


def _probe_tables(settings: ProbeSettings) -> dict[str, Any]:
    """Probe tables of features."""
    given = [name for name in OF_ENCODERS if getattr(settings, name) != getattr(ProbeSettings, name)]
    if given:
        raise ConfigError(
            f"{given[0]} is a setting for encoders, but features are there already: leave it out, or give --weights "
            "and --data alone."
        )
    if not settings.tables or settings.labels is None:
        raise ConfigError("mim3d probe needs both --features and --labels: a table of mim3d embed, and one of labels.")
    if len(set(settings.tables)) < len(settings.tables):
        raise ConfigError("features names the same table twice; name each once.")
    _check_out(settings, {"features": to_mapping(settings.features), "labels": settings.labels})
    probe = FeatureProbe(
        features=tuple(settings.tables),
        labels=settings.labels,
        label_column=settings.label_column,
        label_kind=settings.label_kind,
        region=settings.region,
        fold=settings.fold,
        num_folds=settings.num_folds,
        split_seed=settings.split_seed,
        held_out_list=settings.held_out_list,
        temperature=settings.probing.temperature,
        bootstrap=Bootstrap(num_bootstrap=settings.num_bootstrap, seed=0),
    )
    content = probe_features(probe, settings.written())
    show_tables(content)
    _write(settings.out, content)
    return content


def _write(out: str | None, content: Mapping[str, Any]) -> None:
    if out is not None:
        write_json(out, content, indent=1, allow_nan=False)
        say(f"scores: {out}")


def _probe_encoders(settings: ProbeSettings, data: str, fold: int) -> dict[str, Any]:
    """Probe every encoder and what was not learned."""
    bootstrap = Bootstrap(num_bootstrap=settings.num_bootstrap, seed=0)
    with recording() as warned, tempfile.TemporaryDirectory(prefix="mim3d-probe-") as scratch:
        cases = choose_cases(
            read_source(data, Path(scratch) / "phantom", strict=settings.strict),
            data,
            settings.target,
            fold=fold,
            num_folds=settings.num_folds,
            split_seed=settings.split_seed,
            held_out_list=settings.held_out_list,
        )
        parts = cases.split
        numbers = len(parts.train), len(parts.val)
        say(fold_line(fold, settings.num_folds, cases.cases, *numbers, settings.held_out_list))
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
    content = content_of(rows, {**settings.written(), "fold": fold}, bootstrap)
    if warned.rows:
        content["warnings"] = warned.rows
    if failed:
        content["cases_left_out"] = [{"id": row["id"], "reason": row["reason"]} for row in failed]
    show_encoders(content)
    _write(settings.out, content)
    return content


def _check(settings: ProbeSettings) -> None:
    if settings.weights is None or settings.data is None:
        missing = " and ".join(f"--{name}" for name in ("weights", "data") if getattr(settings, name) is None)
        raise ConfigError(f"mim3d probe needs {missing}, or --features and --labels; see mim3d probe --help.")
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
    _check_out(settings, {"weights": to_mapping(settings.weights), "data": settings.data})


def _check_out(settings: ProbeSettings, source: Mapping[str, Any]) -> None:
    out = settings.out
    if out is None:
        return
    if not out.lower().endswith(".json") or os.path.isdir(out):
        raise ConfigError(f"out is {out}, but the scores go to a file that ends in .json; give such a name.")
    folder = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ConfigError(f"out is {out}, but {folder} is no folder that can be written to; choose another.")
    _require_own(out, source, overwrite=settings.overwrite)


def _require_own(out: str, source: Mapping[str, Any], *, overwrite: bool) -> None:
    """Refuse to replace a file that holds no scores of a probe, or those of another source unless asked to."""
    if not os.path.exists(out):
        return
    try:
        content = read_json(out)
        known = content["settings"]
        found = {key: known[key] for key in (source if source.keys() <= known.keys() else ("weights", "data"))}
        is_probe = content["kind"] == "probe"
    except (DataError, KeyError, TypeError):
        is_probe = False
    if not is_probe:
        raise ConfigError(f"{out} exists and holds no scores of a probe; choose another --out.")
    if not overwrite and found != source:
        first, second = found.values()
        raise ConfigError(f"{out} holds scores of {first} on {second}; choose another --out, or use --overwrite true.")


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
