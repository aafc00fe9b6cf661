"""NRRD and MetaImage files: the text header held against the file, then read and written by SimpleITK."""

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.scans import files
from mim3d.scans.grids import (
    LPS_TO_RAS,
    Grid,
    ItkGeometry,
    check_affine,
    check_spacing,
    spacing_of,
    volume_shape,
)
from mim3d.scans.itk_headers import TextHeader, is_nrrd, read_text_header
from mim3d.scans.voxel_copies import slices_at_once


def read_grid(path: str) -> Grid:
    """Read and check the header of an .nrrd, .nhdr, .mha or .mhd file; no voxel is unpacked into memory.

    Raises:
        DataError: not of this format, truncated, without its detached voxels, colours or vectors, not 3-D,
            impossible geometry, or more voxels than the file or the memory can hold.
    """
    files.check_file(path)
    header = read_text_header(path)
    _check_header(header, path)
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{path}: the header cannot be read ({_reason(error)}); export the scan again.") from error
    if reader.GetNumberOfComponents() != 1:
        raise DataError(_vector_sentence(path, reader.GetNumberOfComponents()))
    shape = volume_shape(reader.GetSize(), path)
    num_axes = reader.GetDimension()
    direction = np.array(reader.GetDirection()).reshape(num_axes, num_axes)[:3, :3]
    geometry = ItkGeometry(
        spacing=tuple(reader.GetSpacing()[:3]),
        origin=tuple(reader.GetOrigin()[:3]),
        direction=tuple(float(value) for value in direction.ravel()),
    )
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(geometry.spacing)
    affine[:3, 3] = geometry.origin
    affine = LPS_TO_RAS @ affine
    check_affine(affine, path)
    return Grid(shape=shape, affine=affine, path=path, itk=geometry)


def read_slabs(grid: Grid) -> Iterator[npt.NDArray[Any]]:
    """Voxels in stored axis order, (i, j, some k), slab by slab along the last axis, in the type of the file.

    All voxels are unpacked at the first slab, as SimpleITK has no other way; the slabs are views of them.

    Raises:
        DataError: the voxels cannot be unpacked.
    """
    header = read_text_header(grid.path)
    if header.data_path is not None and header.encoding in ("gzip", "zlib"):
        # SimpleITK hands over garbage where a compressed stream is damaged.
        size_bytes = math.prod(header.sizes) * header.itemsize
        files.check_packed(header.data_path, header.data_offset, size_bytes)
    try:
        image = _reader(grid.path).Execute()
    except RuntimeError as error:
        raise DataError(
            f"{grid.path}: the voxels cannot be read ({_reason(error)}); copy the file again from its source."
        ) from error
    # The view is valid for as long as the image is referred to: as long as this function has not ended.
    stored = simple_itk().GetArrayViewFromImage(image).T.reshape(grid.shape, order="F")
    num_at_once = slices_at_once(grid.shape[0] * grid.shape[1])
    for start in range(0, grid.shape[2], num_at_once):
        yield stored[..., start : start + num_at_once]


def write_stored(path: str, array: npt.NDArray[Any], grid: Grid) -> None:
    """Write voxels in stored axis order, compressed, as the format that the suffix of `path` names."""
    sitk = simple_itk()
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    geometry = grid.itk or _geometry_of(grid.affine)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    try:
        sitk.WriteImage(image, path, True)
    except RuntimeError as error:
        raise OSError(_reason(error)) from error


def _geometry_of(affine: npt.NDArray[np.float64]) -> ItkGeometry:
    lps = LPS_TO_RAS @ affine
    spacing = spacing_of(lps)
    direction = lps[:3, :3] / np.array(spacing)
    return ItkGeometry(
        spacing=spacing,
        origin=tuple(float(value) for value in lps[:3, 3]),
        direction=tuple(float(value) for value in direction.ravel()),
    )


def simple_itk() -> Any:
    """The SimpleITK module, imported at the first scan that needs it; untyped, as it is."""
    import SimpleITK

    return SimpleITK


def _reader(path: str) -> Any:
    reader = simple_itk().ImageFileReader()
    # Named, so that content of another format under this suffix is not handed to another decoder.
    reader.SetImageIO("NrrdImageIO" if is_nrrd(path) else "MetaImageIO")
    reader.SetFileName(path)
    return reader


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _vector_sentence(path: str, num_values: int) -> str:
    return (
        f"{path}: every voxel holds {num_values} values (a colour, a vector or a displacement), but one "
        "value per voxel is needed; save one component as a file of its own."
    )


def _check_header(header: TextHeader, path: str) -> None:
    if header.num_values != 1:
        raise DataError(_vector_sentence(path, header.num_values))
    volume_shape(header.sizes, path)
    check_spacing(header.spacing, path)
    size_bytes = files.check_memory(path, header.sizes, header.itemsize)
    if header.data_path is None:
        return
    if not os.path.isfile(header.data_path):
        raise DataError(f"{path}: its voxels, {header.data_path}, are missing; put them there.")
    held = os.path.getsize(header.data_path) - header.data_offset
    if header.encoding == "raw":
        files.check_raw(header.data_path, header.data_offset, size_bytes)
    elif header.encoding == "gzip":
        files.check_gzip(header.data_path, header.data_offset, size_bytes)
    elif header.encoding == "zlib":
        files.check_deflate(header.data_path, held, size_bytes)
        if held < header.packed_bytes:
            raise DataError(
                f"{path}: the header tells of {header.packed_bytes} compressed bytes, but the file holds {held}; it is "
                "truncated, so copy it again from its source."
            )
