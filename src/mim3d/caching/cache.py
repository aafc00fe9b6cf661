"""A finished cache: preprocessed scans that are read crop by crop without touching their files again.

Its manifest has one row per case in a Parquet file, for mim3d and for any other program. A row names the case and its
files, its patient, the digest of its sources, shape, spacing, affine and intensities, and where it is stored: a folder
below ``cases/``, or ranges of bytes in a file below ``packs/``.
"""

import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, overload

from mim3d.caching import layout
from mim3d.caching.card_checks import check_row
from mim3d.caching.fingerprints import Fingerprint
from mim3d.caching.foreground import Statistics
from mim3d.caching.layout import ByteSource, PackedCase
from mim3d.caching.marks import Marks
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.scan import CachedScan, Card
from mim3d.caching.set_modality import SetRemark
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import atomic_file, read_csv, require_regular
from mim3d.core.left_out import in_words
from mim3d.core.settings import build_settings
from mim3d.core.types import LARGEST_LABEL
from mim3d.datasets.cases import Case, CaseSet, with_ignored
from mim3d.datasets.descriptions import IGNORE
from mim3d.scans.files import available_memory_bytes

#: Rows of a manifest become Python objects of about this many times their size in the file, unpacked.
_GROWTH = 8
#: A scan as an object takes at least this.
_LEAST_ROW_BYTES = 2000

#: What a data set may declare beside its labels, and what was said of it.
_DECLARED = ("ignore_label", "regions", "region_values", "channels", "notes", "label_sets")

#: Columns that only those manifests have which need them.
_RARE = ("fold", "modality", "assumed", "source_spacing_mm", "scanner", "marks")

#: Columns that older caches lack: what is labelled, what reduced levels were clipped to, what each channel is.
_ADDED = {"labelled", "level_windows", "modalities", *_RARE}


