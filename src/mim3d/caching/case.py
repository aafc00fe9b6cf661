"""Builds one case of a cache, whole or not at all. Runs in a worker process.

A case is known by the SHA-256 of its source files and of the settings. Files are hashed once: a memo holds what was
known of each file of the same size, times and inode.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np

from mim3d.caching import layout
from mim3d.caching.card_checks import check_card
from mim3d.caching.foreground import class_counts_of, class_locations_of
from mim3d.caching.preprocessing import Prepared, Preprocessing, prepare
from mim3d.caching.scan import Card, card_of
from mim3d.caching.set_modality import in_hu
from mim3d.caching.shards import write_array, write_group
from mim3d.caching.stored_voxels import Shown, level_windows, to_stored, write_image
from mim3d.core.errors import DataError
from mim3d.core.files import load_json, sync, sync_tree
from mim3d.core.left_out import Failure
from mim3d.datasets.cases import Case
from mim3d.scans.files import check_file
from mim3d.scans.grids import split_channel, split_series
from mim3d.scans.image_stacks import is_slice_folder, slice_paths
from mim3d.scans.modality import DARKEST_CT_HU
from mim3d.scans.volumes import files_of, scanner_of

#: What distinguishes a file from a later one under the same path: size, mtime, ctime (ns) and inode.
Stamp = tuple[int, int, int, int]

#: Path -> stamp and SHA-256 of the file as it was then.
DigestMemo = dict[str, tuple[Stamp, str]]

#: Names of 255 bytes are common, and some encrypting file systems take 143.
_MAX_ID_BYTES = 96

#: Channels of a case up to which every form of it is looked for before it is made again.
_MAX_LOOKED_UP = 4


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """What all cases of a cache share.

    Attributes:
        out: The cache folder.
        preprocessing: How to prepare and store the cases; its ``intensities`` are settled.
        labels: Declared label value -> name; empty allows all.
        packed: Case folders that lie in packs already.
        known: Digests of source files known from earlier runs.
        set_in_hu: For each channel whether the set is CT, which decides where a scan shows nothing; None before that
            is known, when any finished form of a case will do.
    """

    out: str
    preprocessing: Preprocessing
    labels: dict[int, str]
    packed: frozenset[str] = frozenset()
    known: DigestMemo = field(default_factory=dict)
    set_in_hu: tuple[bool, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """What became of one case.

    Attributes:
        id: Id of the case.
        folder: Its folder below ``cases/``; None where it could not be used.
        failure: Why it could not be used.
        write_error: Why the cache could not be written; the build cannot go on then.
        digests: Memo entries of its source files.
        assumed: What its first image leaves open, with what is assumed, where it was read now.
    """

    id: str
    folder: str | None = None
    failure: Failure | None = None
    write_error: str | None = None
    digests: DigestMemo = field(default_factory=dict)
    assumed: tuple[str, ...] = ()


def build_case(case: Case, settings: BuildSettings) -> CaseResult:
    """Bring one case into the cache, or find it there. Never raises: a bad scan must not stop the others."""
    name, result, is_stored = case.images[0], partial(CaseResult, id=case.id), False
    entries: DigestMemo = {}
    try:
        source = _source_card(case, settings, entries)
        for overruled in _possible(len(case.images)) if settings.set_in_hu is None else ():
            folder = _folder_name(case, _digested(source, overruled))
            if folder in settings.packed or _is_finished(os.path.join(settings.out, layout.CASES, folder)):
                return result(folder=folder, digests=entries)
        prepared = prepare(
            case,
            settings.preprocessing,
            labels=settings.labels,
            set_in_hu=settings.set_in_hu or (),
            with_marks=True,
        )
        require_unchanged(entries)
        is_stored = True
        card = _digested(source, _overruled(prepared))
        if scanner := scanner_of(name):
            card["scanner"] = scanner
        folder = _folder_name(case, card)
        _write_case(folder, prepared, card, settings)
    except Exception as error:  # Readers of foreign formats raise anything, and voxels may be of an unforeseen kind.
        if is_stored and isinstance(error, OSError):
            return result(write_error=error.strerror or str(error), digests=entries)
        return result(failure=Failure.of(error, name))
    return result(folder=folder, digests=entries, assumed=prepared.grid.assumed)


def _is_finished(path: str) -> bool:
    """Whether a finished case lies in a folder; one with a damaged card goes, to be made again."""
    card = os.path.join(path, layout.CARD)
    if not os.path.exists(card):
        return False
    try:
        check_card(load_json(card))
    except (OSError, ValueError, RecursionError):
        layout.remove_case(path)
        return False
    return True


def _folder_name(case: Case, card: Card) -> str:
    # An id is cut to what every file system takes as part of a name; the digest behind it keeps names apart.
    return f"{case.id.encode()[:_MAX_ID_BYTES].decode(errors='ignore')}.{card['digest'][:16]}"


def _overruled(prepared: Prepared) -> tuple[int, ...]:
    """Channels that are not what their darkest voxel alone would make of them, CT or not, as in earlier versions."""
    channels = enumerate(zip(prepared.modalities, prepared.statistics, strict=True))
    return tuple(place for place, (found, stats) in channels if found.in_hu != (stats.minimum < DARKEST_CT_HU))


def _possible(num_channels: int) -> Iterator[tuple[int, ...]]:
    """What ``_overruled`` may be, the usual first; of many channels only that."""
    numbers = range(num_channels + 1 if num_channels <= _MAX_LOOKED_UP else 1)
    return itertools.chain.from_iterable(itertools.combinations(range(num_channels), number) for number in numbers)


def _digested(source: Card, overruled: tuple[int, ...]) -> Card:
    """The card of a case's source files with the digest of what is stored of them."""
    # What is usual has the digest that it always had.
    content = source["decisive"] | ({"overruled": overruled} if overruled else {})
    kept = {name: value for name, value in source.items() if name != "decisive"}
    return {"digest": _sha256(json.dumps(content, sort_keys=True)), **kept}


