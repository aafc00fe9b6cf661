"""The folder a run leaves behind: settings, metrics, manifest, checkpoints and pictures."""

import json
import math
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mim3d.core.errors import ConfigError
from mim3d.core.files import atomic_file, explained_write, load_json, lock_file, try_lock, write_json, write_text
from mim3d.core.left_out import read_left_out
from mim3d.core.own_code import own_code_in
from mim3d.core.progress import say
from mim3d.core.provenance import environment
from mim3d.core.settings import CONFIG_NAME, flat, read_yaml, to_mapping, write_yaml
from mim3d.core.warned import ResultWarning, WarningRow, checked_rows, keep_recorded, merged

#: Settings that a resumed run may change, because they change nothing of what is learned; what scans of a cache hold is
#: compared by itself.
FREE_ON_RESUME = frozenset(
    {"out", "cache", "resume", "max_time", "max_time_s", "num_workers", "read_timeout", "memory_limit", "tracking"}
    | {"strategy", "max_bad_steps", "rank_timeout_s"}
    | {"log_every", "checkpoint_every", "keep_checkpoints", "pictures_every", "patience", "verbose"}
)

#: Settings whose product is the number of samples in a step, which are the same however they are split: a resumed run
#: may change them as long as the product stays.
SPLIT_OF_A_STEP = ("batch_size", "accumulation", "devices", "num_nodes")

#: Settings that name a place whose content a run keeps a digest of: what is resumed may find it at another place.
_OF_CONTENT = ("data", "weights", "train_list", "held_out_list")

#: Settings that say which weights a run begins with, and how they are taken.
OF_WEIGHTS = ("weights", "input_layers", "min_coverage")

#: Settings that are no part of a recipe. Patience, which a resumed run may change, decides which weights are kept.
_NO_RECIPE = (FREE_ON_RESUME - {"patience"}) | {*OF_WEIGHTS, "like", "plan", "devices", "num_nodes"}

#: Settings that change where and how fast a run computes or what it reads again, but not what it learns.
_SAME_LEARNING = ("data", "cache", "compile", "accelerator", "max_epochs", "backbone.recompute", "strict")

#: Most samples, micro-batches or processes of a step that a file is believed.
_MOST = 10**6

#: What spares weights that are there, and means nothing without any.
_SPARING = ("schedule", "task.freeze_encoder", "task.unfreeze_ratio")

#: Settings of a method's decoder, which stood among those of the backbone before they belonged to the method.
DECODER_SETTINGS = ("decoder_dim", "decoder_depth", "decoder_num_heads")

#: File of a run that says what was run, on what, with which inputs and derived quantities.
MANIFEST_NAME = "manifest.json"

#: File of a run that lists the cases it left out, each with the reason.
LEFT_OUT_NAME = "left_out.csv"

#: End of the sentence about a write that failed while a run was training.
GO_ON = "what is there is kept. Free some space, or repair the disk, and go on with --resume true."

#: Entries of a manifest; only those of a run that was noted or resumed have the last two.
_ENTRIES = {"command": str, "settings": dict, "inputs": dict, "derived": dict, "resumed": list}

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
_LAST_STEP = 2**53
_LEAST_FREE_BYTES = 50 * 2**20
#: The readers of a trainer that was killed end a moment after it, and hold its lock until then.
_LOCK_PATIENCE_S = 3.0


def is_first_process() -> bool:
    """Whether no launcher says that this is a further process of a distributed run."""
    ranks = [os.environ.get(name, "0") for name in _RANKS]
    return not any(rank.isdigit() and int(rank) > 0 for rank in ranks)


def how_to_resume(command: str, out: Path) -> str:
    """The command line that goes on with the run in a folder, by the settings that it was started with."""
    config = out / CONFIG_NAME
    own = " --allow_code true" if config.is_file() and own_code_in(read_yaml(config)) else ""
    return f"mim3d {command} --out {shlex.quote(str(out))} --resume true{own}"


