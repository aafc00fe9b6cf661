"""Boxes of one size in millimetres: planned from training scans, cut from scans of any voxel size, and resampled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mim3d.backbones.contract import round_up
from mim3d.caching.resampling import plan_axis, resample_linear
from mim3d.caching.scan import CachedScan
from mim3d.core.types import Spacing, Triple
from mim3d.inference.windows import cut_window
from mim3d.loading.samples import Augment, Crop, Sample
from mim3d.nn.volumes import resize_image

#: Edge in voxels that a planned box does not exceed.
LARGEST_PLANNED_EDGE = 96

#: Place of a point in voxels of a scan; whole numbers are the centres of voxels.
Point = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Cut:
    """Where a cube lies in one scan: what is read of it, and how the cube's voxels lie in that.

    Attributes:
        read: Whole voxels around the cube, delivered in ``1 / 2^n`` of the scan's resolution where the cube's voxels
            are at least as large as those.
        step: Number (3,) of delivered voxels from one of the cube's voxels to the next.
        shift: Number (3,) of delivered voxels from the centre of what is delivered to the centre of the cube.
        size: Number of voxels of the cube along X, Y, Z.
    """

    read: Crop
    step: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]
    size: Triple


@dataclass(frozen=True)
class Cube:
    """A box that the network sees.

    Attributes:
        size: Number of its voxels along X, Y, Z.
        voxel_mm: Size of its voxels in millimetres. None stretches the whole scan onto the box, whatever its voxel
            size.
    """

    size: Triple
    voxel_mm: Spacing | None

    def step(self, shape: Triple, spacing_mm: Spacing) -> npt.NDArray[np.float64]:
        """Return how many voxels (3,) of a scan lie from one of the cube's voxels to the next."""
        if self.voxel_mm is None:
            return np.array(shape) / np.array(self.size)
        return np.array(self.voxel_mm) / np.array(spacing_mm)

    def cut(self, centre: Point, step: npt.NDArray[np.float64]) -> Cut:
        """Place the cube around a point of a scan.

        Args:
            centre: The point (3,), in voxels of the scan.
            step: Number (3,) of voxels of the scan from one of the cube's voxels to the next.
        """
        # Full resolution is not worth reading where every voxel of the cube averages over several of the scan.
        factor = 2 ** max(0, int(np.floor(np.log2(step.min()) + 1e-9)))
        reach = (np.array(self.size) - 1) / 2 * step + factor + step
        first = np.floor((centre - reach) / factor).astype(np.int64) * factor
        last = np.ceil((centre + reach) / factor).astype(np.int64) * factor
        delivered = (last - first) // factor
        middle = first + (last - first - 1) / 2
        origin, footprint, size = (_triple(values) for values in (first, last - first, delivered))
        return Cut(Crop(origin, footprint, size), step / factor, (centre - middle) / factor, self.size)


def centre_of_scan(shape: Triple) -> Point:
    """Return the middle of a scan, in its voxels."""
    return (np.array(shape, dtype=np.float64) - 1) / 2


def centre_of_label(places: dict[int, npt.NDArray[np.int32]]) -> Point | None:
    """Return the centre of mass of labelled voxels, as the cache keeps them (at most 2,000 per value); None if none.

    Args:
        places: Label value above 0 -> voxels (N, 3).
    """
    known = [voxels for voxels in places.values() if len(voxels)]
    return np.asarray(np.concatenate(known).mean(axis=0), dtype=np.float64) if known else None


def resampled(image_CXYZ: npt.NDArray[np.float32], cut: Cut) -> npt.NDArray[np.float32]:
    """Return the cube's voxels ``(C, *cut.size)`` from what was delivered ``(C, *cut.read.size)``."""
    x, y, z = (
        plan_axis(voxels, size, float(step), float(shift))
        for voxels, size, step, shift in zip(image_CXYZ.shape[1:], cut.size, cut.step, cut.shift, strict=True)
    )
    return np.stack([resample_linear(channel, (x, y, z)) for channel in image_CXYZ])


def cut_from(image_CXYZ: npt.NDArray[np.float32], cut: Cut, padding: list[float]) -> npt.NDArray[np.float32]:
    """Return the cube's voxels ``(C, *cut.size)`` from a scan in memory, as the loader delivers and resamples them.

    Args:
        image_CXYZ: Mapped intensities of the whole scan.
        cut: Where the cube lies.
        padding: Value of each channel beyond the scan. The cube's centre lies in the scan.
    """
    x, y, z = image_CXYZ.shape[1:]
    read = cut.read

    def part_of(part: tuple[slice, ...]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(image_CXYZ[part]))

    crop = cut_window(part_of, read.origin, read.footprint, (x, y, z), padding)
    delivered: npt.NDArray[np.float32] = resize_image(crop[None], read.size)[0].numpy()
    return resampled(delivered, cut)