def _source_card(case: Case, settings: BuildSettings, entries: DigestMemo) -> Card:
    """The card of a case as far as its source files decide it; their memo entries are added to ``entries``.

    It holds as ``decisive`` what its digest is made of, see ``_digested``.
    """
    addresses = [*case.images, *([] if case.label is None else [case.label])]
    for address in addresses:
        try:
            # JSON and Parquet hold UTF-8 alone.
            address.encode()
        except UnicodeEncodeError as error:
            readable = address.encode(errors="backslashreplace").decode()
            raise DataError(f"{readable}: its name is not valid UTF-8; rename the file or folder.") from error
    digests = []
    for address in addresses:
        files = source_files(address)
        # Channels of one file have digests of their own, though the file is read but once.
        digest, found = digest_files(files, entries if all(path in entries for path in files) else settings.known)
        entries.update(found)
        digests.append(_channel_digest(address, digest))
    images, labels = digests[: len(case.images)], digests[len(case.images) :]
    decisive = {
        "version": layout.VERSION,
        "images": images,
        "label": labels[0] if labels else None,
        "preprocessing": asdict(settings.preprocessing),
        "values": sorted(settings.labels) if labels else [],
    }
    return {
        "decisive": decisive,
        "source_digest": _joined_digest(images),
        "source_bytes": sum(stamp[0] for stamp, _ in entries.values()),
    }


def content_digest(images: Sequence[str]) -> str:
    """SHA-256 of what the images of a case hold, as the manifest has it.

    Raises:
        DataError: A file or series is missing.
        OSError: A file cannot be read.
    """
    digests = {address: digest_files(source_files(address), {})[0] for address in images}
    return _joined_digest([_channel_digest(address, digest) for address, digest in digests.items()])


def _channel_digest(address: str, digest: str) -> str:
    channel = split_channel(address)[1]
    return digest if channel is None else _sha256(f"{digest}::channel={channel}")


