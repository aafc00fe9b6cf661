"""Prediction with trained networks of any task: scans in, a folder that lists what became of each."""

import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.files import lock_file, read_json, remove_partial, try_lock, write_json
from mim3d.core.left_out import Failure, write_tracebacks
from mim3d.core.names import is_entry_name, joined_name, number_of, same_name
from mim3d.core.progress import Progress, say
from mim3d.core.resources import choose_device, device_name
from mim3d.core.settings import to_named
from mim3d.core.types import Named
from mim3d.core.warned import UnlikeTrainingWarning, WarningRow, checked_rows, merged, record_said
from mim3d.datasets.cases import Case, read_cases
from mim3d.datasets.ids import distinct_names, unique_ids
from mim3d.datasets.references import LIST_NAME
from mim3d.datasets.usable import fault_of, refuse_or_say
from mim3d.scans.files import PREDICTIONS_MARK
from mim3d.scans.grids import is_there, resolved, split_channel
from mim3d.scans.volumes import scan_id
from mim3d.tasks import TASKS
from mim3d.tasks.contract import PredictionSettings, Predictor, TrainedNetwork
from mim3d.tasks.trained import load_ensemble
from mim3d.training.settings import PRECISIONS
from mim3d.workflows.shared.held_out import held_out_by_all
from mim3d.workflows.shared.overlap import Stages, failure_of, is_too_large, outcome_of, run_overlapped
from mim3d.workflows.shared.scan_sources import ScanFiles

#: A list of all scans is written again once this many times its own time has gone since: one for each of ten thousand
#: scans would take longer than the networks do. What a kill loses is predicted again.
WRITE_EVERY = 20

#: File of a folder of results that holds where errors were raised that nobody foresaw.
TRACEBACKS_NAME = "failed_tracebacks.txt"

#: End of the sentence about a list of results that could not be written.
_GO_ON = "results that are finished are kept. Free some space, or choose another folder, and run it again."

#: Precision of predictions from before it was a setting.
PRECISION_OF_OLD = "32-true"

#: Scans unlike those of training that are named while predicting.
MOST_NAMED = 5


@dataclass(frozen=True)
class PredictSettings(PredictionSettings):
    """Settings of `mim3d predict`.

    Attributes:
        weights: Run of `mim3d finetune`, or a folder with an exported network; several, such as the folds of a
            cross-validation, are an ensemble: the mean of their probabilities decides.
        out: Folder for the label maps, or for the table of classes.
        input: Scans: files, folders, DICOM trees, CSV or JSON lists; if not given, the held-out cases of the run, or
            those that all of several runs held out.
        task: Name or dotted path of the task, where the card names one that is not mim3d's own; its code is imported.
        backbone: Encoder, where the card names a class that is not mim3d's own.
        modality: What made the scans, such as CT or MR, where neither a list nor a header says it.
        accelerator: Kind of device: auto, cpu, cuda or mps.
        overwrite: Do scans again that are finished, and replace predictions of other networks.
        strict: Refuse all scans where the header of one shows that it cannot be used, before any is predicted.
    """

    weights: str | list[str]
    out: str
    input: str | list[str] | None = None
    _: KW_ONLY
    task: str | None = None
    backbone: Named | None = None
    modality: str | None = None
    accelerator: str = "auto"
    overwrite: bool = False
    strict: bool = False


