"""Tiny volumes that look enough like scans: a body in air, with a blob for every label."""

from collections.abc import Sequence

import nibabel
import numpy as np

#: Voxels of a miniature along its stored axes.
SHAPE = (28, 26, 20)


def label_map(values: Sequence[int], shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """A uint16 label map with a blob for every value, side by side in the body."""
    places = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    label = np.zeros(shape, dtype=np.uint16)
    columns, rows, slices = 3, 3, -(-len(values) // 9)
    for index, value in enumerate(values):
        cell = (index % columns, index // columns % rows, index // (columns * rows))
        share = [(place + 1) / (number + 1) for place, number in zip(cell, (columns, rows, slices), strict=True)]
        centre = np.array([0.2 + 0.6 * part for part in share]) * (np.array(shape) - 1)
        radius = np.maximum(np.array(shape) / 12, 1.5)
        label[(((places - centre) / radius) ** 2).sum(axis=-1) <= 1] = value
    assert set(np.unique(label)) == {0, *values}
    return label


def ct(label: np.ndarray, seed: int) -> np.ndarray:
    """Hounsfield units, int16: air, a body around 40, and every label a little brighter than the one before.

    Every seed is another patient, with bones and gas of its own.
    """
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in label.shape), indexing="ij"), axis=-1)
    inside = (places[..., :2] ** 2).sum(axis=-1) < rng.uniform(0.7, 0.95)
    order = np.searchsorted(np.unique(label), label)
    image = np.where(inside, 40 + rng.normal(0, 10, label.shape) + 12 * order, -1000)
    for value in (700, 500, -700, -500):
        for centre in rng.uniform(-0.7, 0.7, (3, 3)):
            image[inside & (label == 0) & (((places - centre) ** 2).sum(axis=-1) < 0.06)] = value
    return image.astype(np.int16)


def mri(label: np.ndarray, seed: int, num_channels: int) -> np.ndarray:
    """(X, Y, Z, channels) float32: nothing outside the head, and channels that differ in scale and contrast."""
    rng = np.random.default_rng(seed)
    shape = ct(label, seed)
    head, texture = shape > -1000, np.clip(shape, -100, 100) / 10
    order = np.searchsorted(np.unique(label), label)
    channels = [
        head * np.clip(200 * (channel + 1) + 60 * order * (-1) ** channel + texture * rng.normal(4, 1), 1, None)
        for channel in range(num_channels)
    ]
    return np.stack(channels, axis=-1).astype(np.float32)


def save(path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write NIfTI, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def affine_of(spacing_mm: Sequence[float], orientation: str = "RAS", origin_mm=(0.0, 0.0, 0.0)) -> np.ndarray:
    """An axis-aligned affine in an orientation such as LAS or PIR."""
    axes = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.eye(4)
    affine[:3, :3] = 0
    for stored, letter in enumerate(orientation):
        axis, sign = axes[letter]
        affine[axis, stored] = sign * spacing_mm[stored]
    affine[:3, 3] = origin_mm
    return affine


def turned(affine: np.ndarray, degrees: float) -> np.ndarray:
    """The affine of a gantry or patient turned about the long axis: oblique, but not sheared."""
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ affine
