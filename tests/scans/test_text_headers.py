"""NRRD and MetaImage: headers as they come, voxels in any encoding, and what a stranger's header may not do."""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from mim3d.core.errors import DataError
from mim3d.scans.itk import itk_files
from mim3d.scans.volumes import read_grid, read_volume

VOXELS = np.arange(24, dtype="<i2").reshape((4, 3, 2), order="F")
RAW = VOXELS.tobytes(order="F")
PACKED = zlib.compress(RAW)


def meta(path: Path, data: bytes = RAW, file: str = "LOCAL", **fields: str | None) -> Path:
    told = {
        "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
        "ElementSpacing": "1 2 3", "DimSize": "4 3 2", "ElementType": "MET_SHORT",
    } | fields  # fmt: skip
    text = "".join(f"{name} = {value}\n" for name, value in told.items() if value is not None)
    path.write_bytes(text.encode() + f"ElementDataFile = {file}\n".encode() + data)
    return path


def nrrd(path: Path, data: bytes = RAW, end: str = "", **fields: str | None) -> Path:
    told = {
        "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "4 3 2",
        "space directions": "(1,0,0) (0,2,0) (0,0,3)", "endian": "little", "encoding": "raw",
        "space origin": "(1,2,3)",
    } | {name.replace("_", " "): value for name, value in fields.items()}  # fmt: skip
    text = "".join(f"{name}: {value}\n" for name, value in told.items() if value is not None)
    path.write_bytes(b"NRRD0004\n" + text.encode() + end.encode() + b"\n" + data)
    return path


def stored(path: Path) -> np.ndarray:
    volume = read_volume(path)
    return volume.grid.from_ras(volume.array)


def text(separator: bytes = b" ") -> bytes:
    return separator.join(b"%d" % value for value in range(24))


#: Headers and voxels that are read: name -> how it is made. Its voxels are always the same.
GOOD_FILES = {
    "big.mha": lambda path: meta(path, VOXELS.astype(">i2").tobytes(order="F"), BinaryDataByteOrderMSB="True"),
    "packed.mha": lambda path: meta(path, PACKED, CompressedData="True", CompressedDataSize=str(len(PACKED))),
    "packed_without_size.mha": lambda path: meta(path, PACKED, CompressedData="True"),
    "packed_wrong_size.mha": lambda path: meta(path, PACKED, CompressedData="True", CompressedDataSize="10"),
    "text.mha": lambda path: meta(path, text(), BinaryData="False"),
    "behind.mha": lambda path: meta(path, b"remark" + RAW, HeaderSize="-1"),
    "big.nrrd": lambda path: nrrd(path, VOXELS.astype(">i2").tobytes(order="F"), endian="big"),
    "gzip.nrrd": lambda path: nrrd(path, gzip.compress(RAW), encoding="gzip"),
    "two_streams.nrrd": lambda path: nrrd(path, gzip.compress(RAW[:9]) + gzip.compress(RAW[9:]), encoding="gz"),
    "skipped.nrrd": lambda path: nrrd(path, b"one\ntwo\nabcd" + RAW, line_skip="2", byte_skip="4"),
    "last.nrrd": lambda path: nrrd(path, b"abcd" + RAW, byte_skip="-1"),
    "gzip_skipped.nrrd": lambda path: nrrd(path, gzip.compress(b"abcd" + RAW), encoding="gzip", byte_skip="4"),
    "gzip_last.nrrd": lambda path: nrrd(path, gzip.compress(b"abcd" + RAW), encoding="gzip", byte_skip="-1"),
    "text.nrrd": lambda path: nrrd(path, text(), encoding="ascii"),
    "commas.nrrd": lambda path: nrrd(path, text(b",\n"), encoding="txt"),
    "hex.nrrd": lambda path: nrrd(path, RAW.hex("\n").encode(), encoding="hex"),
    "list_axis.nrrd": lambda path: nrrd(path, dimension="4", sizes="1 4 3 2", kinds="list domain domain domain",
        space_directions="none (1,0,0) (0,2,0) (0,0,3)"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD_FILES)
def test_voxels_are_read_in_every_encoding(tmp_path, name):
    GOOD_FILES[name](tmp_path / name)
    array = stored(tmp_path / name)
    assert array.dtype == np.int16
    assert np.array_equal(array, VOXELS)


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
def test_voxels_that_are_larger_than_a_block_are_read_in_every_encoding(tmp_path, suffix):
    large = np.random.default_rng(0).integers(-999, 999, (128, 96, 70)).astype("<i2")
    data, size = large.tobytes(order="F"), "128 96 70"
    if suffix == "mha":
        kinds = {"raw": (data, {}), "zlib": (zlib.compress(data, 1), {"CompressedData": "True"})}
        kinds["text"] = (b" ".join(b"%d" % value for value in large.ravel(order="F")), {"BinaryData": "False"})
        made = [meta(tmp_path / f"{name}.mha", given, DimSize=size, **more) for name, (given, more) in kinds.items()]
    else:
        encoded = {"raw": data, "gzip": gzip.compress(data, 1), "hex": data.hex().encode()}
        made = [nrrd(tmp_path / f"{n}.nrrd", given, sizes=size, encoding=n) for n, given in encoded.items()]
    for path in made:
        assert np.array_equal(stored(path), large)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("LONG", "i4"), ("ULONG", "u4"), ("INT", "i4"), ("LONG_LONG", "i8"), ("ULONG_LONG", "u8"), ("CHAR", "i1")],
)
def test_types_of_metaimage_have_the_sizes_of_metaio(tmp_path, kind, dtype):
    values = (VOXELS * 5 % 100).astype(dtype)
    path = meta(tmp_path / "scan.mha", values.tobytes(order="F"), ElementType=f"MET_{kind}")
    assert stored(path).dtype == np.dtype(dtype)
    assert np.array_equal(stored(path), values)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T, values)


