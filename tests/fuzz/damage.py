"""Ways to damage a source: bits and bytes of any file, and the fields of those formats that have some."""

import contextlib
import copy
import functools
import gzip
import io
import json
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydicom

from tests.fuzz.specimens import Specimen

Rng = np.random.Generator

#: Values that no field should hold, as text.
WORDS = (
    "nan", "inf", "-inf", "-1", "0", "1e9", "1e300", "-1e300", "9223372036854775808", "4294967296", "65536", "1e-300",
    "0.5", "text", "", "None", "true", "0x10", "1 2 3", "LOCAL", "LIST", "../../../etc/passwd", "/etc/passwd", "%d",
    "%s%n", "=1+1", "\x1b[31mred", "\u202egnp.nac", "é" * 40, "9" * 400, "a" * 5000,
)  # fmt: skip

#: The same for JSON.
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1e9, 2**63, 10**30, -(10**30), 1e300, float("nan"), float("inf"), 0.5, "", "text", "-1", "1e9",
    [], {}, [[]], [None], {"a": 1}, [1, 2, 3], ["a"] * 1000, "../../etc/passwd", "/etc/passwd", "a\0b", "\x1b[2J",
    "\ud800", "a" * 5000, [1e300] * 3, [0, 0, 0], [-1, 1, 1], [float("nan")] * 3, ["x", "y", "z"], [10**9] * 3,
)  # fmt: skip

NUMBERS = (
    float("nan"), float("inf"), -float("inf"), -1, 0, 1, 1e9, -1e9, 2**15, 2**31, 2**63, 2**64 - 1, 1e300, 1e-300,
)  # fmt: skip


@dataclass(frozen=True)
class Damaged:
    """A damaged source.

    Attributes:
        files: Relative path -> content; None stands for a named pipe.
        what: The damage in words; empty where there is none.
    """

    files: dict[str, bytes | None]
    what: str


def damaged(specimen: Specimen, rng: Rng) -> Damaged:
    """Damage one file of a source, sometimes twice. One source in twenty-five is left as it is."""
    files: dict[str, bytes | None] = dict(specimen.files)
    if rng.random() < 0.04:
        return Damaged(files, "")
    # Headers are where trouble comes from: a file that is read first is chosen more often than its voxels.
    names = sorted(files)
    weights = np.array([_interest(name, specimen) for name in names])
    what = []
    for _ in range(1 if rng.random() < 0.8 else 2):
        name = str(rng.choice(names, p=weights / weights.sum()))
        content = files.get(name)
        if content is None:
            continue
        if rng.random() < 0.03 and len(names) > 1:
            how = str(rng.choice(["missing", "pipe", "of another file"]))
            if how == "missing":
                del files[name]
            else:
                files[name] = None if how == "pipe" else files[str(rng.choice(names))]
            what.append(f"{name}: {how}")
            continue
        changed, how = _damaged_file(name, content, rng)
        files[name] = changed
        what.append(f"{name}: {how}")
    return Damaged(files, "; ".join(what))


def _interest(name: str, specimen: Specimen) -> float:
    if name == specimen.target or name.endswith((".json", ".parquet", ".hdr")):
        return 4.0
    # Scans that a list names have rows of their own in the table.
    return 0.25 if specimen.kind == "cases" else 1.0


def _damaged_file(name: str, content: bytes, rng: Rng) -> tuple[bytes, str]:
    """Damage of the kind that a file's format allows, or of its bytes."""
    if name.endswith(".gz") and rng.random() < 0.65:
        if rng.random() < 0.04:
            return content + _zeros(), "followed by 256 MiB of zeros in 260 KiB"
        with contextlib.suppress(OSError, EOFError, zlib.error):
            inner, how = _damaged_file(name[:-3], gzip.decompress(content), rng)
            return gzip.compress(inner, 1, mtime=0), f"unpacked, {how}"
    special = next((change for ending, change in _SPECIAL.items() if name.endswith(ending)), None)
    if special is not None and rng.random() < 0.7:
        try:
            return special(content, rng)
        except Exception as error:
            # What pydicom or pyarrow will not write is left to the bytes.
            return _bytes(content, rng)[0], f"bytes, after {type(error).__name__}"
    return _bytes(content, rng)