@dataclass(frozen=True, eq=False, kw_only=True)
class Cache(Sequence[CachedScan]):
    """The scans of one cache, in the order of the data set.

    Attributes:
        path: The cache folder.
        scans: Scans of the cache that this object shows.
        labels: Label value -> name with background 0; values found where none were declared; empty without labels.
        preprocessing: How the scans were prepared; its ``intensities`` are never ``auto``.
        failed: Scans that could not be used, by ``id``, ``images``, ``label`` and ``reason``.
        ignore_label: Declared value of voxels that nothing is known of; it is none of ``labels``.
        regions: Declared unions of labels, name -> label values, in their order; empty where there are none.
        region_values: Declared label value that each region gives in predictions, or None.
        channels: Declared names of the images of every case; empty where nothing is declared.
        notes: What was said of the data set when it was read.
        label_sets: Folders of the data sets that label maps come from, where it was made of a folder around them.
        remarks: What was said of the set when the cache was made: scans of different kinds, and what was guessed.
    """

    path: str
    scans: tuple[CachedScan, ...]
    labels: dict[int, str]
    preprocessing: Preprocessing
    failed: tuple[Mapping[str, str], ...] = ()
    ignore_label: int | None = None
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    region_values: tuple[int, ...] | None = None
    channels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    label_sets: tuple[str, ...] = ()
    remarks: tuple[SetRemark, ...] = ()

    @overload
    def __getitem__(self, index: int) -> CachedScan: ...
    @overload
    def __getitem__(self, index: slice) -> "Cache": ...
    def __getitem__(self, index: int | slice) -> "CachedScan | Cache":
        """One scan, or a cache of a range of them."""
        return replace(self, scans=self.scans[index]) if isinstance(index, slice) else self.scans[index]

    def __len__(self) -> int:
        return len(self.scans)

    def __iter__(self) -> Iterator[CachedScan]:
        return iter(self.scans)

    @property
    def label_values(self) -> dict[int, str]:
        """Every value that a label map may hold -> name: the labels and the ignored value."""
        return with_ignored(self.labels, self.ignore_label)

    @property
    def cases(self) -> tuple[Case, ...]:
        """The case behind each scan."""
        return tuple(scan.case for scan in self.scans)

    @property
    def digest(self) -> str:
        """SHA-256 of what the scans hold: the same wherever the cache and its sources lie."""
        rows = []
        for scan in self.scans:
            case = scan.case
            fold = () if case.fold is None else (f"fold {case.fold}",)
            rows.append(
                [case.id, scan.digest, case.class_name, case.patient, case.split, *(case.labelled or ()), *fold]
            )
        content: dict[str, Any] = {
            "labels": {str(value): name for value, name in self.labels.items()},
            "scans": sorted(rows),
        }
        # What no other cache has leaves their digests as they were.
        if self.ignore_label is not None:
            content["ignore_label"] = self.ignore_label
        if self.regions:
            content["regions"] = [list(self.regions.items()), self.region_values]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Size of the stored scans on disk."""
        return sum(scan.size_bytes for scan in self.scans)

    @property
    def source_bytes(self) -> int:
        """Size of the files they were made from."""
        return sum(scan.source_bytes for scan in self.scans)

    def fingerprints(self) -> dict[str, str]:
        """Case id -> fingerprint as text, of all scans in the folder; read when asked for.

        Raises:
            DataError: The manifest is missing or damaged.
        """
        table = read_columns(self.path, ["id", "fingerprint"])
        texts = dict(zip(table["id"].to_pylist(), table["fingerprint"].to_pylist(), strict=True))
        for case_id, text in texts.items():
            try:
                Fingerprint.from_text(text)
            except DataError as error:
                path = os.path.join(self.path, layout.MANIFEST)
                raise DataError(f"{path}: the row of case {case_id!r} cannot be used ({error})") from None
        return texts

    def marks(self) -> dict[str, Marks]:
        """Case id -> marks, of all scans in the folder that have them; read when asked for.

        Raises:
            DataError: The manifest is missing or damaged.
        """
        table = read_columns(self.path, ["id", "marks"])
        if "marks" not in table.column_names:
            return {}
        texts = dict(zip(table["id"].to_pylist(), table["marks"].to_pylist(), strict=True))
        try:
            return {case_id: Marks.from_text(text) for case_id, text in texts.items() if text is not None}
        except DataError as error:
            raise DataError(f"{os.path.join(self.path, layout.MANIFEST)} cannot be used ({error})") from None

    def say_remarks(self, *, strict: bool) -> None:
        """Warn of what was remarked of the set when its cache was made, such as scans of different kinds.

        Raises:
            DataError: ``strict``, and the set holds what it should not.
        """
        for remark in self.remarks:
            if strict and remark.refused:
                raise DataError(f"{self.path}: {remark.text} (strict: such a set is refused; its cache is kept)")
            warnings.warn(f"{self.path}: {remark.text}", stacklevel=2)

    def subset(self, cases: Iterable[Case]) -> "Cache":
        """The scans with the ids of ``cases``; ids that are not in the cache (bad scans) are passed over.

        Raises:
            DataError: None of them is in the cache.
        """
        wanted = {case.id for case in cases}
        kept = tuple(scan for scan in self.scans if scan.case.id in wanted)
        if wanted and not kept:
            reasons = [row["reason"] for row in self.failed if row["id"] in wanted]
            if reasons:
                raise DataError(f"{self.path}: none of {len(wanted)} cases asked for can be used: {in_words(reasons)}")
            raise DataError(f"{self.path}: none of the {len(wanted)} cases asked for is in this cache; build it again.")
        return replace(self, scans=kept)


def is_cache(path: str | Path) -> bool:
    """Whether a folder is a mim3d cache, finished or not.

    Raises:
        DataError: It is one whose settings are damaged.
    """
    return _read_settings(path) is not None


def _read_settings(path: str | Path) -> dict[str, Any] | None:
    """The settings of a cache; None where the folder is none."""
    try:
        content = layout.read_json(os.path.join(path, layout.SETTINGS))
    except DataError as error:
        if layout.is_damaged_cache(str(path)):
            raise DataError(f"{error}"[:-1] + ": what is finished is kept.") from error
        return None
    return content if isinstance(content, dict) and content.get("format") == layout.FORMAT else None


def open_cache(path: str | Path) -> Cache:
    """Open a finished cache; no voxel is read.

    Raises:
        DataError: The folder is no cache, or one that is unfinished, damaged, or of another version.
    """
    root = os.path.abspath(path)
    settings = _read_settings(root)
    if settings is None:
        raise DataError(f"{path}: not a mim3d cache; make one with `mim3d cache DATA --out {path}`.")
    if settings.get("version") != layout.VERSION:
        version = shorten(str(settings.get("version")), 30)
        raise DataError(
            f"{path}: a cache of version {version}, but this mim3d reads version {layout.VERSION}; "
            "build it again in a new folder."
        )
    if not os.path.exists(os.path.join(root, layout.MANIFEST)):
        raise DataError(f"{path}: this cache is not finished; run the same `mim3d cache` command again to go on.")
    try:
        preprocessing = build_settings(Preprocessing, settings["preprocessing"], "preprocessing")
    except (KeyError, ConfigError) as error:
        said = shorten(str(error), 200, placeholder=" ...")
        raise DataError(f"{root}: its {layout.SETTINGS} is damaged ({said}); run `mim3d cache` again.") from error
    scans, declared = _read_manifest(root)
    found = sorted({value for scan in scans for value in scan.num_voxels} - {0})
    if found and not declared["labels"]:
        declared["labels"] = {0: "background", **{value: f"label_{value}" for value in found}}
    table = os.path.join(root, layout.FAILED)
    try:
        (_, head), *rows = read_csv(table)
        named = [dict(zip(head, row, strict=True)) for _, row in rows]
        failed = tuple({name: row[name] for name in layout.FAILED_COLUMNS} for row in named)
    except (DataError, ValueError, KeyError) as error:
        raise DataError(f"{table}: missing or damaged ({error!r}); run `mim3d cache` again to rebuild it.") from error
    return Cache(path=root, scans=scans, preprocessing=preprocessing, failed=failed, **declared)


def row_of(case: Case, card: Card, folder: str, source: ByteSource) -> dict[str, Any]:
    """One row of a manifest: a case, its card, and where it is stored."""
    place: dict[str, Any] = {"folder": folder, "pack": None, "members": []}
    if isinstance(source, PackedCase):
        members = [{"name": name, "offset": at, "length": length} for name, (at, length) in source.places.items()]
        place |= {"pack": os.path.basename(source.path), "members": members}
    return {**asdict(case), "images": list(case.images), **card, **place}


def failure_row(case: Case, reason: str) -> dict[str, str]:
    """One row of the table of cases that could not be used."""
    values = (case.id, ";".join(case.images), case.label or "", reason)
    return dict(zip(layout.FAILED_COLUMNS, values, strict=True))


def write_manifest(root: str, rows: Sequence[Mapping[str, Any]], source: CaseSet, remarks: Sequence[SetRemark]) -> None:
    """Write the manifest of a cache, whole or not at all.

    Args:
        root: The cache folder.
        rows: Rows from ``row_of``.
        source: Data set that the cases come from, with what it declares.
        remarks: What is to be said of the set.

    Raises:
        OSError: The disk is full or not writable.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {"labels": json.dumps({str(value): name for value, name in source.labels.items()}), "root": source.root}
    declared = {name: getattr(source, name) for name in _DECLARED if getattr(source, name) not in (None, (), {})}
    if declared:
        about["declared"] = json.dumps(declared)
    if remarks:
        about["remarks"] = json.dumps([asdict(remark) for remark in remarks])
    schema = _schema()
    for name in _RARE:
        if all(row.get(name) is None for row in rows):
            schema = schema.remove(schema.get_field_index(name))
    table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata(about))
    with atomic_file(os.path.join(root, layout.MANIFEST), durable=True, remedy=None) as part:
        pq.write_table(table, part, compression="zstd", write_page_checksum=True)


