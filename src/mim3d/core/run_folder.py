"""The folder a run leaves behind: settings, metrics, manifest, checkpoints and pictures."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mim3d.core.config import read_yaml, to_mapping, write_yaml
from mim3d.core.errors import ConfigError
from mim3d.core.provenance import environment
from mim3d.core.run_files import (
    finite_or_none,
    is_first_process,
    picture_files,
    read_lines,
    read_manifest,
    require_usable,
    try_lock,
    write_json,
    write_text,
    writing,
)

#: Settings that a resumed run may change, because they change nothing of what is learned.
FREE_ON_RESUME = frozenset(
    {"out", "resume", "max_time", "max_time_s", "num_workers", "read_timeout", "memory_limit", "tracking"}
    | {"strategy", "max_bad_steps", "rank_timeout_s"}
    | {"log_every", "checkpoint_every", "keep_checkpoints", "pictures_every", "patience"}
)

#: Settings whose product is the samples of a step, which are the same however they are dealt out: free together, as
#: long as the product stays.
SPLIT_OF_A_STEP = ("batch_size", "accumulation", "devices", "num_nodes")


@dataclass(frozen=True)
class Run:
    """A run folder that may be written to.

    Attributes:
        path: the folder.
        command: the command that made it.
        writes: whether this is the process that writes; all others of a distributed run keep silent.
    """

    path: Path
    command: str
    writes: bool = True

    @property
    def config_path(self) -> Path:
        """Settings that run the command again."""
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def manifest_path(self) -> Path:
        """What was run, on what, with which inputs and derived quantities."""
        return self.path / "manifest.json"

    @property
    def checkpoints_dir(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def pictures_dir(self) -> Path:
        """Folder of the pictures, one ``.npz`` per step."""
        return self.path / "pictures"

    @property
    def how_to_resume(self) -> str:
        """The command that goes on from the last checkpoint."""
        return f"mim3d {self.command} --config {self.config_path} --out {self.path} --resume true"

    @classmethod
    def create(
        cls,
        out: str | os.PathLike[str],
        *,
        command: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        resume: bool = False,
    ) -> "Run":
        """Make the folder of a new run, or open the one to be resumed; before any other work.

        Args:
            out: the folder.
            command: name of the command.
            settings: every resolved setting of the command (dataclasses are welcome).
            inputs: a digest per input (``data``, ``weights``); a resumed run must see the same.
            resume: go on with the run in ``out``, or start it where there is none yet.
        Raises:
            ConfigError: when ``out`` cannot be written to or is full, holds something else, another run, or
                (with ``resume``) a run of other settings or inputs; every differing setting is named.
        """
        run = cls(Path(out), command, writes=is_first_process())
        if not run.writes:
            return run
        values = json.loads(json.dumps(to_mapping(settings)))
        if run._exists():
            manifest = read_manifest(run.manifest_path)
            run._require_idle()
            if resume:
                run._require_same(manifest, values, inputs)
            elif run._has_results():
                raise ConfigError(
                    f"{run.path} holds a run of mim3d {manifest['command']} already; "
                    "go on with it by --resume true, or choose another --out."
                )
        require_usable(run.path)
        run._write_identity(values, inputs, fresh=not (run._exists() and resume))
        return run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of metrics; what is not finite becomes null, as JSON knows no such number."""
        if self.writes:
            line = {"step": step, **{name: finite_or_none(value) for name, value in values.items()}}
            with writing(self.metrics_path), open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                # A checkpoint that survives a power cut must not be ahead of its metrics.
                os.fsync(file.fileno())

    def cut_metrics(self, step: int) -> None:
        """Drop the lines and pictures that an interrupted session wrote after ``step``."""
        if not self.writes:
            return
        kept = [line for line in read_lines(self.metrics_path) if line["step"] <= step]
        write_text(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
        for later, path in picture_files(self.path).items():
            if later > step:
                path.unlink()

    def save_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Write volumes ``(X, Y, Z)`` by name (``coarse/original``) to ``pictures/step_00000200.npz``."""
        if not self.writes:
            return
        self.pictures_dir.mkdir(exist_ok=True)
        partial = self.pictures_dir / f".step_{step:08d}.partial"
        with writing(self.pictures_dir):
            with open(partial, "wb") as file:
                np.savez_compressed(file, allow_pickle=False, **dict(pictures))
            os.replace(partial, self.pictures_dir / f"step_{step:08d}.npz")

    def note(self, values: Mapping[str, Any]) -> None:
        """Add derived quantities to the manifest; the same names are replaced."""
        if self.writes:
            manifest = read_manifest(self.manifest_path)
            manifest["derived"] = {**manifest.get("derived", {}), **to_mapping(values)}
            write_json(self.manifest_path, manifest)

    def bind_input(self, name: str, digest: str) -> None:
        """Record the digest of an input that became known after the run was made.

        Raises:
            ConfigError: when the run was started with another.
        """
        if self.writes:
            manifest = read_manifest(self.manifest_path)
            self._require_same_input(manifest, name, digest)
            write_json(self.manifest_path, {**manifest, "inputs": {**manifest["inputs"], name: digest}})

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the folder while training, so that no second process trains in it.

        Raises:
            ConfigError: when another process holds it.
        """
        if not self.writes:
            yield
            return
        with open(self.path / ".lock", "a+b") as file:
            if not try_lock(file.fileno()):
                raise ConfigError(self._busy())
            yield

    def _exists(self) -> bool:
        return self.manifest_path.is_file()

    def _has_results(self) -> bool:
        """Whether anything was trained; a cache or a split alone is no result."""
        trained = self.checkpoints_dir.is_dir() and any(self.checkpoints_dir.iterdir())
        return trained or bool(read_lines(self.metrics_path))

    def _require_idle(self) -> None:
        lock = self.path / ".lock"
        if lock.exists():
            with open(lock, "rb") as file:
                if not try_lock(file.fileno()):
                    raise ConfigError(self._busy())

    def _busy(self) -> str:
        return f"{self.path} is in use by another training process; let it end, or choose another --out."

    def _require_same(self, manifest: Mapping[str, Any], values: dict[str, Any], inputs: Mapping[str, str]) -> None:
        if manifest["command"] != self.command:
            raise ConfigError(
                f"{self.path} holds a run of mim3d {manifest['command']}, not of mim3d {self.command}; "
                "choose another --out."
            )
        changed = _differences(manifest["settings"], _dealt_out_as(manifest["settings"], values))
        if changed:
            raise ConfigError(
                f"{self.path} was started with other settings: {'; '.join(changed)}. "
                "Resume with the settings it was started with, or choose another --out."
            )
        for name, digest in inputs.items():
            self._require_same_input(manifest, name, digest)

    def _require_same_input(self, manifest: Mapping[str, Any], name: str, digest: str) -> None:
        if manifest["inputs"].get(name, digest) != digest:
            raise ConfigError(
                f"{self.path} was started with other {name}: its content has changed since. "
                "Restore it, or start a new run with another --out."
            )

    def _write_identity(self, values: dict[str, Any], inputs: Mapping[str, str], *, fresh: bool) -> None:
        if fresh:
            # The manifest comes first: a folder with one is a run, whatever else a kill prevented.
            manifest = {"command": self.command, "settings": values, "inputs": dict(inputs)}
            write_json(self.manifest_path, {**manifest, "seeds": _seeds(values), **_session()})
            write_text(self.metrics_path, "")
        else:
            manifest = read_manifest(self.manifest_path)
            write_json(self.manifest_path, {**manifest, "resumed": [*manifest.get("resumed", []), _session()]})
        self.checkpoints_dir.mkdir(exist_ok=True)
        again = {key: value for key, value in values.items() if key != "resume"}
        write_yaml(self.config_path, {"command": self.command, **again})


@dataclass(frozen=True)
class RunRecord:
    """A run as a report reads it.

    Attributes:
        path: the folder.
        config: settings, with the ``command``.
        metrics: lines in the order of their steps.
        manifest: what ``manifest.json`` holds.
        pictures: file of pictures by step.
    """

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    manifest: dict[str, Any]
    pictures: dict[int, Path]


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Read a run folder, finished or not.

    Raises:
        ConfigError: when it is none, or its files cannot be read.
    """
    run = Run(Path(path), command="", writes=False)
    if not run._exists():
        raise ConfigError(f"{run.path} is no run folder: it has no manifest.json; give the --out of a command.")
    return RunRecord(
        path=run.path,
        config=read_yaml(run.config_path) if run.config_path.is_file() else {},
        metrics=read_lines(run.metrics_path),
        manifest=read_manifest(run.manifest_path),
        pictures=picture_files(run.path),
    )


def _session() -> dict[str, Any]:
    """When a session began, by which command line, with which code and packages, on what."""
    return {"started": datetime.now(UTC).isoformat(timespec="seconds"), **environment()}


def _seeds(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that random numbers begin from."""
    return {name: value for name, value in values.items() if name == "seed" or name.endswith("_seed")}


def _dealt_out_as(before: Mapping[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings of now; with the split of a step of before, if that is of as many samples."""
    sizes = [math.prod(settings.get(name) or 1 for name in SPLIT_OF_A_STEP) for settings in (before, now)]
    if sizes[0] != sizes[1]:
        return now
    return {**now, **{name: before[name] for name in SPLIT_OF_A_STEP if name in before}}


def _differences(before: Any, now: Any, key: str = "") -> list[str]:
    """Settings that are not the same, as ``key was ..., is now ...``."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if key or name not in FREE_ON_RESUME]
        parts = [(name, f"{key}.{name}" if key else name) for name in names]
        return [line for name, full in parts for line in _differences(before.get(name), now.get(name), full)]
    same_path = isinstance(before, str) and isinstance(now, str) and os.path.abspath(before) == os.path.abspath(now)
    return [] if before == now or same_path else [f"{key} was {before!r} and is now {now!r}"]