@functools.cache
def _zeros() -> bytes:
    """A gzip stream that grows a thousandfold."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush()


def _pick(items: Sequence[Any], rng: Rng) -> Any:
    return items[int(rng.integers(len(items)))]


def _place(size: int, rng: Rng) -> int:
    """A byte, more often near the beginning."""
    limit = size if rng.random() < 0.4 else min(size, 600)
    return int(rng.integers(max(1, limit)))


def _bytes(content: bytes, rng: Rng) -> tuple[bytes, str]:
    data = bytearray(content)
    how = str(rng.choice(["cut", "flip", "burst", "swap", "insert", "double", "number", "lose", "whole", "append"]))
    at = _place(len(data), rng)
    length = int(2 ** rng.uniform(0, 8))
    if how == "cut":
        del data[at if rng.random() < 0.7 else max(0, len(data) - length) :]
    elif how == "flip":
        for place in [_place(len(data), rng) for _ in range(int(rng.integers(1, 17)))]:
            if data:
                data[place] ^= 1 << int(rng.integers(8))
    elif how == "burst":
        data[at : at + length] = rng.bytes(len(data[at : at + length]))
    elif how == "swap":
        width = int(_pick((2, 4, 8), rng))
        words = data[at : at + length * width]
        data[at : at + length * width] = b"".join(words[i : i + width][::-1] for i in range(0, len(words), width))
    elif how == "insert":
        data[at:at] = rng.bytes(length)
    elif how == "double":
        data[at:at] = data[at : at + length]
    elif how == "lose":
        del data[at : at + length]
    elif how == "append":
        data += rng.bytes(length)
    elif how == "number":
        packed = _number(rng)
        at -= at % len(packed) if rng.random() < 0.8 else 0
        if rng.random() < 0.15:
            # The length that a gzip stream ends with, the directory that a ZIP or Parquet file ends with.
            at = max(0, len(data) - int(_pick((4, 8, 12, 22), rng)))
        data[at : at + len(packed)] = packed
    else:
        others = (b"", b"\0" * len(data), rng.bytes(len(data) or 1), b"\xff" * 400, b"\n", b"<html>")
        data = bytearray(_pick(others, rng))
    return bytes(data), f"bytes, {how} at {at}"


def _number(rng: Rng) -> bytes:
    value, form = _pick(NUMBERS, rng), str(rng.choice(["h", "i", "q", "f", "d"]))
    order = ">" if rng.random() < 0.3 else "<"
    if form in "fd":
        with np.errstate(over="ignore"):
            return np.array(value).astype(f"{order}f{struct.calcsize(form)}").tobytes()
    bits = 8 * struct.calcsize(form)
    whole = int(value) % 2**bits if np.isfinite(value) else 2 ** (bits - 1)
    return whole.to_bytes(bits // 8, "little" if order == "<" else "big")


def _nifti(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """A hostile value in a field of the header."""
    kind = nibabel.Nifti2Header if content[:4] == b"\x1c\x02\0\0" else nibabel.Nifti1Header
    header = np.frombuffer(content[: kind.sizeof_hdr], dtype=kind.template_dtype)[0].copy()
    fields = (
        "dim pixdim datatype bitpix vox_offset scl_slope scl_inter xyzt_units qform_code sform_code quatern_b "
        "qoffset_x srow_x srow_y srow_z magic sizeof_hdr intent_code"
    ).split()
    field = str(rng.choice(fields if rng.random() < 0.9 else list(header.dtype.names)))
    dtype, value = header.dtype[field].base, _pick(NUMBERS, rng)
    if field == "datatype":
        value = int(_pick((0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 1792, 2048, 2304, 9999), rng))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dtype.kind == "S":
            hostile = np.frombuffer(rng.bytes(dtype.itemsize), dtype=dtype)[0]
        elif dtype.kind in "iu":
            limits = np.iinfo(dtype)
            whole = np.nan_to_num(value, nan=-7, posinf=limits.max, neginf=limits.min)
            hostile = min(max(int(whole), int(limits.min)), int(limits.max))
        else:
            hostile = dtype.type(value)
        if header[field].ndim:
            header[field][int(rng.integers(len(header[field])))] = hostile
        else:
            header[field] = hostile
    return header.tobytes() + content[kind.sizeof_hdr :], f"{field} = {value!r}"


def _text(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """Lines of the text in front of the voxels, or of all of a text file."""
    end = content.find(b"\n\n") + 2
    local = content.find(b"LOCAL\n") + 6
    end = local if local > 5 else end if end > 1 else len(content)
    lines = content[:end].decode("utf-8", "surrogateescape").splitlines(keepends=True)
    at = int(rng.integers(max(1, len(lines))))
    how = str(
        rng.choice(["drop", "double", "swap", "value", "value", "value", "word", "key", "characters", "long", "ends"])
    )
    line = lines[at] if lines else "\n"
    numbers = list(re.finditer(r"[-+\d.]+", line))
    if how == "drop":
        del lines[at : at + 1]
    elif how == "double":
        lines.insert(int(rng.integers(len(lines) + 1)), line)
    elif how == "swap":
        other = int(rng.integers(len(lines)))
        lines[at], lines[other] = lines[other], line
    elif how == "value" and numbers:
        found = _pick(numbers, rng)
        lines[at] = line[: found.start()] + _pick(WORDS, rng) + line[found.end() :]
    elif how in ("value", "word"):
        words = list(re.finditer(r"[^\s=:,;]+", line))
        found = _pick(words, rng) if words else None
        lines[at] = line[: found.start()] + _pick(WORDS, rng) + line[found.end() :] if found else line + "x"
        how = "word"
    elif how == "key":
        lines[at] = f"{_pick(('', 'x', ' ', '#', 'NDims', 'dimension', 'image'), rng)}{line[int(rng.integers(4)) :]}"
    elif how == "characters":
        place = int(rng.integers(len(line) + 1))
        lines[at] = (
            line[:place]
            + _pick(("\0", "\udcff\udcfe", "\t", "\r", "\x1b[2J", '"', "'", ";", ",", "("), rng)
            + line[place:]
        )
    elif how == "long":
        lines[at] = line.rstrip("\n") + " 1" * int(rng.integers(1, 100_000)) + "\n"
    elif how == "ends":
        lines = [each.replace("\n", _pick(("\r\n", "\r", "\n\n", " "), rng)) for each in lines]
    return "".join(lines).encode("utf-8", "surrogateescape") + content[end:], f"line {at + 1}, {how}"


def _json(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """A hostile value, another key, a missing or doubled one anywhere in the tree."""
    if rng.random() < 0.15:
        return _text(content, rng)
    tree = json.loads(content)
    if rng.random() < 0.05:
        depth = int(_pick((50, 2000, 100_000), rng))
        return b'{"labels": ' + b"[" * depth + b"]" * depth + b"}", f"nested {depth} deep"
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(tree)
    node, key = _pick(places, rng) if places else ({}, "")
    how = str(rng.choice(["value", "value", "value", "value", "drop", "rename", "double", "many", "root"]))
    if how == "value" and places:
        value = copy.deepcopy(_pick(VALUES, rng))
        node[key] = value
        how = f"{key!r} = {str(value)[:40]!r}"
    elif how == "drop" and places:
        del node[key]
        how = f"{key!r} dropped"
    elif how == "rename" and isinstance(node, dict):
        node[_pick(("", "image", "labels", "0", "-1", "1e9", "\x1b[2J", "ünï", "a" * 300), rng)] = node.pop(key, None)
    elif how == "double" and isinstance(node, list):
        node.insert(key, copy.deepcopy(node[key]))
    elif how == "many" and places:
        node[key] = [copy.deepcopy(node[key])] * 300
    elif how == "root":
        tree = copy.deepcopy(_pick(VALUES, rng))
    return json.dumps(tree).encode(), f"JSON, {how}"


def _yaml(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """A hostile line, or names for things that grow tenfold each time."""
    if rng.random() < 0.9:
        return _text(content, rng)
    lines = ["a0: &a0 [1, 2]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]
    return content + "\n".join([*lines, "spacing_mm: *a11", "command: *a11"]).encode(), "aliases of aliases"


def _dicom(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """An element of the header taken away, with another value, or of another kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = pydicom.dcmread(io.BytesIO(content))
        part = data.file_meta if rng.random() < 0.15 else data
        tag = _pick(list(part.keys()), rng)
        while part[tag].VR == "SQ" and len(part[tag].value) and rng.random() < 0.9:
            part = _pick(part[tag].value, rng)
            tag = _pick(list(part.keys()), rng)
        element = part[tag]
        how = str(rng.choice(["drop", "value", "value", "value", "many"]))
        if how == "drop":
            del part[tag]
        elif element.VR in ("US", "SS", "UL", "FL", "FD"):
            element._value = int(_pick((0, 1, 2, 3, 7, 8, 12, 15, 16, 17, 32, 64, 4096, 65535), rng))
        elif element.VR in ("OW", "OB"):
            element._value = element.value[: int(rng.integers(len(element.value)))] + rng.bytes(int(rng.integers(9)))
        elif how == "many":
            element._value = [str(element.value)] * int(_pick((2, 7, 4000), rng))
        else:
            word = _pick(WORDS[:-2], rng)
            element._value = _words(element, word, rng)
        made = io.BytesIO()
        # Values are written as they are, however wrong.
        pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
        pydicom.dcmwrite(made, data, enforce_file_format=rng.random() < 0.9)
    return made.getvalue(), f"{element.keyword or tag}, {how}"


