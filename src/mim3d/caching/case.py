"""One case into the cache: read, checked, prepared, and written whole or not at all. Runs in a worker process."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from mim3d.caching import layout
from mim3d.caching.cards import Card, card_of
from mim3d.caching.digests import Memo, digest_files, require_unchanged, source_files
from mim3d.caching.foreground import class_counts_of, class_locations_of
from mim3d.caching.preprocessing import Prepared, Preprocessing, prepare
from mim3d.caching.shards import write_array, write_group
from mim3d.caching.stored_voxels import to_stored, write_image
from mim3d.core.errors import DataError
from mim3d.core.files import sync, sync_tree
from mim3d.datasets.cases import Case
from mim3d.scans.grids import split_channel

#: Names of 255 bytes are common, and some encrypting file systems take 143.
_MAX_ID_BYTES = 96


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all cases of a cache share.

    Attributes:
        out: The cache folder.
        preprocessing: Its ``intensities`` are settled.
        labels: Declared label value -> name; empty allows all.
        packed: Case folders that lie in packs already.
    """

    out: str
    preprocessing: Preprocessing
    labels: dict[int, str]
    packed: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one case.

    Attributes:
        id: Of the case.
        folder: Its folder below ``cases/``; None where it could not be used.
        reason: Why it could not be used.
        write_error: Why the cache could not be written: the build cannot go on.
        digests: Memo entries of its source files.
    """

    id: str
    folder: str | None = None
    reason: str | None = None
    write_error: str | None = None
    digests: Memo = field(default_factory=dict)


def build_case(case: Case, recipe: Recipe, memo: Memo) -> Outcome:
    """Bring one case into the cache, or find it there. Never raises: a bad scan must not stop the others."""
    try:
        _require_name(case)
        entries: Memo = {}
        image_digests = [_digest(path, memo, entries) for path in case.images]
        label_digest = None if case.label is None else _digest(case.label, memo, entries)
        key = _key(image_digests, label_digest, recipe)
        folder = f"{_short(case.id)}.{key[:16]}"
        if folder in recipe.packed or os.path.exists(os.path.join(recipe.out, layout.CASES, folder, layout.CARD)):
            return Outcome(id=case.id, folder=folder, digests=entries)
        prepared = prepare(case, recipe.preprocessing, labels=recipe.labels)
        require_unchanged(entries)
    except MemoryError:
        return Outcome(id=case.id, reason=f"{case.images[0]}: larger than the memory left for it.")
    except DataError as error:
        return Outcome(id=case.id, reason=str(error))
    except Exception as error:  # Readers of foreign formats raise anything.
        return Outcome(id=case.id, reason=f"{case.images[0]}: cannot be read ({type(error).__name__}: {error}).")
    card = {
        "digest": key,
        "source_digest": _joined(image_digests),
        "source_bytes": sum(stamp[0] for stamp, _ in entries.values()),
    }
    try:
        _write_case(folder, prepared, card, recipe)
    except OSError as error:
        return Outcome(id=case.id, write_error=error.strerror or str(error), digests=entries)
    except MemoryError:
        return Outcome(id=case.id, reason=f"{case.images[0]}: larger than the memory left for it.")
    except Exception as error:  # Voxels of a kind that nobody foresaw.
        return Outcome(id=case.id, reason=f"{case.images[0]}: cannot be stored ({type(error).__name__}: {error}).")
    return Outcome(id=case.id, folder=folder, digests=entries)


def _require_name(case: Case) -> None:
    """Refuse a name that JSON and Parquet cannot hold: bytes of an older encoding than UTF-8.

    Raises:
        DataError: Names the file.
    """
    for path in (*case.images, *([] if case.label is None else [case.label])):
        try:
            path.encode()
        except UnicodeEncodeError as error:
            told = path.encode(errors="backslashreplace").decode()
            raise DataError(f"{told}: its name is not valid UTF-8; rename the file or folder.") from error


def _digest(address: str, memo: Memo, entries: Memo) -> str:
    """Digest of the files behind an address; channels of one file differ, though the file is read but once."""
    files = source_files(address)
    digest, found = digest_files(files, entries if all(path in entries for path in files) else memo)
    entries.update(found)
    channel = split_channel(address)[1]
    return digest if channel is None else hashlib.sha256(f"{digest}::channel={channel}".encode()).hexdigest()


def _joined(digests: Sequence[str]) -> str:
    """One digest of several channels; that of a single one is its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _short(case_id: str) -> str:
    """An id cut to what every file system takes as part of a name; the key behind it keeps names apart."""
    return case_id.encode()[:_MAX_ID_BYTES].decode(errors="ignore")


def _key(image_digests: list[str], label_digest: str | None, recipe: Recipe) -> str:
    """Digest of everything that decides what is stored of a case: sources, settings, declared values, version."""
    decisive = {
        "version": layout.VERSION,
        "images": image_digests,
        "label": label_digest,
        "preprocessing": asdict(recipe.preprocessing),
        "values": sorted(recipe.labels) if label_digest else [],
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _write_case(folder: str, prepared: Prepared, card: Card, recipe: Recipe) -> None:
    """Write a case aside and rename it into place once all of it is on the disk.

    Raises:
        OSError: The disk is full or not writable; nothing is left behind.
    """
    aside = os.path.join(recipe.out, layout.UNFINISHED)
    os.makedirs(aside, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=aside)
    try:
        settings = recipe.preprocessing
        assert settings.intensities != "auto"
        stored, lines = to_stored(prepared.image, prepared.statistics, settings.intensities, settings.window)
        write_group(scratch, {})
        write_image(os.path.join(scratch, layout.IMAGE), stored, lines, settings.num_levels)
        card |= card_of(prepared, lines, stored.dtype, settings.num_levels) | {"num_voxels": []}
        del stored
        if prepared.label is not None:
            write_array(os.path.join(scratch, layout.LABEL), prepared.label)
            counts = class_counts_of(prepared.label)
            places = class_locations_of(prepared.label, counts)
            np.savez_compressed(os.path.join(scratch, layout.LOCATIONS), rows=places.T.copy())
            totals = enumerate(counts.sum(axis=0).tolist())
            card["num_voxels"] = [{"value": value, "count": count} for value, count in totals if count]
        layout.write_json(os.path.join(scratch, layout.CARD), card)
        sync_tree(scratch)
        os.chmod(scratch, 0o755)
        target = os.path.join(recipe.out, layout.CASES, folder)
        try:
            os.rename(scratch, target)
        except OSError:
            # A worker of a killed build may have finished the same case in the meantime.
            if not os.path.exists(os.path.join(target, layout.CARD)):
                # What stands in the way without a card is left from a case whose removal was cut short.
                layout.remove_case(target)
                os.rename(scratch, target)
        sync(os.path.dirname(target))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