TURNED = "(0.7,0.1,0.2) (-0.3,2.1,0.2) (0.1,-0.2,3.3)"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ras.nrrd", {"space": "RAS"}),
        ("las.nrrd", {"space": "left-anterior-superior"}),
        ("turned.nrrd", {"space_directions": TURNED, "space": "right-anterior-superior"}),
        ("mins.nrrd", {"space": None, "space_directions": None, "space_origin": None, "spacings": "1 2 3",
            "axis_mins": "10 20 30"}),
        ("nodes.nrrd", {"space": None, "space_directions": None, "space_origin": None, "spacings": "1 2 3",
            "axis_mins": "10 20 30", "centerings": "node node node"}),
        ("turned.mha", {"TransformMatrix": "0 1 0 0 0 1 1 0 0", "Offset": "0.1 -0.2 1e2"}),
        ("position.mha", {"Position": "1 2 3", "ElementSpacing": None, "ElementSize": "0.3 0.3 1.7"}),
    ],
)  # fmt: skip
def test_geometry_is_that_of_simple_itk_bit_by_bit(tmp_path, name, fields, monkeypatch):
    monkeypatch.setattr("mim3d.scans.grids.MAX_SHEAR_COSINE", 1.0)
    path = (nrrd if name.endswith("nrrd") else meta)(tmp_path / name, **fields)
    geometry, image = read_grid(path).source, sitk.ReadImage(str(path))
    assert geometry.spacing == image.GetSpacing()
    assert geometry.origin == image.GetOrigin()
    assert geometry.direction == image.GetDirection()


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        (
            "scan.mha",
            {"ElementType": "MET_UCHAR"},
            "24 bytes follow the 4 x 3 x 2 voxels of uint8 that the header claims",
        ),
        ("scan.mha", {"ElementSpacing": None}, "does not say how large a voxel is, and 1 x 1 x 1 mm is assumed"),
        ("scan.nrrd", {"space": None, "space_directions": None, "space_origin": None}, "1 x 1 x 1 mm is assumed"),
        ("scan.nrrd", {"space": None, "space_directions": None, "space_origin": None, "spacings": "1 2 3"},
            "does not say how the patient lies"),
        ("scan.mha", {"ElementToIntensityFunctionSlope": "2"}, "rescaling by 2 and 0 is not applied"),
        ("scan.mha", {"DistanceUnits": "ell"}, "in 'ell', which is no known unit, and are taken for millimetres"),
        ("scan.nrrd", {"space_units": '"mm" "mm" "s"'}, "in 'mm and s', which is no known unit"),
        ("scan.nrrd", {"space": "scanner-xyz"}, "'scanner-xyz', and its axes are taken for left, posterior, superior"),
    ],
)  # fmt: skip
def test_what_a_header_leaves_open_is_told_with_what_is_assumed(tmp_path, name, fields, words):
    path = (nrrd if name.endswith("nrrd") else meta)(tmp_path / name, **fields)
    with pytest.warns(UserWarning, match=words):
        read_grid(path)