@dataclass(frozen=True)
class CubeSampler:
    """Draws one cube per sample, with the class of its scan.

    Attributes:
        cube: What the network sees.
        around_label: Whether cubes lie around the centre of mass of the label, where a scan has one, instead of the
            middle of the scan.
        classes: Names of the classes in the order of their numbers.
        shift_ratio: Largest share of the cube's edge by which it is moved along each axis.
        affine_prob: Share of the cubes that are cut larger, for an affine change whose corners must hold voxels.
        margin_ratio: How much larger such a cube is on each side, relative to its edge.
    """

    cube: Cube
    around_label: bool
    classes: tuple[str, ...]
    shift_ratio: float = 0.0
    affine_prob: float = 0.0
    margin_ratio: float = 0.0

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        """Draw a cube from the scan's card and class locations alone.

        Batch keys: ``image`` ``(1, C, *size)``; ``class`` ``(1,)``, -1 for a class that is none of ``classes``; and for
        :class:`CubeFinisher`, which leaves these two: ``step``, ``shift``, ``size``, ``(3,)`` each.
        """
        step = self.cube.step(scan.shape, scan.spacing_mm)
        moved = rng.uniform(-1, 1, 3) * self.shift_ratio * np.array(self.cube.size) * step
        cube = self.cube
        if rng.random() < self.affine_prob:
            margin = np.ceil(np.array(cube.size) * self.margin_ratio).astype(np.int64)
            cube = replace(cube, size=_triple(np.array(cube.size) + 2 * margin))
        centre = centre_of_label(scan.class_locations) if self.around_label else None
        cut = cube.cut((centre_of_scan(scan.shape) if centre is None else centre) + moved, step)
        name = scan.case.class_name
        return Sample(
            images={"image": (cut.read,)},
            arrays={
                "class": np.array([self.classes.index(name) if name in self.classes else -1]),
                "step": cut.step,
                "shift": cut.shift,
                "size": np.array(cut.size),
            },
        )


@dataclass(frozen=True)
class CubeFinisher:
    """Resamples what was read to the voxels of the cube, and varies it; can be sent to worker processes.

    Attributes:
        augment: Varies ``image`` ``(1, C, *size)`` together with a label map; None leaves it.
    """

    augment: Augment | None = None

    def __call__(self, sample: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Return ``image`` ``(1, C, *size)`` and ``class`` ``(1,)`` of a sample of :class:`CubeSampler`."""
        image = sample["image"][0].numpy()
        x, y, z = (int(voxels) for voxels in sample["size"])
        shape = _triple(np.array(image.shape[1:]))
        cut = Cut(Crop((0, 0, 0), shape, shape), sample["step"].numpy(), sample["shift"].numpy(), (x, y, z))
        cube = torch.from_numpy(resampled(image, cut))[None]
        if self.augment is not None:
            # The augmentation of segmentation varies an image with its label map; here there is none to vary.
            cube = self.augment({"image": cube, "label": torch.zeros(1, x, y, z)}, seed)["image"]
        return {"image": cube, "class": sample["class"]}


def _triple(values: npt.NDArray[np.int64]) -> Triple:
    x, y, z = (int(value) for value in values)
    return x, y, z


def planned_size(scans: Sequence[CachedScan], multiple: Triple, edges_mm: Spacing | None) -> Triple:
    """Return the voxels of a box at the median scan's voxel size, limited along each axis.

    Args:
        scans: The training scans.
        multiple: What sizes must be multiples of, along each axis.
        edges_mm: Edges of the box in millimetres; None for whole scans.
    """
    voxels = [median(scan.shape[axis] for scan in scans) for axis in range(3)]
    if edges_mm is not None:
        voxels = [edge / median(scan.spacing_mm[axis] for scan in scans) for axis, edge in enumerate(edges_mm)]
    return round_up(voxels, multiple, LARGEST_PLANNED_EDGE)


def extents_mm(scans: Sequence[CachedScan], around_label: bool) -> npt.NDArray[np.float64]:
    """Return the extent (N, 3) of each scan, or of what is labelled in it, in millimetres."""
    voxels = [
        np.ptp(np.concatenate(list(scan.class_locations.values())), axis=0) + 1 if around_label else scan.shape
        for scan in scans
    ]
    return np.array(voxels) * np.array([scan.spacing_mm for scan in scans])