class _Raw(str):
    """Text that pydicom writes as a number, unchecked."""

    original_string = ""


def _words(element: Any, word: str, rng: Rng) -> Any:
    """One value, or one of several, replaced by a word."""
    values = list(element.value) if isinstance(element.value, pydicom.multival.MultiValue) else [element.value]
    values = [str(value) for value in values]
    values[int(rng.integers(len(values)))] = word
    return "\\".join(values) if element.VR not in ("DS", "IS") else [_Raw(value) for value in values]


def _parquet(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """A hostile cell, a column too few, or rows too many in a manifest."""
    table = pq.read_table(io.BytesIO(content))
    name = _pick(table.column_names, rng)
    how = str(rng.choice(["cell", "cell", "cell", "cell", "cell", "column", "rows", "metadata"]))
    if how == "column":
        table = table.drop_columns([name])
    elif how == "rows":
        table = pa.concat_tables([table] * int(_pick((2, 500), rng))) if rng.random() < 0.7 else table.slice(0, 0)
    elif how == "metadata":
        table = table.replace_schema_metadata(_pick((None, {"labels": "[]"}, {"labels": '{"x": 1}', "root": "x"}), rng))
    else:
        rows = table.to_pylist()
        row = _pick(rows, rng)
        row[name] = _hostile_cell(row[name], rng)
        how = f"{name} = {str(row[name])[:40]!r}"
        table = pa.Table.from_pylist(rows, schema=table.schema)
    made = io.BytesIO()
    pq.write_table(table, made)
    return made.getvalue(), f"manifest, {how}"


def _hostile_cell(value: Any, rng: Rng) -> Any:
    if rng.random() < 0.1:
        return None
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return int(_pick((-1, 0, 1, 10**9, 2**31, 2**62, -(2**62)), rng))
    if isinstance(value, float):
        return float(_pick((np.nan, np.inf, -np.inf, -1.0, 0.0, 1e300, 1e-300), rng))
    if isinstance(value, str):
        return _pick((*WORDS, "..", ".", "a/b", "float64", "uint8", "cases"), rng)
    if isinstance(value, list):
        return [_hostile_cell(each, rng) if rng.random() < 0.3 else each for each in value][: int(rng.integers(20))]
    if isinstance(value, dict):
        return {key: _hostile_cell(each, rng) if rng.random() < 0.3 else each for key, each in value.items()}
    return value


def _safetensors(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """The length of the header, or the tensors that it declares."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        return _number(rng).ljust(8, b"\0")[:8] + content[8:], "length of the header"
    header, how = _json(content[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :], how


def _png(content: bytes, rng: Rng) -> tuple[bytes, str]:
    """The header of a PNG with a checksum that fits."""
    width, height, *rest = struct.unpack(">II5B", content[16:29])
    fields = [width, height, *rest]
    at = int(rng.integers(len(fields)))
    fields[at] = int(_pick((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 65536), rng)) if at < 2 else int(rng.integers(256))
    header = b"IHDR" + struct.pack(">II5B", *fields)
    checked = header + zlib.crc32(header).to_bytes(4, "big")
    return content[:12] + checked + content[33:], f"IHDR field {at} = {fields[at]}"


_SPECIAL: dict[str, Callable[[bytes, Rng], tuple[bytes, str]]] = {
    ".nii": _nifti, ".hdr": _nifti, ".mha": _text, ".mhd": _text, ".nrrd": _text, ".nhdr": _text, ".csv": _text,
    ".json": _json, ".jsonl": _text, ".yaml": _yaml, ".dcm": _dicom, ".parquet": _parquet, ".png": _png,
    ".safetensors": _safetensors,
}  # fmt: skip


def write(source: Damaged, folder: Path) -> None:
    """Write a damaged source into a folder."""
    for name, content in source.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content)
