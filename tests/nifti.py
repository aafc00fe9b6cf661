"""Small NIfTI files for tests."""

from pathlib import Path

import nibabel as nib
import numpy as np


def affine_of(spacing_mm=(1.0, 1.0, 1.0), origin_mm=(0.0, 0.0, 0.0), signs=(1, 1, 1)) -> np.ndarray:
    """Affine of an axis-aligned grid."""
    affine = np.diag([*(sign * mm for sign, mm in zip(signs, spacing_mm, strict=True)), 1.0])
    affine[:3, 3] = origin_mm
    return affine


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write an array as it is, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine_of() if affine is None else affine)
    image.set_data_dtype(array.dtype)
    nib.save(image, path)
    return path


def noise(shape=(6, 7, 8), seed=0, dtype=np.int16) -> np.ndarray:
    """A CT-like block: air around a noisy body."""
    rng = np.random.default_rng(seed)
    array = np.full(shape, -1000.0)
    inner = tuple(slice(size // 4, size - size // 4) for size in shape)
    array[inner] = rng.normal(40, 30, array[inner].shape)
    return array.astype(dtype)