def predict_scans(settings: PredictSettings) -> str:
    """Predict scans; what is finished is kept, and a scan that cannot be used does not stop the others.

    Returns:
        The folder of the predictions.

    Raises:
        ConfigError: Settings that cannot work, networks that do not belong together, or a folder with other
            predictions, before any work begins.
        CheckpointError: There is no network of a task in the weights.
        DataError: There is no scan; with ``strict``, one cannot be used; or, once all others are done, scans could not
            be predicted.
    """
    weights = [settings.weights] if isinstance(settings.weights, str) else settings.weights
    device = choose_device(settings.accelerator)
    networks = load_ensemble(weights, task=settings.task, backbone=settings.backbone, device=device)
    if settings.precision == "auto" and not settings.overwrite:
        settings = replace(settings, precision=_precision_begun(Path(settings.out) / LIST_NAME))
    predictor = networks[0].task.predictor(networks, settings)
    if settings.input is None:
        found = held_out_by_all(weights)
    else:
        found = input_cases(
            settings.input,
            with_labels=predictor.reads_labels,
            modality=settings.modality,
            channels=networks[0].channel_names,
        )
    cases = predictor.accepted(found)
    if settings.strict:
        reasons = [fault for case in cases if (fault := fault_of(case, networks[0].check_channels)) is not None]
        if reasons:
            where = settings.input if isinstance(settings.input, str) else "--input"
            refuse_or_say(where, reasons, len(cases), strict=True)
    if networks[0].input_range is None:
        say(f"{weights[0]} does not say what scans it learned from: none is compared with them.")
    scans = f"{number_of(len(cases), 'scan')}{' that the run held out' if settings.input is None else ''}"
    name = to_named(networks[0].task, TASKS)["name"]
    say(f"input: {scans}; {name} by {number_of(len(networks), 'network')}, on {device_name(device)}")
    for note in predictor.notes:
        say(note)
    for row in _said_of(networks):
        record_said(row["kind"], f"of the network: {row['text']}")
    with alone_in(settings.out):
        folder = PredictionFolder.open(settings.out, predictor, cases, overwrite=settings.overwrite)
        folder.only_held_out = settings.input is None
        return _predict_all(predictor, folder)


def _precision_begun(path: Path) -> Any:
    """The precision that a list of predictions was begun in; auto where there is no such list."""
    found: Any = None
    if path.is_file():
        with suppress(DataError, AttributeError):
            found = read_json(str(path)).get("precision", PRECISION_OF_OLD)
    return found if found in PRECISIONS else "auto"


def _predict_all(predictor: Predictor, folder: "PredictionFolder") -> str:
    """Predict what is not finished in a folder, and say what became of all; its path."""
    cases = folder.cases
    remaining = [case for case in cases if not folder.is_finished(case)]
    step = predictor.scans_per_call
    groups = [remaining[start : start + step] for start in range(0, len(remaining), step)]
    try:
        with Progress(f"{{done}} of {number_of(len(remaining), 'scan')}", len(remaining)) as progress:
            run_overlapped(groups, _PredictionStages(predictor, folder, progress))
            # The name of the last scan would stay beside the bar.
            progress.update(progress.done)
    finally:
        if remaining:
            folder.write()
    unlike = [case.id for case in cases if folder.rows.get(case.id, {}).get("warnings")]
    if unlike:
        warnings.warn(
            f"{number_of(len(unlike), 'scan', 'are', of=len(cases))} unlike those that the network learned from: "
            f"{listed(unlike)}; "
            f"{folder.path / predictor.list_name} says how.",
            category=UnlikeTrainingWarning,
            stacklevel=2,
        )
    num_before = len(cases) - len(remaining)
    before = f", {num_before} of them before" if num_before else ""
    failed = [case.id for case in cases if case.id in folder.failures]
    say(f"{len(cases) - len(failed)} of {number_of(len(cases), 'scan')} {predictor.done}{before}: {folder.path}")
    if failed:
        raise DataError(
            f"{len(failed)} of {number_of(len(cases), 'scan')} could not be {predictor.done}, the first because of "
            f"{folder.failures[failed[0]]} All reasons are in {folder.path / predictor.failures_name}."
        )
    return str(folder.path)


#: Scans of one call of the networks, each with what was read or computed of it, or the error that kept it from that.
_Outcomes = list[tuple[Case, Any]]


