"""Prediction with trained networks of any task: scans in, a folder that lists what became of each."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import read_json, write_json
from mim3d.core.progress import Progress, say
from mim3d.core.resources import choose_device
from mim3d.core.types import Named
from mim3d.datasets.cases import Case, read_cases
from mim3d.scans.grids import split_channel
from mim3d.tasks.contract import PredictionSettings, Predictor
from mim3d.tasks.trained import load_ensemble
from mim3d.workflows.shared.held_out import held_out_by_all


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
        accelerator: Kind of device: auto, cpu, cuda or mps.
        overwrite: Do scans again that are finished, and replace predictions of other networks.
    """

    weights: str | list[str]
    out: str
    input: str | list[str] | None = None
    _: KW_ONLY
    task: str | None = None
    backbone: Named | None = None
    accelerator: str = "auto"
    overwrite: bool = False


def predict_scans(settings: PredictSettings) -> str:
    """Predict scans; what is finished is kept, and a scan that cannot be used does not stop the others.

    Returns:
        The folder of the predictions.

    Raises:
        ConfigError: Settings that cannot work, networks that do not belong together, or a folder with other
            predictions, before any work begins.
        CheckpointError: There is no network of a task in the weights.
        DataError: There is no scan; or, once all others are done, scans could not be predicted.
    """
    weights = [settings.weights] if isinstance(settings.weights, str) else settings.weights
    device = choose_device(settings.accelerator)
    networks = load_ensemble(weights, task=settings.task, backbone=settings.backbone, device=device)
    predictor = networks[0].task.predictor(networks, settings)
    if settings.input is None:
        found = held_out_by_all(weights)
    else:
        found = input_cases(settings.input, with_labels=predictor.reads_labels)
    cases = predictor.accepted(found)
    folder = PredictionFolder.open(settings.out, predictor, cases, overwrite=settings.overwrite)
    remaining = [case for case in cases if not folder.is_finished(case)]
    step = predictor.scans_per_call
    with Progress("{done:.1f} of {total} scans", len(remaining)) as progress:
        for start in range(0, len(remaining), step):
            _predict(remaining[start : start + step], predictor, folder, progress)
            folder.write()
    num_before = len(cases) - len(remaining)
    before = f", {num_before} of them before" if num_before else ""
    failed = [case.id for case in cases if case.id in folder.failures]
    say(f"{len(cases) - len(failed)} of {len(cases)} scans {predictor.done}{before}: {folder.path}")
    if failed:
        raise DataError(
            f"{len(failed)} of {len(cases)} scans could not be {predictor.done}, the first because of "
            f"{folder.failures[failed[0]]} All reasons are in {folder.path / predictor.failures_name}."
        )
    return str(folder.path)


