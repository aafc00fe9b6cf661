"""Probes of frozen features: encoders side by side, beside what was not learned."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any

from mim3d.backbones import BACKBONES
from mim3d.caching.cache import Cache
from mim3d.core.errors import ConfigError
from mim3d.core.files import write_json
from mim3d.core.progress import counted
from mim3d.core.resources import choose_device
from mim3d.core.settings import to_mapping, to_named
from mim3d.core.types import Named, Spacing
from mim3d.metrics import Bootstrap
from mim3d.probing.items import ProbeSet, View, checked_crop_size
from mim3d.probing.probe import Probed, drawn_from, probe_encoder, random_encoder, without_encoder
from mim3d.probing.settings import Probing
from mim3d.reporting.sources import short_names
from mim3d.scans.intensity import Intensity
from mim3d.weights import InputLayers, locate, weights_digest
from mim3d.workflows.probe.cases import ProbeCases, Target, choose_cases, read_source
from mim3d.workflows.probe.table import Row, content_of, show
from mim3d.workflows.shared.initialisation import Initialisation, initialise
from mim3d.workflows.shared.inputs import check_channels
from mim3d.workflows.shared.leakage import check_pretraining, check_split, identities_of


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
        cache: Folder for the cache of prepared scans; a temporary one if not given.
        spacing_mm: Voxel size along X, Y, Z in millimetres; that of the first weights if not given.
        intensity: Mapping of intensities to network input; that of each of the weights if not given, else planned.
        fold: Which of the folds is held out and scored on, from 0, the same as those of `mim3d finetune`.
        num_folds: Number of folds that the patients are split into; a declared split wins over folds.
        split_seed: Seed by which patients are split into folds.
        probing: How features are taken and classified.
        num_bootstrap: Resamples of the held-out patients for 95 % intervals; 0 for none.
        accelerator: Kind of device: auto, cpu, cuda or mps.
        num_workers: Processes that prepare scans; one per core if not given.
        seed: Seed of the choice of tokens, of the random encoder, and of layers that the weights do not fill.
        strict: Refuse what is otherwise a warning: scans that cannot be used, and held-out scans that were learned
            from.
    Raises:
        ConfigError: For a value that cannot work.
    """

    weights: str | list[str]
    data: str
    _: KW_ONLY
    out: str | None = None
    target: Target | None = None
    backbone: Named | None = None
    input_layers: InputLayers = "mean"
    cache: str | None = None
    spacing_mm: Spacing | None = None
    intensity: Intensity | None = None
    fold: int = 0
    num_folds: int = 5
    split_seed: int = 0
    probing: Probing = Probing()
    num_bootstrap: int = 2000
    accelerator: str = "auto"
    num_workers: int | None = None
    seed: int = 0
    strict: bool = False

    @property
    def paths(self) -> list[str]:
        """The weights, one or several."""
        return [self.weights] if isinstance(self.weights, str) else list(self.weights)


def run_probe(settings: ProbeSettings) -> dict[str, Any]:
    """Probe every encoder and what was not learned; print the table, and write it where a file is given."""
    _check(settings.paths, settings.out, settings.num_workers, settings.seed)
    bootstrap = Bootstrap(num_bootstrap=settings.num_bootstrap, seed=0)
    with tempfile.TemporaryDirectory(prefix="mim3d-probe-") as scratch:
        cases = choose_cases(
            read_source(settings.data, Path(scratch) / "phantom"),
            settings.data,
            settings.target,
            fold=settings.fold,
            num_folds=settings.num_folds,
            split_seed=settings.split_seed,
        )
        encoders: dict[str, Initialisation] = {}
        device = choose_device(settings.accelerator)
        for path in settings.paths:
            # Layers that the weights do not fill are drawn.
            with drawn_from(settings.seed):
                num_channels = len(cases.cases[0].images)
                initial = initialise(settings.backbone, path, num_channels, input_layers=settings.input_layers)
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
        held_out = identities_of(scans.subset(cases.split.val))
        check_split(identities_of(scans.subset(cases.split.train)), held_out, strict=strict)
        for path in encoders:
            check_pretraining(path, held_out, strict=strict)
        rows = _rows(encoders, cases, scans, settings)
    written = {f.name: getattr(settings, f.name) for f in fields(settings)}
    about = {name: value for name, value in written.items() if name not in ("out", "cache", "num_workers")}
    content = content_of(rows, to_mapping(about), bootstrap)
    show(content)
    if settings.out is not None:
        write_json(settings.out, content, indent=1, allow_nan=False)
        print(f"scores: {settings.out}")
    return content


def _check(paths: Sequence[str], out: str | None, num_workers: int | None, seed: int) -> None:
    if not paths:
        raise ConfigError("weights is empty; name a run, an exported folder or a weights file.")
    if len(set(paths)) < len(paths):
        raise ConfigError("weights names the same path twice; name each once.")
    for path in paths:
        locate(path)
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}; it must be 0 or more.")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be zero or more.")
    if out is None:
        return
    if not out.lower().endswith(".json") or os.path.isdir(out):
        raise ConfigError(f"out is {out}, but the scores go to a file that ends in .json; give such a name.")
    folder = os.path.dirname(os.path.abspath(out))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ConfigError(f"out is {out}, but {folder} is no folder that can be written to; choose another.")


def _rows(
    encoders: Mapping[str, Initialisation], cases: ProbeCases, scans: Cache, settings: ProbeSettings
) -> list[Row]:
    """Every encoder, then what learned nothing, for each kind; later ones against the first where items agree."""
    names = short_names([os.path.abspath(path) for path in encoders])
    found: list[Row] = []
    # For each kind of encoder its items, and what they are worth without learned weights.
    beside: dict[str, tuple[ProbeSet, dict[str, Probed]]] = {}
    owners: dict[str, str] = {}
    for path, initial in encoders.items():
        name, encoder = names[os.path.abspath(path)], initial.encoder
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
