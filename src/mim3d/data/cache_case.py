"""One case into the cache: read, checked, prepared, and written whole or not at all. Runs in a worker process."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mim3d.data import cache_files as layout
from mim3d.data.case_records import Case
from mim3d.data.digests import Memo, digest_files, require_unchanged, source_files
from mim3d.data.foreground import body_box_of, class_counts_of, class_locations_of, foreground_of
from mim3d.data.preprocessing import Prepared, Preprocessing, prepare
from mim3d.data.store import write_image, write_label
from mim3d.data.stored_intensity import to_stored
from mim3d.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all cases of a cache share; the preprocessing's ``intensities`` are settled."""

    out: str
    preprocessing: Preprocessing
    labels: dict[int, str]


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
        sources, label_sources = [source_files(path) for path in case.images], []
        if case.label is not None:
            label_sources = source_files(case.label)
        image_digests, entries = [], {}
        for files in sources:
            digest, found = digest_files(files, memo)
            image_digests.append(digest)
            entries.update(found)
        label_digest, found = digest_files(label_sources, memo)
        entries.update(found)
        key = _key(image_digests, label_digest if label_sources else None, recipe)
        folder = f"{case.id}.{key[:16]}"
        if os.path.exists(os.path.join(recipe.out, layout.CASES, folder, layout.CARD)):
            return Outcome(id=case.id, folder=folder, digests=entries)
        prepared = prepare(case, recipe.preprocessing, labels=recipe.labels)
        require_unchanged(entries)
    except MemoryError:
        return Outcome(id=case.id, reason=f"{case.images[0]}: larger than the memory left for it.")
    except DataError as error:
        return Outcome(id=case.id, reason=str(error))
    except Exception as error:  # Readers of foreign formats raise anything.
        return Outcome(id=case.id, reason=f"{case.images[0]}: cannot be read ({type(error).__name__}: {error}).")
    source_bytes = sum(stamp[0] for stamp, _ in entries.values())
    try:
        _write_case(folder, prepared, {"digest": key, "source_bytes": source_bytes, "num_voxels": {}}, recipe)
    except OSError as error:
        return Outcome(id=case.id, write_error=error.strerror or str(error), digests=entries)
    return Outcome(id=case.id, folder=folder, digests=entries)


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


def _write_case(folder: str, prepared: Prepared, card: dict[str, Any], recipe: Recipe) -> None:
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
        write_image(os.path.join(scratch, layout.IMAGE), stored, lines, settings.num_levels)
        card |= {"num_levels": settings.num_levels, "stored_intensities": [asdict(line) for line in lines]}
        del stored
        if prepared.label is not None:
            write_label(os.path.join(scratch, layout.LABEL), prepared.label)
            counts = class_counts_of(prepared.label)
            places = class_locations_of(prepared.label, counts)
            np.savez_compressed(os.path.join(scratch, layout.LOCATIONS), rows=places.T.copy())
            card["num_voxels"] = {str(value): int(n) for value, n in enumerate(counts.sum(axis=0)) if n}
        layout.write_json(os.path.join(scratch, layout.CARD), {**card, **_card(prepared)})
        layout.sync_tree(scratch)
        os.chmod(scratch, 0o755)
        target = os.path.join(recipe.out, layout.CASES, folder)
        try:
            os.rename(scratch, target)
        except OSError:
            # A worker of a killed build may have finished the same case in the meantime.
            if not os.path.exists(os.path.join(target, layout.CARD)):
                raise
        layout.sync_folder(os.path.dirname(target))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _card(prepared: Prepared) -> dict[str, Any]:
    foregrounds = [foreground_of(channel) for channel in prepared.image]
    box = body_box_of(np.logical_or.reduce(foregrounds))
    return {
        "num_channels": prepared.image.shape[0],
        "shape": prepared.image.shape[1:],
        "spacing_mm": prepared.spacing_mm,
        "affine": prepared.affine.tolist(),
        "statistics": [asdict(channel) for channel in prepared.statistics],
        "body_box": box,
        "has_label": prepared.label is not None,
    }
