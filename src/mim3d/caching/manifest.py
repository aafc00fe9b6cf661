"""The manifest of a cache: one row per case in a Parquet file, for mim3d and for any other program.

A row names the case and its files, its patient, the digest of its sources, shape, spacing, affine and intensities, and
where it is stored: a folder below ``cases/``, or ranges of bytes in a file below ``packs/``.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from mim3d.caching import layout
from mim3d.caching.foreground import Statistics
from mim3d.caching.layout import ByteSource
from mim3d.caching.packs import PackedCase
from mim3d.caching.scan import CachedScan, Card
from mim3d.core.errors import DataError
from mim3d.core.files import atomic_file
from mim3d.datasets.cases import Case
from mim3d.scans.files import available_memory_bytes

#: Column that is read alone: scans are opened without it.
FINGERPRINT = "fingerprint"

#: Labels annotated in a case; missing in caches made before cases could be annotated in part.
LABELLED = "labelled"

#: Rows become Python objects of about this many times their size in the file, unpacked.
_GROWTH = 8


def row_of(case: Case, card: Card, folder: str, source: ByteSource) -> dict[str, Any]:
    """One row: a case, its card, and where it is stored."""
    place: dict[str, Any] = {"folder": folder, "pack": None, "members": []}
    if isinstance(source, PackedCase):
        place |= {"pack": os.path.basename(source.path), "members": source.members()}
    return {**asdict(case), "images": list(case.images), **card, **place}


def write_manifest(path: str, rows: Sequence[Mapping[str, Any]], labels: Mapping[int, str], root: str) -> None:
    """Write the manifest, whole or not at all.

    Args:
        path: Path of the file.
        rows: Rows from ``row_of``.
        labels: Declared label value -> name.
        root: Data set that the cases come from.

    Raises:
        OSError: The disk is full or not writable.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {"labels": json.dumps({str(value): name for value, name in labels.items()}), "root": root}
    table = pa.Table.from_pylist(list(rows), schema=_schema().with_metadata(about))
    with atomic_file(path, durable=True, remedy=None) as part:
        pq.write_table(table, part, compression="zstd")


def read_manifest(path: str) -> tuple[list[CachedScan], dict[int, str]]:
    """The scans of a cache and its declared labels.

    Raises:
        DataError: The file is damaged or larger than memory, or a row points outside the cache's folder.
    """
    table = _read(path)
    root = os.path.dirname(path)
    try:
        about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        labels = {int(value): str(name) for value, name in json.loads(about["labels"]).items()}
        scans = [
            CachedScan.from_card(row, _case(row), _source(row, root))
            # A few rows at a time: as Python objects they are many times as large.
            for rows in table.to_batches(max_chunksize=1024)
            for row in rows.to_pylist()
        ]
        return scans, labels
    except DataError:
        raise
    except Exception as error:  # Whatever a row of the wrong kind raises.
        raise DataError(f"{path}: damaged ({error!r}); run `mim3d cache` again.") from error


def read_fingerprints(path: str) -> dict[str, str]:
    """Case id -> fingerprint as text.

    Raises:
        DataError: The file is damaged.
    """
    table = _read(path, ["id", FINGERPRINT])
    return dict(zip(table["id"].to_pylist(), table[FINGERPRINT].to_pylist(), strict=True))


def read_ids(path: str) -> set[str]:
    """Ids of the cases in a manifest.

    Raises:
        DataError: The file is damaged.
    """
    return set(_read(path, ["id"])["id"].to_pylist())


def _read(path: str, columns: Sequence[str] | None = None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            needed_bytes = _GROWTH * sum(group.total_byte_size for group in groups)
            if needed_bytes > available_memory_bytes():
                raise DataError(
                    f"{path}: unpacks to more than the memory available (about {needed_bytes / 2**30:.1f} GiB with its "
                    f"{file.metadata.num_rows} rows); open it where there is more."
                )
            present = set(file.schema_arrow.names)
            left_out = {FINGERPRINT} if LABELLED in present else {FINGERPRINT, LABELLED}
            wanted = columns or [name for name in _schema().names if name not in left_out]
            missing = set(wanted) - present
            if missing:
                raise DataError(f"{path}: no column {min(missing)!r}, so it is no manifest of this version of mim3d.")
            # Not in threads: a process that forks must not have some of them waiting for the others.
            return file.read(columns=list(wanted), use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: missing or damaged ({error}); run `mim3d cache` again to rebuild it.") from error


def _schema() -> Any:
    import pyarrow as pa

    numbers = pa.list_(pa.float64())
    voxels = pa.list_(pa.int64())
    statistics = pa.struct([(item.name, pa.float64()) for item in fields(Statistics)])
    columns = {
        "id": pa.string(),
        "patient": pa.string(),
        "class_name": pa.string(),
        "split": pa.string(),
        LABELLED: pa.list_(pa.string()),
        "images": pa.list_(pa.string()),
        "label": pa.string(),
        "digest": pa.string(),
        "source_digest": pa.string(),
        "source_bytes": pa.int64(),
        "size_bytes": pa.int64(),
        "shape": voxels,
        "spacing_mm": numbers,
        "affine": numbers,
        "num_channels": pa.int64(),
        "dtype": pa.string(),
        "num_levels": pa.int64(),
        "has_label": pa.bool_(),
        "statistics": pa.list_(statistics),
        "stored_intensities": pa.list_(pa.struct([("scale", pa.float64()), ("offset", pa.float64())])),
        "body_box": voxels,
        "num_voxels": pa.list_(pa.struct([("value", pa.int64()), ("count", pa.int64())])),
        "foreground": pa.string(),
        FINGERPRINT: pa.string(),
        "folder": pa.string(),
        "pack": pa.string(),
        "members": pa.list_(pa.struct([("name", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])),
    }
    return pa.schema(list(columns.items()))


def _case(row: Mapping[str, Any]) -> Case:
    names = ("id", "label", "class_name", "patient", "split")
    labelled = row.get(LABELLED)
    return Case(
        images=tuple(row["images"]),
        labelled=None if labelled is None else tuple(labelled),
        **{name: row[name] for name in names},
    )


def _source(row: Mapping[str, Any], root: str) -> ByteSource:
    if row["pack"] is None:
        return os.path.join(root, layout.CASES, _inside(row["folder"], root))
    members = {str(item["name"]): (int(item["offset"]), int(item["length"])) for item in row["members"]}
    return PackedCase(os.path.join(root, layout.PACKS, _inside(row["pack"], root)), members)


def _inside(name: str, root: str) -> str:
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise DataError(
            f"{os.path.join(root, layout.MANIFEST)}: points at {name!r}, outside the cache's folder; it was tampered "
            "with, so take the cache from its source again."
        )
    return name