@pytest.mark.parametrize(
    ("name", "fields"), [("scan.mha", {"DistanceUnits": "cm"}), ("scan.nrrd", {"space_units": '"cm" "cm" "cm"'})]
)
def test_centimetres_become_millimetres(tmp_path, name, fields):
    path = (nrrd if name.endswith("nrrd") else meta)(tmp_path / name, **fields)
    assert read_grid(path).spacing_mm == (10, 20, 30)


BAD_HEADERS = {
    "negative_axes.mha": (lambda path: meta(path, NDims="-1"), "claims -1 axes"),
    "many_axes.mha": (lambda path: meta(path, NDims="1e300"), "not whole numbers"),
    "no_axes.mha": (lambda path: meta(path, NDims=None), "no 'ndims'"),
    "axes_twice.mha": (lambda path: meta(path, **{"NDims ": "3"}), "'ndims' twice"),
    "fewer_sizes.mha": (lambda path: meta(path, DimSize="4 6"), "2 numbers in 'DimSize: 4 6', but 3 are needed"),
    "two_origins.mha": (lambda path: meta(path, Offset="1 2 3", Position="3 2 1"), "different numbers for offset"),
    "early.mha": (lambda path: meta(path, HeaderSize="6"), "puts the voxels at byte 6"),
    "wrong_size.mha": (lambda path: meta(path, PACKED, CompressedData="True", CompressedDataSize="99999"),
        "99999 compressed bytes, but the file holds"),
    "control.mha": (lambda path: meta(path, Comment="a\x00b"), "bytes that are no text"),
    "endless.mha": (lambda path: path.write_bytes(b"a" * 2**21), "longer than"),
    "letters.mha": (lambda path: meta(path, text().replace(b"7", b"x"), BinaryData="False"), "no text of int16"),
    "large_text.mha": (lambda path: meta(path, text().replace(b"23", b"99999"), BinaryData="False"), "no text of"),
    "axes_twice.nrrd": (lambda path: nrrd(path, end="dimension: 3\n"), "'dimension' twice"),
    "negative_axes.nrrd": (lambda path: nrrd(path, dimension="-3"), "claims -3 axes"),
    "other_axes.nrrd": (lambda path: nrrd(path, dimension="2"), "3 numbers in 'sizes: 4 3 2', but 2 are needed"),
    "huge.nrrd": (lambda path: nrrd(path, sizes="4 3 1e300"), "not whole numbers"),
    "typo.nrrd": (lambda path: nrrd(path, space_direction="(1,0,0)"), "'space direction: .*no field of NRRD"),
    "no_endian.nrrd": (lambda path: nrrd(path, endian=None), "order of bytes"),
    "bzip2.nrrd": (lambda path: nrrd(path, encoding="bzip2"), "encoding 'bzip2' are not read"),
    "control.nrrd": (lambda path: nrrd(path, end="a:=\x01\n"), "bytes that are no text"),
    "no_hex.nrrd": (lambda path: nrrd(path, b"x" * 200, encoding="hex"), "no hex of int16"),
    "brackets.nrrd": (lambda path: nrrd(path, space_directions="(" * 200_000), "0 space directions for 3 axes"),
    "short_gzip.nrrd": (lambda path: nrrd(path, gzip.compress(RAW[:-2]), encoding="gzip"), "unpacking gives 46"),
    "far.nrrd": (lambda path: nrrd(path, byte_skip="999999999999"), "the file holds 0"),
    "two_sizes.nrrd": (lambda path: nrrd(path, spacings="1 2 3"), "spacings beside them"),
    "no_step.mhd": (lambda path: meta(path, b"", "s%d.raw 1 2 0"), "in steps of 0"),
    "many_files.mhd": (lambda path: meta(path, b"", "s%d.raw 1 999999999 1"), "counts files from 1 to 999999999"),
    "no_pattern.mhd": (lambda path: meta(path, b"", "s%s%n.raw"), "are missing"),
    "no_list.mhd": (lambda path: meta(path, b"", "LIST"), "lists 0 files"),
    "no_name.mhd": (lambda path: meta(path, b"", ""), "names no file of its voxels"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_bad_header_is_refused_in_one_sentence(tmp_path, name):
    make, words = BAD_HEADERS[name]
    make(tmp_path / name)
    with pytest.raises(DataError, match=words) as caught:
        read_volume(tmp_path / name)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


# --- Voxels in other files


@pytest.fixture
def home(tmp_path) -> Path:
    folder = tmp_path / "set"
    (folder / "below").mkdir(parents=True)
    (tmp_path / "secret.raw").write_bytes(RAW)
    (folder / "voxels.raw").write_bytes(RAW)
    (folder / "below" / "voxels.raw").write_bytes(RAW)
    for index in (1, 2):
        (folder / f"part{index}.raw").write_bytes(RAW[24 * (index - 1) : 24 * index])
        (folder / f"part{index}.zraw").write_bytes(zlib.compress(RAW[24 * (index - 1) : 24 * index]))
    (folder / "link.raw").symlink_to("voxels.raw")
    (folder / "out.raw").symlink_to("../secret.raw")
    os.mkfifo(folder / "pipe.raw")
    return folder


def detached(folder: Path, form: str, name: str, **fields: str) -> Path:
    if form == "mhd":
        return meta(folder / "scan.mhd", b"", name, **fields)
    return nrrd(folder / "scan.nhdr", b"", f"data file: {name}\n", **fields)


FORMS = pytest.mark.parametrize("form", ["mhd", "nhdr"])
LIST, PATTERN = "LIST\npart1.raw\npart2.raw", "part%d.raw 1 2 1"


@FORMS
@pytest.mark.parametrize(
    "name", ["voxels.raw", "./voxels.raw", "below/voxels.raw", "link.raw", "{}/voxels.raw", LIST, PATTERN]
)
def test_voxels_beside_or_below_their_header_are_read(home, form, name):
    path = detached(home, form, name.format(home))
    assert np.array_equal(stored(path), VOXELS)
    assert len(itk_files(str(path))) == (3 if name in (LIST, PATTERN) else 2)


def test_packed_parts_are_joined(home):
    for name in (LIST.replace("raw", "zraw"), PATTERN.replace("raw", "zraw")):
        assert np.array_equal(stored(detached(home, "mhd", name, CompressedData="True")), VOXELS)


@FORMS
@pytest.mark.parametrize("name", ["{}/secret.raw", "../secret.raw", "below/../../secret.raw", "out.raw", "/dev/zero",
    "LIST\npart1.raw\n../secret.raw", "../s%d.raw 1 2 1"])  # fmt: skip
def test_voxels_elsewhere_are_refused_before_they_are_opened(home, form, name, monkeypatch):
    path = detached(home, form, name.format(home.parent))
    for read in (read_volume, itk_files):
        with pytest.raises(DataError, match="leads out of its folder"):
            read(str(path))


@FORMS
@pytest.mark.parametrize("name", ["pipe.raw", "LIST\npipe.raw\npart1.raw"])
def test_a_pipe_for_voxels_is_refused_and_never_waited_for(home, form, name):
    with pytest.raises(DataError, match="device, pipe or socket"):
        read_volume(detached(home, form, name))


@FORMS
def test_a_header_that_is_a_link_finds_its_voxels_beside_what_it_links_to(home, tmp_path, form):
    path = detached(home, form, "voxels.raw")
    (tmp_path / "links").mkdir()
    for name in (path.name, "voxels.raw"):
        (tmp_path / "links" / name).symlink_to(home / name)
    assert np.array_equal(stored(tmp_path / "links" / path.name), VOXELS)
