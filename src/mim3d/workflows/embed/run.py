"""The loop over scans: each is read, its tokens are pooled, and its rows are kept; what cannot be used is listed."""

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim3d.backbones.contract import Encoder
from mim3d.caching.preprocessing import Prepared, prepare
from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.left_out import note_left_out
from mim3d.core.names import number_of
from mim3d.core.progress import Progress, say
from mim3d.core.provenance import command_line, environment
from mim3d.core.resources import choose_device, device_name
from mim3d.core.warned import UnlikeTrainingWarning, WeightsWarning, recording
from mim3d.datasets.cases import Case
from mim3d.datasets.usable import fault_of, refuse_or_say
from mim3d.inference.features import Regions, body_region, pool_features
from mim3d.inference.scan_input import usual_intensity
from mim3d.training.precision import DTYPES, require_precision
from mim3d.weights import full_path, load_encoder, weights_digest
from mim3d.workflows.embed.arrays import ScanArray, named_scans
from mim3d.workflows.embed.leaks import IDENTITY, look_up, say_leaks
from mim3d.workflows.embed.regions import EmptyMaskError, RegionSource, ScanRegions
from mim3d.workflows.embed.settings import EmbeddingPlan, EmbedSettings
from mim3d.workflows.embed.store import FeatureStore, stamp
from mim3d.workflows.predict import input_cases
from mim3d.workflows.shared.feature_tables import WHOLE_SCAN, FeatureTable
from mim3d.workflows.shared.leakage import Seen, identity_of, read_seen, row_of
from mim3d.workflows.shared.overlap import Stages, failure_of, run_overlapped

#: Scans unlike those of training that are named while embedding.
MOST_NAMED = 5

#: What the numbers are, in the description of a table.
POOLING = {
    "mean": (
        "Mean over the voxels of the region, of the features of the token that each lies in: a token weighs as many "
        "voxels of the region as it holds. The region 'scan' is the body: blocks of 4 voxels a side of which at least "
        "half is neither air nor background, as in prediction."
    ),
    "max": (
        "Maximum over tokens of which at least half lies in the region; over all that it touches where there are none."
    ),
    "windows": (
        "Where windows overlap, each token is taken from the window in which it lies deepest, and counted once."
    ),
    "volume_ml": "Volume of the region; of masks and boxes on the scan's own grid.",
}


def embed_scans(settings: EmbedSettings) -> FeatureTable:
    """Embed scans; what is finished is kept, and a scan that cannot be used does not stop the others.

    Returns:
        The features of all scans, and of those that the table held before.

    Raises:
        ConfigError: Settings that cannot work, or a table of other features, before any work begins.
        CheckpointError: Weights that cannot be read or do not fit.
        DataError: There is no scan; with ``strict``, one cannot be used; or none could be embedded.
    """
    if settings.out is None and command_line() is not None:
        raise ConfigError("mim3d embed needs --out, such as --out features.parquet.")
    device = choose_device(settings.accelerator)
    require_precision(settings.precision, device.type)
    with recording() as warned, tempfile.TemporaryDirectory(prefix="mim3d-embed-") as folder:
        encoder = load_encoder(settings.weights, settings.backbone).to(device)
        plan = EmbeddingPlan.of(settings, encoder.strides, encoder.widths)
        cases = _cases(settings, Path(folder))
        if settings.strict:
            _refuse_unusable(cases, settings, plan)
        source = RegionSource.of(cases, settings.masks, settings.boxes)
        if plan.intensity is None:
            warnings.warn(
                f"{settings.weights} does not say how scans were prepared: CT is seen in the window from -1000 to 1000 "
                "HU, any other scan by the z-score of its foreground, each in "
                f"{'its own voxel size' if plan.preparations[0].spacing_mm is None else 'the voxel size asked for'}; "
                "give --intensity and --spacing_mm where you know better.",
                category=WeightsWarning,
                stacklevel=2,
            )
        size = " x ".join(map(str, plan.tiling.size))
        say(
            f"input: {number_of(len(cases), 'scan')}; {len(plan.columns)} features, windows of {size} voxels, on "
            f"{device_name(device)}"
        )
        work = Embedding(settings, plan, source, encoder, device, read_seen(settings.weights))
        identity = plan.identity(settings, weights_digest(settings.weights))
        columns = plan.columns
        with FeatureStore.opened(
            settings.out, settings.format, identity, columns, overwrite=settings.overwrite
        ) as store:
            return _embed_all(work, cases, store, warned.rows)


def _cases(settings: EmbedSettings, folder: Path) -> list[Case]:
    """The scans that are meant; arrays are written into a folder."""
    scans = named_scans(settings.scans)
    arrays = [scan for scan in scans if isinstance(scan, ScanArray)]
    if arrays:
        return [
            Case(id=each.id, images=tuple(each.write(folder)), patient=each.id, modality=settings.modality)
            for each in arrays
        ]
    paths = [scan for scan in scans if isinstance(scan, str)]
    return input_cases(paths if len(paths) != 1 else paths[0], modality=settings.modality, flag="SCANS")


