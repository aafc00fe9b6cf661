"""Tables of features: one row for each scan or region of it, in memory and in the formats that they are kept in."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import ConfigError, DataError, first_line
from mim3d.core.files import atomic_file, read_csv, require_regular, write_csv
from mim3d.core.names import is_entry_name

if TYPE_CHECKING:
    import pyarrow

#: Columns in front of the features, in their order; all but the last are text.
KEYS = ("id", "patient", "region", "image", "volume_ml")

#: Region that stands for the body of the whole scan.
WHOLE_SCAN = "scan"

#: What the embeddings of a case are called in its HDF5 file.
H5_NAME = "y_hat"


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureTable:
    """Features of scans and regions, a row each.

    Attributes:
        keys: The columns :data:`KEYS`, each with a value per row: id, patient, region (``scan`` for the whole), image
            (channels separated by ``;``) and volume_ml.
        columns: Names of the features.
        values: Features (rows, columns) float32; NaN where a region could not be seen.
    """

    keys: Mapping[str, Sequence[Any]]
    columns: tuple[str, ...]
    values: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, name: str) -> Any:
        """A column as an array."""
        if name in KEYS:
            return np.array(self.keys[name])
        return self.values[:, self.columns.index(name)]

    def to_arrow(self) -> "pyarrow.Table":
        """The table of pyarrow."""
        import pyarrow as pa

        arrays = [pa.array(self.keys[name], pa.string()) for name in KEYS[:-1]]
        arrays += [pa.array(self.keys[KEYS[-1]], pa.float64()), *map(pa.array, np.asfortranarray(self.values).T)]
        return pa.table(arrays, names=[*KEYS, *self.columns])

    def to_pandas(self) -> Any:
        """The data frame of pandas, which must be installed.

        Raises:
            ConfigError: It is not.
        """
        if find_spec("pandas") is None:
            raise ConfigError(
                "pandas is not installed; use pip install pandas, or the columns as arrays: table['id'], table.values."
            )
        return self.to_arrow().to_pandas()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table, in the format of the ending of its name.

        Raises:
            ConfigError: The ending is that of no format.
            DataError: The place cannot be written to.
        """
        write_table(self, os.fspath(path), format_of_table(os.fspath(path)))

    def rows(self, places: Sequence[int] | npt.NDArray[Any]) -> "FeatureTable":
        """Some of the rows, in the order of their places."""
        at = np.asarray(places, dtype=np.int64)
        keys = {name: [column[place] for place in at] for name, column in self.keys.items()}
        return replace(self, keys=keys, values=self.values[at])

    @classmethod
    def of_arrow(cls, table: "pyarrow.Table") -> "FeatureTable":
        """The table of pyarrow that :meth:`to_arrow` gives.

        Raises:
            DataError: Columns are missing, or hold something else than numbers.
        """
        missing = [name for name in KEYS if name not in table.column_names]
        if missing:
            raise DataError(f"no column {missing[0]!r}, so that these are no features of mim3d embed.")
        columns = tuple(name for name in table.column_names if name not in KEYS)
        try:
            found = [np.asarray(table[name].to_numpy(), dtype=np.float32) for name in columns]
        except (ValueError, TypeError) as error:
            raise DataError(f"a column holds no numbers ({error})") from error
        values = np.stack(found, axis=1) if found else np.empty((table.num_rows, 0), np.float32)
        return cls(keys={name: table[name].to_pylist() for name in KEYS}, columns=columns, values=values)


def joined(tables: Sequence[FeatureTable]) -> FeatureTable:
    """The rows of several tables of the same columns, one after the other; one table at least."""
    keys = {name: [value for table in tables for value in table.keys[name]] for name in KEYS}
    return replace(tables[0], keys=keys, values=np.concatenate([table.values for table in tables]))


def format_of_table(path: str, asked: str = "auto") -> str:
    """The format of a table: as asked, else by the ending of its name, or what a folder holds.

    Raises:
        ConfigError: The ending is that of no format.
    """
    if asked != "auto":
        return asked
    ending = os.path.splitext(path)[1].lower().lstrip(".")
    if ending in FORMATS:
        return ending
    if os.path.isdir(path) and any(Path(path).glob("*.h5")):
        return "h5"
    raise ConfigError(
        f"{path} ends in none of {', '.join(f'.{name}' for name in FORMATS)}; give it such an ending, or say --format."
    )


def description_of(path: str, form: str) -> Path:
    """The file beside a table that says what its features are, and what was warned of when they were made."""
    return Path(path, "features.json") if form == "h5" else Path(os.path.abspath(f"{path}.json"))


def read_table(path: str, form: str = "auto") -> FeatureTable:
    """The features that a file or folder holds.

    Raises:
        ConfigError: The format is not known, or a package for it is missing.
        DataError: It cannot be read, or holds something else.
    """
    reader = FORMATS[format_of_table(path, form)][0]
    try:
        require_regular(path) if form != "h5" and not os.path.isdir(path) else None
        return reader(path)
    except ConfigError:
        raise
    except DataError as error:
        raise DataError(f"{path}: {error}" if path not in str(error) else str(error)) from error
    except Exception as error:
        said = first_line(error)[:200]
        raise DataError(f"{path}: cannot be read as features ({said}); copy it again, or embed again.") from error