def _read_manifest(root: str) -> tuple[tuple[CachedScan, ...], dict[str, Any]]:
    """The scans of a cache, and what its data set declares and was said of it, by the attributes of ``Cache``.

    Raises:
        DataError: The manifest is damaged or larger than memory, or a row points outside the cache's folder.
    """
    # Fingerprints and marks make up most of a manifest, and are read when asked for.
    table = read_columns(root, [name for name in _schema().names if name not in ("fingerprint", "marks")])
    path = os.path.join(root, layout.MANIFEST)

    def scan_of(row: Mapping[str, Any]) -> CachedScan:
        try:
            check_row(row)
            part, name = (layout.CASES, row["folder"]) if row["pack"] is None else (layout.PACKS, row["pack"])
            if os.path.basename(name) != name or name in ("", ".", ".."):
                raise ValueError(f"it points at {name!r}, outside the cache's folder, so it was tampered with")
            known: dict[str, Any] = {item.name: row.get(item.name) for item in fields(Case)}
            labelled = known["labelled"]
            known |= {"images": tuple(known["images"]), "labelled": None if labelled is None else tuple(labelled)}
            place = os.path.join(root, part, name)
            if row["pack"] is None:
                return CachedScan.from_card(row, Case(**known), place)
            members = {str(item["name"]): (int(item["offset"]), int(item["length"])) for item in row["members"]}
            return CachedScan.from_card(row, Case(**known), PackedCase(place, members))
        except Exception as error:  # Whatever a row of the wrong kind raises.
            shown = shorten(repr(row.get("id")), 60, placeholder=" ...")
            reason = shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
            raise DataError(
                f"{path}: the row of case {shown} cannot be used ({reason}); run `mim3d cache` again, or take the "
                "cache from its source again."
            ) from error

    try:
        about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        declared: dict[str, Any] = {
            "labels": {int(value): str(name) for value, name in json.loads(about["labels"]).items()}
        }
        more = json.loads(about.get("declared", "{}"))
        # Caches made before the ignored value was told from the labels have it among them.
        among = next((value for value, name in declared["labels"].items() if name.lower() == IGNORE), None)
        ignore_label = more.get("ignore_label", among)
        if ignore_label is not None:
            declared["ignore_label"] = int(ignore_label)
            declared["labels"].pop(among, None)
        if more.get("regions"):
            declared["regions"] = {str(name): tuple(map(int, values)) for name, values in more["regions"].items()}
        if more.get("region_values"):
            declared["region_values"] = tuple(map(int, more["region_values"]))
        declared |= {name: tuple(map(str, more.get(name, ()))) for name in ("channels", "notes", "label_sets")}
        values = [*declared["labels"], *declared.get("region_values", ()), declared.get("ignore_label", 0)]
        values += itertools.chain(*declared.get("regions", {}).values())
        if not all(0 <= value <= LARGEST_LABEL for value in values):
            raise ValueError(f"label values {shorten(str(sorted(values)), 60)}")
        # A few rows at a time: as Python objects they are many times as large.
        scans = tuple(scan_of(row) for rows in table.to_batches(max_chunksize=1024) for row in rows.to_pylist())
        if len({scan.case.id for scan in scans}) < len(scans):
            raise ValueError("two rows have one id")
        remarks = [(row["text"], row["refused"]) for row in json.loads(about.get("remarks", "[]"))]
        declared["remarks"] = tuple(SetRemark(text=str(text), refused=bool(refused)) for text, refused in remarks)
        return scans, declared
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        said = shorten(repr(error), 200, placeholder=" ...")
        raise DataError(f"{path}: damaged ({said}); run `mim3d cache` again.") from error


