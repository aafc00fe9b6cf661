"""NRRD and MetaImage files: the text header checked against the files, the voxels unpacked slab by slab.

No native library sees such a file: what a damaged or hostile one does to SimpleITK takes the process along. SimpleITK
writes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.scans import files
from mim3d.scans.grids import LPS_TO_RAS, Grid, check_affine, spacing_of
from mim3d.scans.metaimage import read_meta_header
from mim3d.scans.nrrd import read_nrrd_header
from mim3d.scans.text_headers import ItkGeometry, TextHeader
from mim3d.scans.voxel_files import of_surplus, read_slabs


@dataclass(frozen=True, kw_only=True, eq=False)
class ItkScan:
    """An NRRD or MetaImage file whose header has been checked.

    Attributes:
        grid: Grid of the scan.
        header: The text header.
    """

    grid: Grid
    header: TextHeader

    def read_slabs(self) -> Iterator[npt.NDArray[Any]]:
        """Voxels in stored axis order, (i, j, some k), slab by slab along the last axis, in one buffer used again.

        Raises:
            DataError: The voxels cannot be unpacked, or their checksum is wrong.
        """
        yield from read_slabs(self.grid, self.header.parts, self.header.encoding, self.header.dtype)


def open_itk(path: str) -> ItkScan:
    """Read and check the header of an .nrrd, .nhdr, .mha or .mhd file; no voxel is unpacked into memory.

    Raises:
        DataError: The file is not of this format, truncated or without its detached voxels; it holds colours or vectors
            or is not 3-D; its geometry is impossible, or it has more voxels than the file or the memory can hold.
    """
    header = _read_header(path)
    surplus_bytes = sum(part.check(header.encoding, header.dtype) for part in header.parts)
    assumed = header.assumed + of_surplus(surplus_bytes, header.shape, header.dtype)
    geometry = header.geometry
    affine = np.eye(4)
    affine[:3, :3] = np.array(geometry.direction).reshape(3, 3) * np.array(geometry.spacing)
    affine[:3, 3] = geometry.origin
    affine = LPS_TO_RAS @ affine
    check_affine(affine, header.shape, path)
    files.warn_of_assumptions(path, assumed)
    grid = Grid(shape=header.shape, affine=affine, path=path, source=geometry, assumed=assumed)
    return ItkScan(grid=grid, header=header)


def itk_files(path: str) -> list[str]:
    """Every file that an NRRD or MetaImage file is read from: itself, then those of its voxels that it names.

    Raises:
        DataError: The header cannot be read, or names files that may not be.
    """
    return list(dict.fromkeys([path, *(part.path for part in _read_header(path).parts)]))


def write_itk(path: str, array: npt.NDArray[Any], grid: Grid) -> None:
    """Write voxels in stored axis order, compressed, as the format that the suffix of `path` names."""
    import SimpleITK

    # Without types, so that mypy does not check calls into it.
    sitk: Any = SimpleITK
    geometry = grid.source
    if not isinstance(geometry, ItkGeometry):
        lps = LPS_TO_RAS @ grid.affine
        spacing = spacing_of(lps)
        geometry = ItkGeometry(
            spacing=spacing,
            origin=tuple(float(value) for value in lps[:3, 3]),
            direction=tuple(float(value) for value in (lps[:3, :3] / np.array(spacing)).ravel()),
        )
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    try:
        sitk.WriteImage(image, path, True)
    except RuntimeError as error:
        raise OSError((str(error).strip() or type(error).__name__).splitlines()[-1].strip()) from error


def _read_header(path: str) -> TextHeader:
    files.check_file(path)
    with open(path, "rb") as stream:
        start = stream.read(132)
    is_nrrd = path.lower().endswith((".nrrd", ".nhdr"))
    if not is_nrrd or not start.startswith(b"NRRD"):
        files.require_no_other_kind(path, start)
    return read_nrrd_header(path) if is_nrrd else read_meta_header(path)