class _PredictionStages(Stages[Sequence[Case], _Outcomes, _Outcomes, None]):
    """Scans that go through the networks in one call; what keeps one of them from being predicted is recorded.

    Args:
        predictor: What reads, predicts and writes.
        folder: What holds the results. The thread that writes has it alone.
        progress: What is shown of the scans that are computed. The thread that computes moves it.
    """

    def __init__(self, predictor: Predictor, folder: "PredictionFolder", progress: Progress) -> None:
        self._predictor, self._folder, self._progress = predictor, folder, progress

    def prepare(self, item: Sequence[Case]) -> _Outcomes:
        """Read scans."""
        return [(case, outcome_of(self._predictor.read, case)) for case in item]

    def compute(self, item: Sequence[Case], ready: _Outcomes) -> _Outcomes:
        """Predict the scans that could be read, all in one call; one by one where that fails."""
        start = self._progress.done
        read = [(case, inputs) for case, inputs in ready if not isinstance(inputs, Exception)]
        lost = [(case, error) for case, error in ready if isinstance(error, Exception)]
        answers = [*lost, *(self._predicted(read, start + len(lost)) if read else ())]
        self._progress.update(start + len(item), item[-1].id)
        return answers

    def _predicted(self, part: _Outcomes, start: float) -> _Outcomes:
        chosen = [case for case, _ in part]

        def watch(done: int, total: int) -> None:
            self._progress.update(start + len(part) * done / max(total, done, 1), chosen[-1].id)

        self._progress.update(self._progress.done, chosen[-1].id)
        inputs = [inputs for _, inputs in part]
        answers = outcome_of(self._predictor.predict, chosen, inputs, self._folder.path, watch)
        if not isinstance(answers, Exception):
            return list(zip(chosen, answers, strict=True))
        if len(part) == 1:
            return [(chosen[0], answers)]
        # One of them is to blame, or they do not fit into memory together.
        return [answer for place, each in enumerate(part) for answer in self._predicted([each], start + place)]

    def finish(self, item: Sequence[Case], done: _Outcomes) -> None:
        """Write scans, and record those that could not be read, predicted or written."""
        for case, answer in done:
            result = answer if isinstance(answer, Exception) else outcome_of(self._written, case, answer)
            if isinstance(result, Exception):
                self._fail(case, result)

    def _written(self, case: Case, answer: Any) -> None:
        entry = self._predictor.write(case, answer, self._folder.path)
        self._folder.add(case, entry)
        said = entry.get("warnings", ())
        # Of a foreign set the list says all, and the last line how many.
        self._folder.num_unlike += bool(said)
        if self._folder.num_unlike <= MOST_NAMED:
            for text in said:
                self._progress.say(f"warning: {case.images[0]}: {text}")

    def _fail(self, case: Case, error: Exception) -> None:
        failure = failure_of(error, case.images[0], self._predictor.memory_remedy)
        self._folder.fail(case, failure)
        self._progress.say(f"not {self._predictor.done}: {failure.reason}")

    def record(self, item: Sequence[Case], result: Exception | None) -> None:
        """Write the list now and then."""
        if result is not None:
            for case in item:
                self._fail(case, result)
        self._folder.write_if_due()

    def lacks_memory(self, outcome: _Outcomes | Exception) -> bool:
        """Whether memory was short for a scan of a call."""
        return any(is_too_large(each) for _, each in outcome) if isinstance(outcome, list) else is_too_large(outcome)


@contextmanager
def alone_in(out: str | Path) -> Iterator[None]:
    """Hold a folder of predictions for one process, as each writes its whole list.

    Raises:
        ConfigError: Another process predicts into it, or it cannot be written to.
    """
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; choose a folder as --out.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written to ({error.strerror}); choose another --out.") from error
    with lock_file(path / PREDICTIONS_MARK) as descriptor:
        if not try_lock(descriptor):
            raise ConfigError(f"Another process predicts into {path}; wait for it to end, or choose another --out.")
        remove_partial(path)
        yield