def read_columns(root: str, columns: Sequence[str]) -> Any:
    """Some columns of a cache's manifest, as a table of pyarrow.

    Raises:
        DataError: The manifest is missing, damaged, or larger than memory.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = os.path.join(root, layout.MANIFEST)
    try:
        require_regular(path)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            needed_bytes = _GROWTH * sum(group.total_byte_size for group in groups)
            # Many equal rows take next to nothing in the file.
            needed_bytes = max(needed_bytes, _LEAST_ROW_BYTES * file.metadata.num_rows)
            if needed_bytes > available_memory_bytes():
                raise DataError(
                    f"{path}: unpacks to more than the memory available (about {needed_bytes / 2**30:.1f} GiB with its "
                    f"{file.metadata.num_rows} rows); open it where there is more."
                )
            # Older caches lack what was added since.
            missing = set(columns) - set(file.schema_arrow.names) - _ADDED
            if missing:
                raise DataError(f"{path}: no column {min(missing)!r}, so it is no manifest of this version of mim3d.")
            # Not in threads: a process that forks must not have some of them waiting for the others.
            return file.read(columns=list(columns), use_threads=False)
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
        "labelled": pa.list_(pa.string()),
        "fold": pa.int64(),
        "modality": pa.string(),
        "images": pa.list_(pa.string()),
        "label": pa.string(),
        "digest": pa.string(),
        "source_digest": pa.string(),
        "source_bytes": pa.int64(),
        "size_bytes": pa.int64(),
        "shape": voxels,
        "spacing_mm": numbers,
        "source_spacing_mm": numbers,
        "assumed": pa.list_(pa.string()),
        "scanner": pa.string(),
        "affine": numbers,
        "num_channels": pa.int64(),
        "dtype": pa.string(),
        "num_levels": pa.int64(),
        "level_windows": pa.list_(pa.struct([("low", pa.float64()), ("high", pa.float64())])),
        "has_label": pa.bool_(),
        "statistics": pa.list_(statistics),
        "stored_intensities": pa.list_(pa.struct([("scale", pa.float64()), ("offset", pa.float64())])),
        "modalities": pa.list_(
            pa.struct([("name", pa.string()), ("by", pa.string()), ("in_hu", pa.bool_()), ("sign", pa.string())])
        ),
        "body_box": voxels,
        "num_voxels": pa.list_(pa.struct([("value", pa.int64()), ("count", pa.int64())])),
        "foreground": pa.string(),
        "fingerprint": pa.string(),
        "marks": pa.string(),
        "folder": pa.string(),
        "pack": pa.string(),
        "members": pa.list_(pa.struct([("name", pa.string()), ("offset", pa.int64()), ("length", pa.int64())])),
    }
    return pa.schema(list(columns.items()))