@dataclass(frozen=True)
class Run:
    """A run folder that may be written to.

    Attributes:
        path: The folder.
        command: The command that made it.
        writes: Whether this is the process that writes. All others of a distributed run write nothing.
        moved: Where inputs of a run that is resumed are now, until their content is seen to be the same.
    """

    path: Path
    command: str
    writes: bool = True
    moved: dict[str, str] = field(default_factory=dict, kw_only=True)

    @property
    def config_path(self) -> Path:
        """Settings that run the command again."""
        return self.path / CONFIG_NAME

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def manifest_path(self) -> Path:
        """What was run, on what, with which inputs and derived quantities."""
        return self.path / MANIFEST_NAME

    @property
    def checkpoints_dir(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def pictures_dir(self) -> Path:
        """Folder of the pictures, with one ``.npz`` file per step."""
        return self.path / "pictures"

    @property
    def how_to_resume(self) -> str:
        """The command that goes on from the last checkpoint."""
        return how_to_resume(self.command, self.path)

    @classmethod
    def create(
        cls,
        out: str | os.PathLike[str],
        *,
        command: str,
        settings: object,
        inputs: Mapping[str, str],
        resume: bool = False,
    ) -> "Run":
        """Make the folder of a new run, or open the one to be resumed, before any other work.

        Args:
            out: The folder.
            command: Name of the command.
            settings: Every resolved setting of the command: a dataclass, or a mapping by name.
            inputs: A digest per input (``data``, ``weights``). A resumed run must be given the same ones.
            resume: Whether to go on with the run in ``out``. Where there is none yet, it is started.

        Raises:
            ConfigError: The folder cannot be written to, its disk is full, or it holds something else, another run, or
                (with ``resume``) a run of other settings or inputs. Every differing setting is named.
        """
        run = cls(Path(out), command, writes=is_first_process())
        if not run.writes:
            return run
        values = json.loads(json.dumps(to_mapping(settings)))
        exists = run.manifest_path.is_file()
        manifest = read_manifest(run.manifest_path) if exists else {}
        if exists:
            if (run.path / ".lock").exists():
                with lock_file(run.path / ".lock") as descriptor:
                    run._lock(descriptor)
            if resume:
                run.moved.update(_elsewhere(manifest, values))
                # Until their content is seen to be the same, their places are those of before.
                values.update({name: manifest["settings"][name] for name in run.moved})
                run._require_same(manifest, values, inputs)
            # A cache or a split alone is no result.
            elif read_lines(run.metrics_path) or (run.checkpoints_dir.is_dir() and any(run.checkpoints_dir.iterdir())):
                raise ConfigError(
                    f"{run.path} holds a run of mim3d {manifest['command']} already; "
                    "go on with it by --resume true, or choose another --out."
                )
        require_usable(run.path)
        session = {"started": datetime.now(UTC).isoformat(timespec="seconds"), **environment()}
        if exists and resume:
            write_json(run.manifest_path, {**manifest, "resumed": [*manifest.get("resumed", []), session]})
        else:
            # The manifest comes first: a folder with one is a run, whatever else a kill prevented.
            seeds = {name: value for name, value in values.items() if name == "seed" or name.endswith("_seed")}
            identity = {"command": command, "settings": values, "inputs": dict(inputs), "seeds": seeds}
            identity["working_folder"] = os.getcwd()
            write_json(run.manifest_path, {**identity, **session})
            write_text(run.metrics_path, "")
        run.checkpoints_dir.mkdir(exist_ok=True)
        again = {key: value for key, value in values.items() if key != "resume"}
        write_yaml(run.config_path, {"command": command, **again})
        keep_recorded(run.keep_warnings)
        for name in run.moved.keys() & inputs:
            run.bind_input(name, inputs[name])
        return run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of metrics; what is not finite becomes null, as JSON knows no such number."""
        if self.writes:
            numbers = {name: float(value) for name, value in values.items()}
            line = {"step": step, **{name: n if math.isfinite(n) else None for name, n in numbers.items()}}
            with explained_write(self.metrics_path, GO_ON), open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                # A checkpoint that survives a power cut must not be ahead of its metrics.
                os.fsync(file.fileno())

    def cut_metrics(self, step: int) -> None:
        """Drop the lines and pictures that an interrupted session wrote after ``step``."""
        if not self.writes:
            return
        kept = [line for line in read_lines(self.metrics_path) if line["step"] <= step]
        write_text(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept), remedy=GO_ON)
        for later, path in picture_files(self.path).items():
            if later > step:
                path.unlink()

    def save_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Write volumes ``(X, Y, Z)`` by name (``coarse/original``) to ``pictures/step_00000200.npz``."""
        if self.writes:
            with atomic_file(self.pictures_dir / f"step_{step:08d}.npz", remedy=GO_ON) as part:
                np.savez_compressed(part, allow_pickle=False, **dict(pictures))

    def note(self, values: Mapping[str, Any]) -> None:
        """Add derived quantities to the manifest; those of the same names are replaced."""
        if self.writes:
            manifest = read_manifest(self.manifest_path)
            manifest["derived"] = {**manifest.get("derived", {}), **to_mapping(values)}
            write_json(self.manifest_path, manifest, remedy=GO_ON)

    @property
    def warnings(self) -> list[WarningRow]:
        """What has been warned of in this run, in all of its sessions."""
        return warnings_of(self.path)

    def keep_warnings(self, rows: Sequence[WarningRow]) -> None:
        """Add warnings to those in the manifest, each once."""
        if self.writes:
            manifest = read_manifest(self.manifest_path)
            manifest["warnings"] = merged(checked_rows(manifest.get("warnings")), rows)
            write_json(self.manifest_path, manifest, remedy=GO_ON)

    def drop_warnings(self, kind: type[ResultWarning]) -> None:
        """Take warnings of a kind out of the manifest, since they are true no longer."""
        rows = self.warnings
        kept = [row for row in rows if row["kind"] != kind.kind]
        if self.writes and len(kept) < len(rows):
            manifest = read_manifest(self.manifest_path)
            manifest["warnings"] = kept
            write_json(self.manifest_path, manifest, remedy=GO_ON)

    def bind_input(self, name: str, digest: str) -> None:
        """Record the digest of an input that became known after the run was made, and its place if that is another.

        Raises:
            ConfigError: The run was started with another one.
        """
        if self.writes:
            manifest = read_manifest(self.manifest_path)
            self._require_same_input(manifest, name, digest)
            manifest["inputs"] = {**manifest["inputs"], name: digest}
            if name in self.moved:
                say(f"{name}: {self.moved[name]}, with the content of {manifest['settings'][name]} before")
                place = {name: os.path.abspath(self.moved.pop(name))}
                manifest["settings"] = {**manifest["settings"], **place}
                write_yaml(self.config_path, {**read_yaml(self.config_path), **place})
            write_json(self.manifest_path, manifest, remedy=GO_ON)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the folder while training, so that no second process trains in it.

        Raises:
            ConfigError: Another process holds it.
        """
        if not self.writes:
            yield
            return
        with lock_file(self.path / ".lock") as descriptor:
            self._lock(descriptor)
            yield

    def _lock(self, descriptor: int) -> None:
        if not try_lock(descriptor, _LOCK_PATIENCE_S):
            raise ConfigError(
                f"{self.path} is in use by another training process; let it end, or choose another --out."
            )

    def _require_same(self, manifest: Mapping[str, Any], values: dict[str, Any], inputs: Mapping[str, str]) -> None:
        if manifest["command"] != self.command:
            raise ConfigError(
                f"{self.path} holds a run of mim3d {manifest['command']}, not of mim3d {self.command}; "
                "choose another --out."
            )
        before = _with_decoder_of_method(manifest["settings"])
        sizes = [math.prod(settings.get(name) or 1 for name in SPLIT_OF_A_STEP) for settings in (before, values)]
        if sizes[0] == sizes[1]:
            values = {**values, **{name: before[name] for name in SPLIT_OF_A_STEP if name in before}}
        changed = _differences(before, values, manifest.get("working_folder") or "")
        if changed:
            raise ConfigError(
                f"{self.path} was started with other settings: {'; '.join(changed)}. To go on with those it was "
                f"started with, leave these out: {self.how_to_resume}. For a new run, choose another --out."
            )
        for name, digest in inputs.items():
            self._require_same_input(manifest, name, digest)

    def _require_same_input(self, manifest: Mapping[str, Any], name: str, digest: str) -> None:
        if manifest["inputs"].get(name, digest) != digest:
            raise ConfigError(
                f"{self.path} was started with other {name}: its content has changed since. "
                "Restore it, or start a new run with another --out."
            )


def _elsewhere(manifest: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Inputs of a run whose content it keeps a digest of, and that are given at another place than before."""
    folder = manifest.get("working_folder") or ""
    places = {
        name: (manifest["settings"].get(name), now.get(name)) for name in _OF_CONTENT if name in manifest["inputs"]
    }
    return {
        name: there
        for name, (here, there) in places.items()
        if isinstance(here, str) and isinstance(there, str) and _differences(here, there, folder)
    }


def _with_decoder_of_method(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of any age as they are written today: those of the decoder with the method, not with the backbone."""
    backbone, method = settings.get("backbone"), settings.get("method")
    if not isinstance(backbone, dict):
        return settings
    decoder = {key: backbone[key] for key in DECODER_SETTINGS if key in backbone}
    today = {**settings, "backbone": {key: value for key, value in backbone.items() if key not in decoder}}
    if isinstance(method, dict):
        today["method"] = {key: decoder.get(key) if value is None else value for key, value in method.items()}
    return today


def _differences(before: Any, now: Any, folder: str, key: str = "") -> list[str]:
    """Settings that are not the same, as ``key was ... and is now ...``; paths of before begin in ``folder``."""
    if isinstance(before, dict) or isinstance(now, dict):
        before, now = (
            {} if value is None else value if isinstance(value, dict) else {"name": value} for value in (before, now)
        )
        # Settings of a backbone, method or task that the run's version had not yet are as they were without them.
        every = before if key and before else {**before, **now}
        names = [name for name in every if key or name not in FREE_ON_RESUME]
        parts = [(name, f"{key}.{name}" if key else name) for name in names]
        return [line for name, full in parts for line in _differences(before.get(name), now.get(name), folder, full)]
    is_text = isinstance(before, str) and isinstance(now, str)
    same_path = is_text and os.path.abspath(os.path.join(folder, before)) == os.path.abspath(now)
    return [] if before == now or same_path else [f"{key} was {before!r} and is now {now!r}"]


@dataclass(frozen=True)
class RunRecord:
    """A run as a report reads it.

    Attributes:
        path: The folder.
        config: Settings, with the ``command``.
        metrics: Lines in the order of their steps.
        manifest: Content of ``manifest.json``.
        pictures: File of pictures of each step.
        left_out: Rows of the lists of cases that it left out, those of its probe last.
        last_checkpoint: Step of its last checkpoint, 0 where it has none.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    manifest: dict[str, Any]
    pictures: dict[int, Path]
    left_out: list[dict[str, str]] = field(default_factory=list)
    last_checkpoint: int = 0


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Read a run folder, finished or not.

    Raises:
        ConfigError: The folder holds no run, or its files cannot be read.
    """
    run = Run(Path(path), command="", writes=False)
    if not run.manifest_path.is_file():
        raise ConfigError(f"{run.path} is no run folder: it has no manifest.json; give the --out of a command.")
    kept = " ".join(file.name for file in run.checkpoints_dir.glob("step_*.pt"))
    return RunRecord(
        path=run.path,
        config=read_yaml(run.config_path) if run.config_path.is_file() else {},
        metrics=read_lines(run.metrics_path),
        manifest=read_manifest(run.manifest_path),
        pictures=picture_files(run.path),
        left_out=[*read_left_out(run.path / LEFT_OUT_NAME), *read_left_out(run.path / "probe" / LEFT_OUT_NAME)],
        last_checkpoint=max(map(int, re.findall(r"\bstep_(\d{8})\.pt\b", kept)), default=0),
    )


def recipe_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run's recipe, with the intensities that it used and all samples of a step on one device.

    Args:
        manifest: Manifest of a run of fine-tuning.
    """
    settings, derived = manifest["settings"], manifest.get("derived", {})
    recipe = {name: value for name, value in settings.items() if name not in _NO_RECIPE}
    plan = derived.get("plan")
    recipe["intensity"] = (
        settings.get("intensity")
        or derived.get("intensity")
        or (plan.get("intensity") if isinstance(plan, Mapping) else None)
    )
    recipe["accumulation"] = math.prod(_count(settings.get(name)) for name in ("accumulation", "devices", "num_nodes"))
    return {**recipe, "schedule": settings.get("schedule") or "default"}


def noted_intensity(path: Path, manifest: Mapping[str, Any]) -> Any:
    """The mapping of intensities that a run noted, in its manifest or, as earlier versions did, in a card alone.

    Args:
        path: Folder of the run.
        manifest: Its manifest.
    """
    noted = manifest.get("derived", {}).get("intensity")
    for card in () if noted else sorted(path.glob("*/card.json")):
        with suppress(OSError, ValueError, AttributeError):
            noted = noted or load_json(card).get("intensity")
    return noted


def recipe_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings by which two runs differ in more than weights, each with the value of both.

    A schedule belongs to the weights that it spares: where one run has none, it is no difference.

    Args:
        one: Manifest of a run of fine-tuning.
        other: That of another.
    """
    compared = [flat(recipe_of(manifest)) for manifest in (one, other)]
    for manifest, recipe in zip((one, other), compared, strict=True):
        steps = manifest.get("derived", {}).get("max_steps")
        recipe["max_steps"] = steps or recipe.get("max_steps")
        recipe["samples in a step"] = _count(recipe.pop("batch_size", None)) * recipe.pop("accumulation")
        if recipe.get("intensity", recipe) is None:
            # Not known of a run that was stopped before it began.
            recipe.pop("intensity")
    spared = all(manifest["settings"].get("weights") for manifest in (one, other))
    skipped = {*_SAME_LEARNING, *(() if spared else _SPARING)}
    first, second = compared
    known = [any(key.startswith("intensity.") for key in recipe) for recipe in compared]
    names = [key for key in {**first, **second} if key not in skipped]
    names = [key for key in names if all(known) or not key.startswith("intensity.")]
    return {key: (first.get(key), second.get(key)) for key in names if first.get(key) != second.get(key)}


def _count(value: Any) -> int:
    """A number of samples, micro-batches or processes; 1 where a file holds something else."""
    return value if isinstance(value, int) and 1 <= value <= _MOST else 1


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a run.

    Raises:
        ConfigError: The file cannot be read, or was written by something else.
    """
    content: Any = None
    with suppress(OSError, ValueError):
        content = load_json(path)
    filled = {"resumed": [], "derived": {}, **content} if isinstance(content, dict) else {}
    if not all(isinstance(filled.get(name), kind) for name, kind in _ENTRIES.items()):
        raise ConfigError(f"{path} is no manifest of a run of mim3d; choose another folder.")
    return dict(content)


def warnings_of(path: Path) -> list[WarningRow]:
    """What has been warned of in the run in a folder; nothing where there is none."""
    manifest = path / MANIFEST_NAME
    return checked_rows(read_manifest(manifest).get("warnings")) if manifest.is_file() else []


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a metrics file up to the first that is none: a kill may have cut the last one short."""
    lines: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(values, dict) or type(step := values.get("step")) is not int or not 0 <= step <= _LAST_STEP:
            break
        lines.append(values)
    return lines


def picture_files(path: Path) -> dict[int, Path]:
    """Find the picture files of a run folder, by step and in the order of the steps."""
    matches = [(re.fullmatch(r"step_(\d{8})\.npz", file.name), file) for file in (path / "pictures").glob("step_*.npz")]
    return dict(sorted((int(match[1]), file) for match, file in matches if match and file.is_file()))


def holds_all_folds(path: Path) -> bool:
    """Whether a folder is that of ``mim3d finetune --fold all``, whose runs lie in folders below it."""
    with suppress(ConfigError):
        return (path / CONFIG_NAME).is_file() and read_yaml(path / CONFIG_NAME).get("fold") == "all"
    return False


def require_usable(path: Path) -> None:
    """Make the folder ``path`` and prove that it can be written to.

    Raises:
        ConfigError: It is a file, holds something else than a run, cannot be written to, or its disk is full.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; choose a folder as --out.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A kill while a run was being made leaves at most hidden files.
        visible = any(not entry.name.startswith(".") for entry in path.iterdir())
        foreign = visible and not (path / MANIFEST_NAME).is_file()
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe"):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written to ({error.strerror}); choose another --out.") from error
    if foreign and holds_all_folds(path):
        raise ConfigError(
            f"{path} holds the runs of all folds, each in a folder of its own; go on with all of them by "
            f"{how_to_resume('finetune', path)}, or choose another --out."
        )
    if foreign:
        raise ConfigError(f"{path} is not empty and holds no run; choose another --out, or an empty folder.")
    free = shutil.disk_usage(path).free
    if free < _LEAST_FREE_BYTES:
        raise ConfigError(
            f"{path} has {free / 2**20:.0f} MiB of free space, less than the "
            f"{_LEAST_FREE_BYTES / 2**20:.0f} MiB that any run needs; free some, or choose another --out."
        )