def _predict(cases: Sequence[Case], predictor: Predictor, folder: "PredictionFolder", progress: Progress) -> None:
    """Predict the scans of one call of the networks; what keeps one from being predicted is recorded."""

    def fail(case: Case, error: BaseException) -> None:
        short = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        reason = f"{case.images[0]}: not enough memory; {predictor.memory_remedy}." if short else str(error)
        folder.rows.pop(case.id, None)
        folder.failures[case.id] = reason
        progress.say(f"not {predictor.done}: {reason}")

    read: list[tuple[Case, Any]] = []
    for case in cases:
        progress.update(progress.done, case.id)
        try:
            read.append((case, predictor.read(case)))
        except (DataError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            fail(case, error)
            progress.update(progress.done + 1, case.id)
    if not read:
        return
    chosen = [case for case, _ in read]
    num_before, name = progress.done, chosen[-1].id

    def watch(done: int, total: int) -> None:
        progress.update(num_before + done / max(total, done, 1), name)

    try:
        answers = predictor.predict(chosen, [inputs for _, inputs in read], folder.path, watch)
    except (DataError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        for case in chosen:
            fail(case, error)
    else:
        for case, answer in zip(chosen, answers, strict=True):
            folder.add(case, answer)
    progress.update(num_before + len(chosen), name)


@dataclass
class PredictionFolder:
    """A folder of predictions in the making; what is finished survives a stop.

    Attributes:
        path: The folder.
        predictor: What fills it.
        rows: What the list says of finished scans, by id.
        failures: Reasons of the scans that could not be predicted, by id.
    """

    path: Path
    predictor: Predictor
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

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
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; choose a folder as --out.")
        files = [path / name for case in cases for name in predictor.files_of(case).values()]
        named = [image for case in cases for image in (*case.images, case.label) if image]
        sources = {os.path.realpath(split_channel(image)[0]) for image in named}
        own = next((file for file in files if os.path.realpath(file) in sources), None)
        if own is not None:
            raise ConfigError(
                f"{own} is one of the scans or labels themselves and would be replaced by a prediction; choose another "
                "--out."
            )
        if not overwrite and (path / predictor.list_name).is_file():
            folder._resume()
        elif not overwrite:
            table = [] if predictor.table_name is None else [path / predictor.table_name]
            taken = next((file for file in (*files, *table) if file.exists()), None)
            if taken is not None:
                raise ConfigError(f"{taken} exists and is no prediction of mim3d; choose another --out.")
        try:
            folder.write()
        except DataError as error:
            raise ConfigError(f"{path} cannot be written to ({error}); choose another --out.") from error
        return folder

    def _resume(self) -> None:
        """Go on with the scans that an earlier call finished."""
        path = self.path / self.predictor.list_name
        content = read_json(str(path))
        try:
            known = {name: content[name] for name in self.predictor.must_match}
            rows = {str(row["id"]): row for row in content["cases"] if isinstance(row["images"], list)}
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no list that mim3d wrote ({error!r}); choose another --out.") from error
        for name, value in known.items():
            if value != self.predictor.identity[name]:
                what = "other networks" if name.startswith("weights_digest") else f"{name} {value}"
                raise ConfigError(
                    f"{self.path} holds predictions of {what}; choose another --out, or replace them by "
                    "--overwrite true."
                )
        self.rows = rows

    def is_finished(self, case: Case) -> bool:
        """Whether all that is asked for of exactly these images is there."""
        row, files = self.rows.get(case.id), self.predictor.files_of(case)
        return (
            row is not None
            and row["images"] == list(case.images)
            and all(row.get(entry) == name and (self.path / name).is_file() for entry, name in files.items())
        )

    def add(self, case: Case, answer: Mapping[str, Any]) -> None:
        """Record a prediction."""
        self.failures.pop(case.id, None)
        files = self.predictor.files_of(case)
        self.rows[case.id] = {"id": case.id, "images": list(case.images), **files, **answer}

    def write(self) -> None:
        """Write the list and the tables; each appears whole or not at all.

        Raises:
            DataError: The disk is full, or the folder cannot be written to.
        """
        self.predictor.write_tables(self.path, self.rows, self.failures)
        failed = [{"id": name, "reason": reason} for name, reason in self.failures.items()]
        content = {**self.predictor.identity, "cases": list(self.rows.values()), "failed": failed}
        write_json(self.path / self.predictor.list_name, content, indent=1)


def input_cases(inputs: str | Sequence[str], *, with_labels: bool = False) -> list[Case]:
    """Find the scans behind files, folders, DICOM trees and lists; labels are left out unless asked for.

    Scans of several inputs that share an id get the name of their input in front.

    Raises:
        DataError: An input does not exist or holds no scan, or the same scan is named twice.
    """
    names = [inputs] if isinstance(inputs, str) else list(inputs)
    if not names:
        raise DataError("--input is empty; name files, folders or lists of scans.")
    found = [(name, case) for name in names for case in read_cases(name, recursive_images_only=not with_labels).cases]
    counts = Counter(case.id for _, case in found)
    cases = [
        case if counts[case.id] == 1 else replace(case, id=f"{Path(name).resolve().name.partition('.')[0]}_{case.id}")
        for name, case in found
    ]
    twice = [name for name, count in Counter(case.id for case in cases).items() if count > 1]
    if twice:
        paths = [case.images[0] for case in cases if case.id == twice[0]]
        raise DataError(f"{paths[0]} and {paths[1]} would both be written as {twice[0]}; give them in separate calls.")
    return cases
