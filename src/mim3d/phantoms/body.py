"""Labelled synthetic CT bodies: the data that come with mim3d, drawn from a seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import ConfigError
from mim3d.core.types import Spacing, Triple
from mim3d.phantoms.organs import belly_parts, chest_parts, draw_organs, lesion_parts, organ_parts, vessel_parts
from mim3d.phantoms.parts import BONES, CHEST, LABELS, LUNGS, WALL, Part, Tissues, draw_tissues
from mim3d.phantoms.scanner import AIR_HU, Placement, Pose, draw_pose, draw_scanner, paint_table, scan
from mim3d.phantoms.shapes import Array, vector
from mim3d.phantoms.trunk import Trunk, draw_spine, draw_trunk, paint_ribs, paint_trunk, skeleton

#: Fewer voxels along an axis show no anatomy.
MIN_SIZE = 16
#: Voxels painted at a time: what fits a processor's cache.
SLAB_VOXELS = 1 << 19


@dataclass(frozen=True, kw_only=True, eq=False)
class Phantom:
    """A synthetic CT scan with its labels.

    Attributes:
        image: (X, Y, Z) int16 HU along RAS+ axes.
        label: (X, Y, Z) uint8 label values, exact for every voxel.
        spacing_mm: Voxel size along X, Y, Z.
        affine: (4, 4) float64, index to RAS millimetres.
        labels: Label value to name.
    """

    image: npt.NDArray[np.int16]
    label: npt.NDArray[np.uint8]
    spacing_mm: Spacing
    affine: npt.NDArray[np.float64]
    labels: dict[int, str]


def make_phantom(seed: int | Sequence[int], size: Triple) -> Phantom:
    """Draw a patient and take a CT scan of chest and belly.

    The same seed and size give the same voxels; a seed gives the same patient at every size.

    Args:
        seed: One whole number from 0, or several that together name the case.
        size: Voxels along X (right), Y (front), Z (head) of the scan.

    Raises:
        ConfigError: A size below 16, or a negative seed.
    """
    if len(size) != 3 or any(voxels < MIN_SIZE for voxels in size):
        shown = " x ".join(map(str, size))
        raise ConfigError(f"phantom size {shown} needs three axes of at least {MIN_SIZE} voxels; use 96 96 80.")
    if any(number < 0 for number in np.atleast_1d(seed)):
        raise ConfigError(f"phantom seed {seed} is negative; use a whole number from 0.")
    # Independent sources for the grid, the patient, and the noise.
    grid_rng, body_rng, noise_rng = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(3))
    pose, tissues, trunk = draw_pose(body_rng), draw_tissues(body_rng), draw_trunk(body_rng)
    parts, scanner = _draw_parts(body_rng, trunk, tissues), draw_scanner(body_rng)
    placement = _place(pose, trunk, grid_rng, size)
    # The table touches the patient where the back is lowest in the scan.
    heights = np.linspace(-60, 160, 12, dtype=np.float32)
    skin = np.stack([0 * heights, -trunk.skin_axes(heights)[2], heights])
    backs = np.linalg.inv(pose.linear) @ (skin - np.array(pose.centre_mm)[:, None])
    hu = np.full(size, AIR_HU, dtype=np.float32)
    paint_table(scanner, placement, vector(backs[:, int(np.argmin(backs[1]))]), hu)
    label = np.zeros(size, dtype=np.uint8)
    step = max(1, SLAB_VOXELS // (size[0] * size[1]))
    for start in range(0, size[2], step):
        stop = min(start + step, size[2])
        places = placement.body_mm(start, stop)
        tissue = np.ascontiguousarray(hu[..., start:stop])
        region = paint_trunk(trunk, tissues, places, tissue)
        values = np.where(region == CHEST, np.uint8(LUNGS), np.uint8(0))
        for part in parts:
            box = placement.box(part.solid.low, part.solid.high, start, stop)
            if box is not None:
                _paint(part, [place[box] for place in places], tissue[box], values[box], region[box])
        values[paint_ribs(trunk, tissues, places, tissue, (region == WALL) & (values != BONES))] = BONES
        hu[..., start:stop], label[..., start:stop] = tissue, values
    image = scan(scanner, placement, hu, noise_rng)
    # Axes along RAS+, the scanner's origin anywhere.
    half_mm = (np.array(size) - 1) / 2 * placement.spacing_mm
    affine = np.diag([*placement.spacing_mm, 1.0])
    affine[:3, 3] = np.round(grid_rng.uniform((-20, -40, -900), (20, 180, 400)) - half_mm, 2)
    return Phantom(image=image, label=label, spacing_mm=placement.spacing_mm, affine=affine, labels=dict(LABELS))


def _draw_parts(rng: np.random.Generator, trunk: Trunk, tissues: Tissues) -> list[Part]:
    """Draw all that fills the trunk, in the order to paint it."""
    spine = draw_spine(rng)
    organs = draw_organs(rng, trunk)
    return [
        *chest_parts(rng, trunk, tissues),
        *belly_parts(rng, spine, tissues),
        *organ_parts(rng, organs, tissues),
        *lesion_parts(rng, organs, tissues),
        *vessel_parts(rng, trunk, spine, tissues),
        *skeleton(rng, trunk, spine, tissues),
    ]


def _paint(
    part: Part, places: list[Array], hu: Array, label: npt.NDArray[np.uint8], region: npt.NDArray[np.uint8]
) -> None:
    """Paint a part into `hu` and `label`, all of them arrays of one box of voxels."""
    inside = part.solid.level(*places) < 0
    for values, covered in ((region, part.regions), (label, part.on)):
        if covered is not None:
            allowed = np.zeros(256, dtype=np.bool_)
            allowed[list(covered)] = True
            inside &= allowed[values]
    hu[inside] = part.hu
    if part.label is not None:
        label[inside] = part.label


def _place(pose: Pose, trunk: Trunk, rng: np.random.Generator, size: Triple) -> Placement:
    """Fit the field of view to the patient as a radiographer does; slices are square, of any thickness."""
    heights = np.linspace(-150, 200, 15, dtype=np.float32)
    side, front, back = (float(axis.max()) for axis in trunk.skin_axes(heights))
    grown_by = np.abs(np.linalg.inv(pose.linear)).max(axis=0)
    width_mm = 2 * side * grown_by[0] * rng.uniform(1.1, 1.25)
    depth_mm = (front + back) * grown_by[1] * rng.uniform(1.1, 1.2) + 40
    pixel_mm = round(float(max(width_mm / size[0], depth_mm / size[1])), 4)
    slice_mm = round(float(rng.uniform(330, 410)) / size[2], 3)
    return Placement(pose=pose, shape=size, spacing_mm=(pixel_mm, pixel_mm, slice_mm))