@dataclass
class PredictionFolder:
    """A folder of predictions in the making; what is finished survives a stop.

    What it holds of a scan belongs to that scan's files, not to its name: another scan of the same name gets a name of
    its own, and the same scan keeps the name that it got here first.

    Attributes:
        path: The folder.
        predictor: What fills it.
        rows: What the list says of finished scans, by id.
        failures: Reasons of the scans that could not be predicted, by id.
        tracebacks: Where errors that nobody foresaw were raised, by id.
        owners: Images of every scan that has a name here, by id.
        cases: The scans of this call, under the ids that they have here.
        only_held_out: Whether these are all cases that the run held out, so that no other is missing.
        num_unlike: Number of scans of this call that are unlike those of training.
    """

    path: Path
    predictor: Predictor
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    tracebacks: dict[str, str] = field(default_factory=dict)
    owners: dict[str, tuple[str, ...]] = field(default_factory=dict)
    cases: tuple[Case, ...] = ()
    only_held_out: bool = False
    num_unlike: int = 0
    _due_s: float = 0.0

    @classmethod
    def open(
        cls, out: str | Path, predictor: Predictor, cases: Sequence[Case], *, overwrite: bool
    ) -> "PredictionFolder":
        """Make the folder, or go on with one that was filled by the same networks and settings.

        Raises:
            ConfigError: The place cannot be written to, or holds predictions of other networks or settings, or files
                of other origin under the names that are to be written.
        """
        folder = cls(Path(out), predictor)
        path = folder.path
        has_list = (path / predictor.list_name).is_file()
        says_all = folder._resume(overwrite=overwrite) if has_list else True
        known = set(folder.owners)
        folder.cases = folder._named(cases, overwrite=overwrite)
        named = [image for case in cases for image in (*case.images, case.label) if image]
        sources = {os.path.realpath(split_channel(image)[0]) for image in named}
        files = [(case, path / name) for case in folder.cases for name in predictor.files_of(case).values()]
        own = next((file for _, file in files if os.path.realpath(file) in sources), None)
        if own is not None:
            raise ConfigError(
                f"{own} is one of the scans or labels themselves and would be replaced by a prediction; choose another "
                "--out."
            )
        if not overwrite:
            table = [] if has_list or predictor.table_name is None else [path / predictor.table_name]
            # What a call was busy with when it was killed is named since lists say what was begun.
            foreign = [file for case, file in files if says_all and case.id not in known]
            taken = next((file for file in (*foreign, *table) if file.exists()), None)
            if taken is not None:
                raise ConfigError(f"{taken} exists and is no prediction of mim3d; choose another --out.")
        try:
            folder.write()
        except DataError as error:
            raise ConfigError(f"{path} cannot be written to ({error}); choose another --out.") from error
        return folder

    def _resume(self, *, overwrite: bool) -> bool:
        """Go on with what is there unless it is to be replaced; whether its list says all that was begun."""
        path = self.path / self.predictor.list_name
        try:
            content = {"precision": PRECISION_OF_OLD, **read_json(str(path))}
            known = {name: content[name] for name in self.predictor.must_match}
            rows = {str(row["id"]): row for row in content["cases"] if isinstance(row["images"], list)}
            # Lists of earlier versions name no images of scans that failed, and none that were begun.
            others = [row for key in ("failed", "begun") for row in content.get(key, ()) if row.get("images")]
            others = [row for row in others if "reason" not in row or all(map(is_there, row["images"]))]
            owners = {str(row["id"]): tuple(map(str, row["images"])) for row in (*others, *rows.values())}
            failures = {str(row["id"]): str(row["reason"]) for row in others if "reason" in row}
            if not all(map(is_entry_name, owners)) or not all(owners.values()):
                raise DataError("a case has no images, or an id that leads out of the folder")
        except (DataError, KeyError, TypeError, AttributeError) as error:
            if overwrite:
                return True
            raise ConfigError(f"{path} is no list that mim3d wrote ({error!r}); choose another --out.") from error
        for name, value in known.items():
            if value != self.predictor.identity[name]:
                if overwrite:
                    return True
                what = "other networks" if name.startswith("weights_digest") else f"{name} {value}"
                raise ConfigError(
                    f"{self.path} holds predictions of {what}; choose another --out, or replace them by "
                    "--overwrite true."
                )
        self.rows, self.failures, self.owners = rows, failures, owners
        return "begun" in content

    def _named(self, cases: Sequence[Case], *, overwrite: bool) -> tuple[Case, ...]:
        """The scans of this call under the names that they have here, or get now."""
        names_of = {resolved(images): name for name, images in self.owners.items()}
        taken = {key: name for name, images in self.owners.items() for key in self._keys(name, images)}
        named, renamed, changed = [], [], []
        for case in cases:
            source = ScanFiles.of(case.images)
            own = self.owners.get(case.id)
            name = case.id if own is not None and resolved(own) == source.paths else names_of.pop(source.paths, None)
            name = name or self._moved(case, source, taken.get(same_name(case.id)))
            if name is None:
                owner = next((taken[key] for key in self._keys(case.id, case.images) if key in taken), None)
                name = case.id
                if owner is not None:
                    others = distinct_names(case.images[0], case.id, self.owners[owner][0])
                    name = next(each for each in others if not taken.keys() & set(self._keys(each, case.images)))
                    renamed.append(f"{case.images[0]} as {name}")
            elif self._is_changed(name, source):
                changed.append(case.images[0])
            if overwrite or case.images[0] in changed[-1:]:
                self.rows.pop(name, None)
            self.owners[name] = case.images
            taken |= dict.fromkeys(self._keys(name, case.images), name)
            self.failures.pop(name, None)
            named.append(replace(case, id=name))
        if renamed:
            warnings.warn(
                f"Other scans have names of this call's in {self.path}, so these are written under longer ones: "
                f"{listed(renamed)}.",
                stacklevel=4,
            )
        if changed:
            warnings.warn(
                f"Changed since their prediction, which is made again: {listed(changed)}.",
                stacklevel=4,
            )
        return tuple(named)

    def _keys(self, name: str, images: Sequence[str]) -> list[str]:
        """What a scan of this name occupies: its id and its files, as file systems compare them."""
        row = self.rows.get(name, {})
        files = self.predictor.files_of(Case(id=name, images=tuple(images)))
        return [same_name(each) for each in (name, *files.values(), *(str(row[key]) for key in files if key in row))]

    def _moved(self, case: Case, source: ScanFiles, owner: str | None) -> str | None:
        """The name of a finished scan that this one is, where that has gone from its place and the content is equal."""
        old = ScanFiles.read(self.rows.get(owner or "", {}).get("source"))
        if owner is None or old is None or not old.is_gone or old.num_bytes != source.num_bytes:
            return None
        new = ScanFiles.of(case.images, with_content=True)
        if new.sha256 is None or new.sha256 != old.sha256:
            return None
        self.rows[owner] |= {"images": list(case.images), "source": new.entry()}
        return owner

    def _is_changed(self, name: str, source: ScanFiles) -> bool:
        """Whether the files of a finished scan hold something else than when it was predicted."""
        old = ScanFiles.read(self.rows.get(name, {}).get("source"))
        if old is None or (old.num_bytes, old.modified_ns) == (source.num_bytes, source.modified_ns):
            return False
        return ScanFiles.of(self.owners[name], with_content=True).sha256 != old.sha256

    def is_finished(self, case: Case) -> bool:
        """Whether all that is asked for of exactly these images is there."""
        row, files = self.rows.get(case.id), self.predictor.files_of(case)
        return (
            row is not None
            and resolved(row["images"]) == resolved(case.images)
            and all(row.get(entry) == name and (self.path / name).is_file() for entry, name in files.items())
        )

    def add(self, case: Case, answer: Mapping[str, Any]) -> None:
        """Record a prediction."""
        self.failures.pop(case.id, None)
        files = self.predictor.files_of(case)
        source = ScanFiles.of(case.images, with_content=True).entry()
        self.rows[case.id] = {"id": case.id, "images": list(case.images), "source": source, **files, **answer}

    def fail(self, case: Case, failure: Failure) -> None:
        """Record that a scan could not be predicted."""
        self.rows.pop(case.id, None)
        self.failures[case.id] = failure.reason
        if failure.traceback is not None:
            self.tracebacks[case.id] = failure.traceback

    def write_if_due(self) -> None:
        """Write the list where that takes a small share of the time since it was written.

        Raises:
            DataError: As for :meth:`write`.
        """
        if time.monotonic() >= self._due_s:
            self.write()

    def write(self) -> None:
        """Write the list and the tables; each appears whole or not at all.

        Raises:
            DataError: The disk is full, or the folder cannot be written to.
        """
        start_s = time.monotonic()
        self.predictor.write_tables(self.path, self.rows, self.failures)
        failed = [
            {"id": name, "images": list(self.owners[name]), "reason": reason} for name, reason in self.failures.items()
        ]
        open_names = [name for name in self.owners if name not in self.rows and name not in self.failures]
        begun = [{"id": name, "images": list(self.owners[name])} for name in open_names]
        content = {**self.predictor.identity, "cases": list(self.rows.values()), "failed": failed, "begun": begun}
        if self.only_held_out:
            content["only_held_out"] = True
        if said := _said_of(self.predictor.networks):
            content["network_warnings"] = said
        write_json(self.path / self.predictor.list_name, content, indent=1, remedy=_GO_ON)
        write_tracebacks(self.path / TRACEBACKS_NAME, self.tracebacks)
        end_s = time.monotonic()
        self._due_s = end_s + WRITE_EVERY * (end_s - start_s)