def write_table(table: FeatureTable, path: str, form: str) -> None:
    """Write a table so that each file is there whole or not at all.

    Raises:
        DataError: The place cannot be written to.
    """
    FORMATS[form][1](table, path)


def _read_parquet(path: str) -> FeatureTable:
    import pyarrow.parquet as pq

    return FeatureTable.of_arrow(pq.read_table(path))


def _write_parquet(table: FeatureTable, path: str) -> None:
    import pyarrow.parquet as pq

    with atomic_file(path, durable=True) as part:
        pq.write_table(table.to_arrow(), part)


def _read_csv(path: str) -> FeatureTable:
    (_, head), *rows = read_csv(path) or [(0, [])]
    if missing := [name for name in KEYS if name not in head]:
        raise DataError(f"no column {missing[0]!r}, so that these are no features of mim3d embed.")
    places = {name: head.index(name) for name in KEYS}
    columns = tuple(name for name in head if name not in KEYS)
    at = [head.index(name) for name in columns]
    cells = [[float(row[place] or "nan") for place in at] for _, row in rows]
    keys: dict[str, list[Any]] = {name: [row[place] for _, row in rows] for name, place in places.items()}
    keys[KEYS[-1]] = [float(cell or "nan") for cell in keys[KEYS[-1]]]
    return FeatureTable(
        keys=keys, columns=columns, values=np.array(cells, dtype=np.float32).reshape(len(rows), len(columns))
    )


def _write_csv(table: FeatureTable, path: str) -> None:
    def rows() -> Any:
        for place, values in enumerate(table.values):
            keys = [table.keys[name][place] for name in KEYS]
            # As few digits as give the same number again in single precision.
            yield [*keys, *(None if np.isnan(value) else str(value) for value in values)]

    write_csv(path, [*KEYS, *table.columns], rows())


def _read_npz(path: str) -> FeatureTable:
    with np.load(path, allow_pickle=False) as held:
        keys = {name: held[name].tolist() for name in KEYS}
        return FeatureTable(
            keys=keys, columns=tuple(held["columns"].tolist()), values=held["features"].astype(np.float32)
        )


def _write_npz(table: FeatureTable, path: str) -> None:
    arrays: dict[str, Any] = {name: np.array(table.keys[name]) for name in KEYS}
    arrays |= {"features": table.values, "columns": np.array(table.columns)}
    with atomic_file(path, durable=True) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise ConfigError(
            "HDF5 needs the package h5py, which is not installed; use pip install 'mim3d[h5]', or another format."
        ) from None
    return h5py


def _read_h5(path: str) -> FeatureTable:
    h5py, found = _h5py(), []
    for name in sorted(os.listdir(path)):
        if not name.endswith(".h5"):
            continue
        with h5py.File(os.path.join(path, name), "r") as file:
            values = np.atleast_2d(file[H5_NAME][()].astype(np.float32))
            keys = {key: [_text(each) for each in np.atleast_1d(file[key][()])] for key in KEYS}
            found.append(FeatureTable(keys=keys, columns=tuple(map(_text, file["columns"][()])), values=values))
    if not found:
        raise DataError("no file of features in here")
    return joined(found)


def _text(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value.item()


def _write_h5(table: FeatureTable, path: str) -> None:
    h5py = _h5py()
    places: dict[str, list[int]] = {}
    for place, name in enumerate(table.keys["id"]):
        places.setdefault(name, []).append(place)
    for name, at in places.items():
        if not is_entry_name(name):
            raise DataError(f"the id {name!r} cannot be the name of a file")
        rows = table.rows(at)
        with atomic_file(os.path.join(path, f"{name}.h5")) as part, h5py.File(part, "w") as file:
            # A vector for a scan, a row for each region where there are several.
            file[H5_NAME] = rows.values[0] if len(at) == 1 else rows.values
            file["columns"] = np.array(rows.columns, dtype=h5py.string_dtype())
            for key in KEYS:
                kind = np.float64 if key == KEYS[-1] else h5py.string_dtype()
                file[key] = np.array(rows.keys[key], dtype=kind)


#: Format -> what reads and what writes it. HDF5 is a folder with a file for each scan.
FORMATS: Mapping[str, tuple[Callable[[str], FeatureTable], Callable[[FeatureTable, str], None]]] = {
    "parquet": (_read_parquet, _write_parquet),
    "csv": (_read_csv, _write_csv),
    "npz": (_read_npz, _write_npz),
    "h5": (_read_h5, _write_h5),
}


def require_package(form: str) -> None:
    """Refuse a format whose package is missing.

    Raises:
        ConfigError: The sentence says how to install it.
    """
    if form == "h5":
        _h5py()
