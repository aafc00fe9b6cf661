"""What is kept of an embedding: finished scans as they come, and in the end the table with what belongs beside it."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import (
    explained_write,
    lock_file,
    read_json,
    remove_partial,
    sync,
    try_lock,
    write_csv,
    write_json,
)
from mim3d.core.left_out import COLUMNS, Failure, write_tracebacks
from mim3d.core.names import cut
from mim3d.datasets.cases import Case
from mim3d.scans.grids import resolved
from mim3d.workflows.embed.settings import home_of
from mim3d.workflows.predict import TRACEBACKS_NAME
from mim3d.workflows.shared.feature_tables import (
    FeatureTable,
    description_of,
    format_of_table,
    joined,
    read_table,
    write_table,
)
from mim3d.workflows.shared.scan_sources import ScanFiles

#: List of the scans that could not be embedded, beside the table and behind its name: several may lie in a folder.
FAILURES_NAME = "failed.csv"

#: What the description of a table says it is.
KIND = "features"

#: What a table was begun with, in the folder of finished scans.
_BEGUN_NAME = "begun.json"

#: End of the sentence about a disk that fails during the work.
_REMEDY = "what is finished is kept; make room, and run the same command again."


@dataclass(frozen=True, eq=False)
class Finished:
    """A scan that was embedded.

    Attributes:
        about: Its ``id``, ``images`` and ``source``, what its regions come from, and ``warnings``.
        table: Its rows.
    """

    about: Mapping[str, Any]
    table: FeatureTable


@dataclass(eq=False)
class FeatureStore:
    """Features in the making; what is finished survives a kill, and is written as one table in the end.

    Attributes:
        out: Where the table goes; None keeps it in memory alone.
        form: Its format.
        identity: What all features of the table have in common.
        columns: Names of the features.
        finished: Finished scans by id, those of earlier calls too.
        failures: Why scans could not be embedded, by id.
        images: Images of every scan that failed, by id.
        failed_before: Rows of the list of scans that earlier calls could not embed, by id.
    """

    out: str | None
    form: str
    identity: Mapping[str, Any]
    columns: tuple[str, ...]
    finished: dict[str, Finished] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    images: dict[str, tuple[str, ...]] = field(default_factory=dict)
    failed_before: dict[str, dict[str, str]] = field(default_factory=dict)
    _had_failures: bool = False
    _writer: Any = None

    @classmethod
    @contextmanager
    def opened(
        cls, out: str | None, form: str, identity: Mapping[str, Any], columns: tuple[str, ...], *, overwrite: bool
    ) -> "Iterator[FeatureStore]":
        """Hold a table for one process, with what is finished of it.

        Args:
            out: Where the table goes; None keeps it in memory.
            form: Format as asked for.
            identity: What all features of the table have in common.
            columns: Names of the features.
            overwrite: Replace features of another identity.

        Raises:
            ConfigError: The place cannot be written to, another process writes there, or it holds something else.
        """
        if out is None:
            yield cls(None, form, identity, columns)
            return
        store = cls(out, format_of_table(out, form), identity, columns)
        try:
            store._check_place()
            store._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            said = error.strerror or error
            raise ConfigError(f"{out} cannot be written to ({said}); choose another --out.") from error
        with lock_file(store._parts / "lock") as descriptor:
            if not try_lock(descriptor):
                raise ConfigError(f"Another process embeds into {out}; wait for it to end, or choose another --out.")
            if store.form == "h5":
                # Beside a table other processes may write.
                remove_partial(store.home)
            store._resume(overwrite=overwrite)
            try:
                yield store
            finally:
                if store._writer is not None:
                    with suppress(OSError):
                        store._writer.close()

    @property
    def home(self) -> Path:
        """The folder of what lies beside the table."""
        assert self.out is not None
        return home_of(self.out, self.form)

    @property
    def _stem(self) -> str:
        assert self.out is not None
        return KIND if self.form == "h5" else os.path.basename(self.out)

    @property
    def description(self) -> Path:
        """The file that says what the features are."""
        assert self.out is not None
        return description_of(self.out, self.form)

    @property
    def failures_path(self) -> Path:
        """The list of scans that could not be embedded; beside other tables each has its own."""
        return self.home / (FAILURES_NAME if self.form == "h5" else f"{self._stem}.{FAILURES_NAME}")

    @property
    def _parts(self) -> Path:
        return self.home / f"{self._stem}.parts"

    def _check_place(self) -> None:
        out = str(self.out)
        if self.form == "h5" and os.path.exists(out) and not os.path.isdir(out):
            raise ConfigError(f"{out} is a file, but HDF5 files go into a folder; choose another --out.")
        if self.form != "h5" and os.path.isdir(out):
            raise ConfigError(f"{out} is a folder, but the table is a file; choose another --out.")
        self.home.mkdir(parents=True, exist_ok=True)
        if not os.access(self.home, os.W_OK):
            raise ConfigError(f"{out}: its folder cannot be written to; choose another --out.")

    def _resume(self, *, overwrite: bool) -> None:
        """Take up what earlier calls finished.

        Raises:
            ConfigError: It is of other weights or settings, or nothing that mim3d wrote.
        """
        out, begun = str(self.out), self._parts / _BEGUN_NAME
        is_there = (
            bool(list(Path(out).glob("*.h5"))) if self.form == "h5" and os.path.isdir(out) else os.path.exists(out)
        )
        known = next((path for path in (self.description, begun) if path.is_file()), None)
        if known is None and is_there and not overwrite:
            raise ConfigError(f"{out} exists and was not written by mim3d embed; choose another --out.")
        try:
            if known is not None:
                content = read_json(str(known))
                self._check_identity(content, out)
                failed = content.get("failed") or ()
                self.failed_before = {row["id"]: {key: row[key] for key in COLUMNS} for row in failed}
                self._had_failures = bool(failed)
                if known == self.description and is_there:
                    self._take_table(content, read_table(out, self.form))
            if begun.is_file():
                self._check_identity(read_json(str(begun)), out)
                self._take_parts()
        except (ConfigError, DataError, KeyError, TypeError, AttributeError) as error:
            if not overwrite:
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(
                    f"{known}: what is finished cannot be read ({cut(str(error))}); choose another --out, or use "
                    "--overwrite true."
                ) from error
        if overwrite:
            self.finished.clear()
            self.failed_before.clear()
            for part in self._parts.glob("*.arrows"):
                part.unlink()
        write_json(begun, {"identity": dict(self.identity)})

    def _check_identity(self, content: Any, out: str) -> None:
        if not isinstance(content, dict) or not isinstance(content.get("identity"), dict):
            raise ConfigError(f"{out} is beside a description that mim3d did not write; choose another --out.")
        for name, value in self.identity.items():
            if content["identity"].get(name) != value:
                other = content["identity"].get(name)
                what = "other weights" if name == "weights_digest" else f"{name} {cut(json.dumps(other))}"
                raise ConfigError(
                    f"{out} holds features of {what}; choose another --out, or replace them by --overwrite true."
                )

    def _take_table(self, content: Mapping[str, Any], table: FeatureTable) -> None:
        places: dict[str, list[int]] = {}
        for place, name in enumerate(table.keys["id"]):
            places.setdefault(name, []).append(place)
        for about in content["scans"]:
            if about["id"] in places:
                self.finished[about["id"]] = Finished(about, table.rows(places[about["id"]]))

    def _take_parts(self) -> None:
        """Read what sessions that were killed left; the end of such a file may be missing."""
        import pyarrow as pa

        for path in sorted(self._parts.glob("*.arrows")):
            with suppress(pa.ArrowInvalid, OSError, ValueError, StopIteration), pa.ipc.open_stream(path) as stream:
                while True:
                    batch, about = stream.read_next_batch_with_custom_metadata()
                    entry = json.loads(about[b"about"])
                    self.finished[str(entry["id"])] = Finished(entry, FeatureTable.of_arrow(pa.table(batch)))

    def is_finished(self, case: Case, about: Mapping[str, Any]) -> bool:
        """Whether a scan is there as its files are now.

        Args:
            case: The scan.
            about: What :meth:`stamp` says of it.

        Raises:
            ConfigError: Another scan of this name is there.
        """
        found = self.finished.get(case.id)
        if found is None:
            return False
        if resolved(found.about["images"]) != resolved(case.images):
            raise ConfigError(
                f"{self.out} holds another scan of the name {case.id} ({found.about['images'][0]}); choose another "
                "--out."
            )
        return all(found.about.get(key) == about[key] for key in ("source", "regions"))

    def add(self, about: Mapping[str, Any], table: FeatureTable) -> None:
        """Record a scan.

        Raises:
            DataError: The disk is full.
        """
        self.finished[about["id"]] = Finished(about, table)
        if self.out is None:
            return
        import pyarrow as pa

        rows = table.to_arrow()
        # What comes behind a batch that was cut off cannot be read: after a failure the next scan begins a file.
        writer, self._writer = self._writer, None
        with explained_write(self._parts, _REMEDY):
            if writer is None:
                number = 1 + len(list(self._parts.glob("*.arrows")))
                writer = pa.ipc.new_stream(pa.OSFile(str(self._parts / f"{number:06d}.arrows"), "wb"), rows.schema)
            for batch in rows.combine_chunks().to_batches():
                writer.write_batch(batch, custom_metadata={"about": json.dumps(about)})
        self._writer = writer

    def fail(self, case: Case, failure: Failure) -> None:
        """Record why a scan could not be embedded."""
        self.finished.pop(case.id, None)
        self.failures[case.id], self.images[case.id] = failure, case.images

    @property
    def table(self) -> FeatureTable:
        """All finished rows, sorted by the ids of their scans.

        Raises:
            DataError: There is none.
        """
        if not self.finished:
            raise DataError("no scan is finished")
        return joined([self.finished[name].table for name in sorted(self.finished)])

    def conclude(self, about: Mapping[str, Any]) -> None:
        """Write the table and what lies beside it; what was kept of finished scans goes.

        Args:
            about: What the description says besides.

        Raises:
            DataError: The place cannot be written to.
        """
        if self.out is None:
            return
        rows = self._write_failures()
        if self.finished:
            write_table(self.table, self.out, self.form)
        content = {
            "kind": KIND,
            "identity": dict(self.identity),
            **about,
            "num_features": len(self.columns),
            "scans": [dict(self.finished[name].about) for name in sorted(self.finished)],
            "failed": rows,
        }
        write_json(self.description, content, indent=1, remedy=_REMEDY)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        sync(self.home)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _write_failures(self) -> list[dict[str, str]]:
        """Write the list of scans that could not be embedded, those of earlier calls first, and return its rows."""
        now = [
            dict(zip(COLUMNS, (name, ";".join(self.images[name]), "", each.reason), strict=True))
            for name, each in self.failures.items()
        ]
        done = {*self.finished, *self.failures}
        rows = [*(row for name, row in self.failed_before.items() if name not in done), *now]
        if rows:
            write_csv(self.failures_path, COLUMNS, [list(row.values()) for row in rows], remedy=_REMEDY)
        elif self._had_failures:
            self.failures_path.unlink(missing_ok=True)
        tracebacks = {name: each.traceback for name, each in self.failures.items() if each.traceback is not None}
        # Those of scans that stay in the list are kept where there are no others.
        if tracebacks or (self._had_failures and len(rows) == len(now)):
            place = self.failures_path.with_name(self.failures_path.name.replace(FAILURES_NAME, TRACEBACKS_NAME))
            write_tracebacks(place, tracebacks, remedy=_REMEDY)
        return rows


def stamp(case: Case, mask: str | None, regions: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a scan, its mask and its boxes from others, and from themselves after a change.

    Args:
        case: The scan.
        mask: Its label map, or None.
        regions: What its regions come from besides.
    """
    files = ScanFiles.of((*case.images, *([mask] if mask else [])))
    return {
        "id": case.id,
        "images": list(case.images),
        "source": json.loads(json.dumps(files.entry())),
        "regions": dict(regions),
    }