def _refuse_unusable(cases: Sequence[Case], settings: EmbedSettings, plan: EmbeddingPlan) -> None:
    def check(case: Case) -> None:
        plan.learned.check_channels(len(case.images), case.images[0])

    reasons = [fault for case in cases if (fault := fault_of(case, check)) is not None]
    if reasons:
        where = settings.scans if isinstance(settings.scans, str) else "SCANS"
        refuse_or_say(where, reasons, len(cases), strict=True)


@dataclass(frozen=True, eq=False)
class ReadScan:
    """A scan in memory, ready to be embedded.

    Attributes:
        case: Its files.
        prepared: The scan in each voxel size.
        regions: Its labels or boxes; None without any.
        warnings: Sentences on what of it is unlike training, or lacks.
        known_by: What it is known by where the weights come with a list of scans, as plain values; else empty.
    """

    case: Case
    prepared: tuple[Prepared, ...]
    regions: ScanRegions | None
    warnings: tuple[str, ...]
    known_by: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Embedding:
    """What turns scans into rows of features.

    Attributes:
        settings: As the user gave them.
        plan: What they come to.
        source: Where regions come from.
        encoder: The encoder on its device, loaded once.
        device: Where it computes.
        seen: The scans that the weights were learned from; None where no list came with them.
    """

    settings: EmbedSettings
    plan: EmbeddingPlan
    source: RegionSource
    encoder: Encoder
    device: torch.device
    seen: Seen | None

    def read(self, case: Case) -> ReadScan:
        """Read a scan, and what of it has rows of its own.

        Raises:
            DataError: The scan or its mask cannot be used.
        """
        learned, said = self.plan.learned, []
        learned.check_channels(len(case.images), case.images[0])
        regions = None
        try:
            regions = self.source.read(case)
        except EmptyMaskError as error:
            if not self.settings.whole_scan:
                raise
            said.append(f"{error} The whole scan alone has a row.")
        if regions is None and not self.settings.whole_scan and not said:
            what = "mask" if self.settings.masks else "box"
            raise DataError(f"{case.images[0]}: there is no {what} for this scan; add one, or take the scan out.")
        prepared = tuple(
            prepare(
                case,
                preparation,
                with_label=False,
                set_in_hu=learned.in_hu,
                with_marks=number == 0 and self.seen is not None,
            )
            for number, preparation in enumerate(self.plan.preparations)
        )
        known_by = {} if self.seen is None else row_of(identity_of(case, prepared[0]))
        said += regions.notes if regions is not None else ()
        return ReadScan(case, prepared, regions, (*learned.warnings_on(prepared[0]), *said), known_by)

    def rows(self, scan: ReadScan, on_windows: Callable[[int, int], None]) -> FeatureTable:
        """Features of a scan and of its regions, a row each.

        Args:
            scan: The scan.
            on_windows: Called with the number of windows that are done and their number in all.
        """
        names = [*([WHOLE_SCAN] if self.settings.whole_scan else []), *(scan.regions.names if scan.regions else ())]
        parts, volumes_ml = [], np.zeros(len(names))
        for number, prepared in enumerate(scan.prepared):
            inside = self.plan.learned.scan(prepared, self.plan.intensity or usual_intensity(prepared))
            regions: list[Regions] = (
                [body_region(prepared.foreground, inside.shape)] if self.settings.whole_scan else []
            )
            voxels_ml = [float(np.prod(prepared.spacing_mm)) / 1000] * len(regions)
            if scan.regions is not None:
                regions.append(scan.regions.on(prepared))
                voxels_ml += [scan.regions.voxel_ml] * len(scan.regions.names)
            pooled = pool_features(
                self.maps,
                self.encoder,
                inside,
                regions,
                self.plan.levels,
                self.plan.tiling,
                on_windows=partial(_part_of_all, on_windows, number, len(scan.prepared)),
            )
            if number == 0:
                volumes_ml = pooled[0].weight_R * voxels_ml
            parts += [values for level in pooled for values in (level.mean_RD, level.max_RD)]
        values = np.concatenate(parts, axis=1)
        if not np.isfinite(values[volumes_ml > 0]).all():
            raise DataError(
                f"{scan.case.images[0]}: the encoder gives features that are not finite numbers; look at the scan's "
                "intensities and at the weights."
            )
        keys: Mapping[str, Sequence[Any]] = {
            "id": [scan.case.id] * len(names),
            "patient": [scan.case.patient] * len(names),
            "region": names,
            "image": [";".join(scan.case.images)] * len(names),
            "volume_ml": volumes_ml.tolist(),
        }
        return FeatureTable(keys=keys, columns=self.plan.columns, values=values)

    def maps(self, windows_BCXYZ: Tensor) -> list[Tensor]:
        """The encoder's maps of windows."""
        dtype = DTYPES.get(self.settings.precision)
        precision: AbstractContextManager[object] = nullcontext()
        if dtype is not None:
            precision = torch.autocast(self.device.type, dtype)
        with precision:
            return self.encoder.feature_maps(windows_BCXYZ.to(self.device))