def _said_of(networks: Sequence[TrainedNetwork]) -> list[WarningRow]:
    """Warnings that the cards of networks carry, each once."""
    return merged(*(checked_rows(network.card.get("warnings")) for network in networks))


def input_cases(
    inputs: str | Sequence[str],
    *,
    with_labels: bool = False,
    modality: str | None = None,
    channels: Sequence[str] = (),
    flag: str = "--input",
) -> list[Case]:
    """Find the scans behind files, folders, DICOM trees and lists; labels are left out unless asked for.

    Scans of several inputs that share an id get the name of their input in front, or the folders that tell them apart.
    Images that are called as the ``channels`` of the networks are one scan.

    Raises:
        DataError: The only input does not exist, an input holds no scan, or the same scan is named twice.
    """
    names = [inputs] if isinstance(inputs, str) else list(inputs)
    if not names:
        raise DataError(f"{flag} is empty; name files, folders or lists of scans.")
    found: list[tuple[str, Case]] = []
    for name in names:
        if len(names) > 1 and not os.path.exists(name):
            # It fails when its turn comes: one that is missing must not stop the others.
            found.append((name, Case(id=scan_id(name), images=(os.path.abspath(name),), patient=scan_id(name))))
        else:
            read = read_cases(name, recursive_images_only=not with_labels, modality=modality, channels=channels)
            found += [(name, case) for case in read.cases]
    twice = [images for images, count in Counter(case.images for _, case in found).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0][0]} is named twice by {flag}; name every scan once.")
    counts = Counter(same_name(case.id) for _, case in found)
    cases = [
        case
        if counts[same_name(case.id)] == 1
        else replace(case, id=joined_name([Path(name).resolve().name.partition(".")[0], case.id]))
        for name, case in found
    ]
    counts = Counter(same_name(case.id) for case in cases)
    cases = [case if counts[same_name(case.id)] == 1 else replace(case, id="") for case in cases]
    shared = os.path.commonpath([os.path.dirname(case.images[0]) for case in cases])
    return [replace(case, id=name) for case, name in zip(cases, unique_ids(cases, shared), strict=True)]
