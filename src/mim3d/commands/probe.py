"""The command that says what frozen features are worth."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mim3d.backbones import BACKBONES, Encoder
from mim3d.caching.cache import Cache
from mim3d.core.errors import ConfigError
from mim3d.core.progress import counted
from mim3d.core.settings import to_mapping, to_named
from mim3d.core.types import Named, Spacing
from mim3d.metrics import Bootstrap
from mim3d.probing.items import ProbeSet, View
from mim3d.probing.probe import Probed, drawn_from, probe_encoder, random_encoder, without_encoder
from mim3d.probing.settings import Probing
from mim3d.probing.tokens import check_crop_size
from mim3d.reporting.sources import short_names
from mim3d.scans.intensity import Intensity
from mim3d.weights import InputLayers, locate, weights_digest
from mim3d.workflows.evaluate import score_files
from mim3d.workflows.finetune.start import Start, choose_start
from mim3d.workflows.probe.cases import ProbeCases, Target, choose_cases, read_source
from mim3d.workflows.probe.table import Row, content_of, show
from mim3d.workflows.shared.devices import choose_device
from mim3d.workflows.shared.inputs import check_channels
from mim3d.workflows.shared.leakage import check_pretraining, check_split, labelled


def probe(
    weights: str | list[str],
    data: str,
    out: str | None = None,
    target: Target | None = None,
    backbone: Named | None = None,
    input_layers: InputLayers = "mean",
    cache: str | None = None,
    spacing_mm: Spacing | None = None,
    intensity: Intensity | None = None,
    fold: int = 0,
    num_folds: int = 5,
    split_seed: int = 0,
    probing: Probing = Probing(),
    num_bootstrap: int = 2000,
    accelerator: str = "auto",
    num_workers: int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> dict[str, Any]:
    """Score frozen features by a linear and a nearest-neighbour classifier, without training the encoder.

    With label maps the tokens that one label fills are told apart, with classes whole scans. Beside the weights stand
    an encoder of the same settings drawn at random, intensities (mean and deviation of each token or box), and the
    place of each token in its crop.

    Args:
        weights: Encoder: a run, an exported folder or a published checkpoint; several are compared in one table.
        data: Labelled scans: MSD or nnU-Net raw folder, folder of images and labels, CSV or JSON list, a cache, or
            `phantom` for synthetic CT made on the spot.
        out: File for all scores and intervals, .json; none is written if not given.
        target: labels (of tokens) or classes (of scans); what most scans have if not given.
        backbone: Encoder of foreign weights, a name of list_models(); that of the weights if not given.
        input_layers: For another number of channels than the weights know: mean, repeat (in turn) or new.
        cache: Folder for the cache of prepared scans; a temporary one if not given.
        spacing_mm: Voxel size along X, Y, Z in millimetres; that of the first weights if not given.
        intensity: Mapping of intensities to network input; that of each of the weights if not given, else planned.
        fold: Which of the folds is held out and scored on, from 0, as `mim3d finetune` deals them out.
        num_folds: Folds the patients are dealt out to; a declared split wins over folds.
        split_seed: Of how patients are dealt out to folds.
        probing: How features are taken and classified.
        num_bootstrap: Resamples of the held-out patients for 95 % intervals; 0 for none.
        accelerator: auto, cpu, cuda or mps.
        num_workers: Processes that prepare scans; one per core if not given.
        seed: Of the choice of tokens, of the random encoder, and of layers that the weights do not fill.
        strict: Refuse what is otherwise told in a warning: scans that cannot be used, and held-out scans that were
            learned from.

    Returns:
        All scores and intervals, as in the file.

    Raises:
        ConfigError: Settings that cannot work, before any work begins.
        CheckpointError: Weights that cannot be read or do not fit.
        DataError: Scans that cannot be used, or nothing to tell apart.
    """
    arguments = dict(locals())
    paths = [weights] if isinstance(weights, str) else list(weights)
    _check(paths, out, num_workers, seed)
    bootstrap = Bootstrap(num_bootstrap=num_bootstrap, seed=0)
    with tempfile.TemporaryDirectory(prefix="mim3d-probe-") as scratch:
        cases = choose_cases(
            read_source(data, Path(scratch) / "phantom"),
            data,
            target,
            fold=fold,
            num_folds=num_folds,
            split_seed=split_seed,
        )
        starts = _starts(paths, cases, arguments)
        scans = _scans(starts, cases, cache or f"{scratch}/cache", arguments)
        rows = Bench(cases, scans, arguments).rows(starts)
    settings = {name: value for name, value in arguments.items() if name not in ("out", "cache", "num_workers")}
    content = content_of(rows, to_mapping(settings), bootstrap)
    show(content)
    if out is not None:
        score_files.write_json(out, content)
        print(f"scores: {out}")
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


def _starts(paths: Sequence[str], cases: ProbeCases, arguments: Mapping[str, Any]) -> dict[str, Start]:
    """Every encoder by its path, on the device, once it is known to fit the data."""
    device = choose_device(arguments["accelerator"])
    starts = {}
    for path in paths:
        # Layers that the weights do not fill are drawn.
        with drawn_from(arguments["seed"]):
            start = choose_start(
                arguments["backbone"], path, len(cases.cases[0].images), input_layers=arguments["input_layers"]
            )
        check_channels(cases.cases, start.recipe)
        assert start.encoder is not None
        check_crop_size(arguments["probing"].crop_size, start.encoder)
        start.encoder.to(device).eval()
        starts[path] = start
    return starts


def _scans(starts: Mapping[str, Start], cases: ProbeCases, folder: str, arguments: Mapping[str, Any]) -> Cache:
    """The prepared scans, all of one voxel size; warns of encoders that learned at another, and of leaks.

    Raises:
        DataError: ``strict``, and a held-out scan was learned from.
    """
    first, *others = starts.values()
    spacing_mm = first.spacing_mm(arguments["spacing_mm"], cases.source)
    for start in others:
        start.spacing_mm(spacing_mm, cases.source)
    strict = arguments["strict"]
    scans = cases.prepared(folder, spacing_mm, num_workers=arguments["num_workers"], strict=strict)
    held_out = labelled(scans.subset(cases.split.val))
    check_split(labelled(scans.subset(cases.split.train)), held_out, strict=strict)
    for path in starts:
        check_pretraining(path, held_out, strict=strict)
    return scans


@dataclass(frozen=True)
class Compared:
    """What stands beside encoders of one kind: the items, and what they are worth without learned weights."""

    items: ProbeSet
    references: Mapping[str, Probed]


@dataclass(frozen=True)
class Bench:
    """Probes encoders one after the other on the same scans."""

    cases: ProbeCases
    scans: Cache
    arguments: Mapping[str, Any]

    def rows(self, starts: Mapping[str, Start]) -> list[Row]:
        """Every encoder, then what learned nothing, for each kind; later ones against the first where items agree."""
        names = short_names([os.path.abspath(path) for path in starts])
        probing: Probing = self.arguments["probing"]
        found: list[Row] = []
        beside: dict[str, Compared] = {}
        owners: dict[str, str] = {}
        for path, start in starts.items():
            name, encoder = names[os.path.abspath(path)], start.encoder
            assert encoder is not None
            mapping = start.intensity(self.arguments["intensity"], self.scans.subset(self.cases.split.train))
            key = repr((start.recipe, mapping))
            if key not in beside:
                owners[key], beside[key] = name, self._compared(encoder, mapping)
            compared = beside[key]
            probed = probe_encoder(encoder, compared.items, probing, watch=_watch)
            against = dict(compared.references)
            if found and found[0].items.is_scored_as(compared.items):
                against[found[0].name] = found[0].probed
            about = {
                "weights": os.path.abspath(path),
                "weights_sha256": weights_digest(path),
                "backbone": to_named(start.recipe, BACKBONES),
                "intensity": to_mapping(mapping),
            }
            found.append(Row(name, "encoder", about, compared.items, probed, against))
        several = len(beside) > 1
        for title in next(iter(beside.values())).references:
            for key, compared in beside.items():
                name = f"{title} ({owners[key]})" if several else title
                found.append(Row(name, title, {}, compared.items, compared.references[title], {}))
        return found

    def _compared(self, encoder: Encoder, mapping: Intensity) -> Compared:
        probing, seed = self.arguments["probing"], self.arguments["seed"]
        items = self.cases.items(self.scans, encoder, mapping, probing, seed=seed)
        random = probe_encoder(random_encoder(encoder, seed), items, probing, watch=_watch)
        return Compared(items, {"random": random, **without_encoder(items, probing)})


def _watch(batches: Sequence[Sequence[View]]) -> Iterator[Sequence[View]]:
    return counted(batches, len(batches), "features")