def _part_of_all(on_windows: Callable[[int, int], None], before: int, parts: int, done: int, total: int) -> None:
    """Say how far one of several equal parts has come."""
    on_windows(before * total + done, total * parts)


def _embed_all(
    work: Embedding, cases: Sequence[Case], store: FeatureStore, said: Sequence[Mapping[str, str]]
) -> FeatureTable:
    """Embed what is not finished, write the table, and say what became of all."""
    source = work.source
    stamps = {case.id: stamp(case, source.masks.get(case.id), source.describe(case)) for case in cases}
    remaining = [case for case in cases if not store.is_finished(case, stamps[case.id])]
    with Progress(f"{{done}} of {number_of(len(remaining), 'scan')}", len(remaining)) as progress:
        places = {case.id: place for place, case in enumerate(remaining)}
        run_overlapped(remaining, _EmbeddingStages(work, store, stamps, progress, places))
        # The name of the last scan would stay beside the bar.
        progress.update(len(remaining))
    return _concluded(work, cases, store, said, len(remaining))


class _EmbeddingStages(Stages[Case, ReadScan, tuple[FeatureTable, Mapping[str, Any]], None]):
    """Scans that are read, embedded and kept; what keeps one from being embedded is recorded.

    Args:
        work: What reads and embeds.
        store: What holds the results. The thread that writes has it alone.
        stamps: What tells each scan from others, by id.
        progress: What is shown of the scans that are computed. The thread that computes moves it.
        places: Number of each scan, by id, from 0.
    """

    def __init__(
        self,
        work: Embedding,
        store: FeatureStore,
        stamps: Mapping[str, Mapping[str, Any]],
        progress: Progress,
        places: Mapping[str, int],
    ) -> None:
        self._work, self._store, self._stamps, self._progress = work, store, stamps, progress
        self._places = places
        self._num_unlike = 0

    def prepare(self, item: Case) -> ReadScan:
        """Read a scan."""
        return self._work.read(item)

    def compute(self, item: Case, ready: ReadScan) -> tuple[FeatureTable, Mapping[str, Any]]:
        """Embed a scan; its rows, and what is kept and said of it."""
        start = self._places[item.id]

        def watch(done: int, total: int) -> None:
            self._progress.update(start + done / max(total, done, 1), item.id)

        self._progress.update(start, item.id)
        about = {"warnings": list(ready.warnings), **({IDENTITY: ready.known_by} if ready.known_by else {})}
        return self._work.rows(ready, watch), about

    def finish(self, item: Case, done: tuple[FeatureTable, Mapping[str, Any]]) -> None:
        """Keep the rows of a scan."""
        rows, about = done
        said = about["warnings"]
        self._store.add({**self._stamps[item.id], **about}, rows)
        self._num_unlike += bool(said)
        for text in said if self._num_unlike <= MOST_NAMED else ():
            self._progress.say(f"warning: {item.images[0]}: {text}")

    def record(self, item: Case, result: Exception | None) -> None:
        """Record why a scan could not be embedded."""
        if result is not None:
            failure = failure_of(result, item.images[0], "use a smaller --batch_size or --window_size")
            self._store.fail(item, failure)
            self._progress.say(f"not embedded: {failure.reason}")


def _concluded(
    work: Embedding, cases: Sequence[Case], store: FeatureStore, said: Sequence[Mapping[str, str]], num_now: int
) -> FeatureTable:
    """Write the table, and say what is in it and where; its rows."""
    unlike = [case.id for case in cases if case.id in store.finished and store.finished[case.id].about["warnings"]]
    if unlike:
        where = "" if store.out is None else f"; {store.description} has them"
        warnings.warn(
            f"{number_of(len(unlike), 'scan', 'have', of=len(cases))} remarks (unlike those that the encoder learned "
            f"from, an empty mask, or a box that was cut): {listed(unlike)}{where}.",
            category=UnlikeTrainingWarning,
            stacklevel=2,
        )
    look_up(store, work.seen)
    learned_from = say_leaks(cases, store, work.seen, work.settings.weights)
    num_failed, num_before = len(store.failures), len(cases) - num_now
    store.conclude(
        {
            "weights": full_path(work.settings.weights),
            "pooling": POOLING,
            "made_by": {key: value for key, value in environment().items() if key != "hardware"},
            "learned_from": learned_from,
            "warnings": list(said),
        }
    )
    before = f", {num_before} of them before" if num_before else ""
    where = "" if store.out is None else f": {store.out}"
    if num_failed == len(cases):
        first = next(iter(store.failures.values())).reason
        every = "" if store.out is None else f" All reasons are in {store.failures_path}."
        raise DataError(
            f"None of {number_of(len(cases), 'scan')} could be embedded, the first because of {first}{every}"
        )
    table = store.table
    say(
        f"{len(cases) - num_failed} of {number_of(len(cases), 'scan')} embedded{before}, "
        f"{number_of(len(table), 'row')} of {len(store.columns)} features{where}"
    )
    note_left_out(num_failed, len(cases), "the lines above" if store.out is None else store.failures_path)
    return table