def _joined_digest(digests: Sequence[str]) -> str:
    # That of a single channel is its own.
    return digests[0] if len(digests) == 1 else _sha256("".join(digests))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_case(folder: str, prepared: Prepared, card: Card, settings: BuildSettings) -> None:
    """Write a case aside and rename it into place once all of it is on the disk; a failure leaves nothing behind."""
    aside = os.path.join(settings.out, layout.UNFINISHED)
    os.makedirs(aside, exist_ok=True)
    scratch = tempfile.mkdtemp(dir=aside)
    try:
        preprocessing = settings.preprocessing
        assert preprocessing.intensities != "auto"
        is_ct = in_hu(prepared.modalities)
        stored, meanings = to_stored(
            prepared.image, prepared.statistics, preprocessing.intensities, preprocessing.window, is_ct
        )
        write_group(scratch, {})
        windows = level_windows(prepared.statistics, preprocessing.window, is_ct)
        shown = [
            Shown.within(window, meaning, stats, stored.dtype)
            for window, meaning, stats in zip(windows, meanings, prepared.statistics, strict=True)
        ]
        write_image(os.path.join(scratch, layout.IMAGE), stored, meanings, preprocessing.num_levels, shown)
        card |= card_of(prepared, meanings, stored.dtype, preprocessing.num_levels, windows) | {"num_voxels": []}
        if prepared.grid.assumed:
            card["assumed"] = list(prepared.grid.assumed)
        if preprocessing.spacing_mm is not None:
            card["source_spacing_mm"] = [float(mm) for mm in prepared.grid.spacing_mm]
        del stored
        if prepared.label is not None:
            write_array(os.path.join(scratch, layout.LABEL), prepared.label)
            counts = class_counts_of(prepared.label)
            places = class_locations_of(prepared.label, counts)
            np.savez_compressed(os.path.join(scratch, layout.LOCATIONS), rows=places.T.copy())
            totals = enumerate(counts.sum(axis=0).tolist())
            card["num_voxels"] = [{"value": value, "count": count} for value, count in totals if count]
        try:
            # A cache with a card that cannot be is refused as a whole.
            text = layout.json_text(card)
            check_card(json.loads(text))
        except ValueError as error:
            raise DataError(f"{prepared.grid.path}: a cache cannot hold it ({error}); leave it out.") from error
        with open(os.path.join(scratch, layout.CARD), "w", encoding="utf-8") as file:
            file.write(text)
        sync_tree(scratch)
        os.chmod(scratch, 0o755)
        target = os.path.join(settings.out, layout.CASES, folder)
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


def source_files(path: str) -> list[str]:
    """Every file a scan is read from: itself, the voxels of a detached header, or the slices of a series.

    Raises:
        DataError: A file or series is missing.
    """
    path, _ = split_channel(path)
    _, series = split_series(path)
    if not series and is_slice_folder(path):
        return slice_paths(path)
    if series or os.path.isdir(path):
        from mim3d.scans.dicom.series import open_series

        return sorted({item.path for item in open_series(path).slices})
    check_file(path)
    return files_of(path)


def stamp_of(path: str) -> Stamp:
    """The stamp of a file as it is now."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def digest_files(paths: Iterable[str], memo: DigestMemo) -> tuple[str, DigestMemo]:
    """One SHA-256 over the contents of files, in order; files whose stamp stands in ``memo`` are not read.

    Returns:
        The digest, and the memo entries of these files.
    """
    whole = hashlib.sha256()
    entries: DigestMemo = {}
    for path in paths:
        stamp = stamp_of(path)
        known = memo.get(path)
        if known is None or known[0] != stamp:
            with open(path, "rb") as file:
                known = (stamp, hashlib.file_digest(file, "sha256").hexdigest())
        entries[path] = known
        whole.update(known[1].encode())
    return whole.hexdigest(), entries


def require_unchanged(entries: DigestMemo) -> None:
    """Refuse files that changed since their digest was taken.

    Raises:
        DataError: A file changed; the sentence names it.
    """
    for path, (stamp, _) in entries.items():
        if stamp_of(path) != stamp:
            raise DataError(f"{path}: changed while it was being read; run again once it is complete.")
