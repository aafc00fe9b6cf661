"""Which crop of a scan one segmentation sample sees: around a structure, or anywhere."""

from dataclasses import dataclass

import numpy as np

from mim3d.caching.scan import CachedScan
from mim3d.core.types import Triple
from mim3d.loading.samples import Crop, Sample
from mim3d.tasks.segmentation.targets import PartialLabels


@dataclass(frozen=True)
class CropSampler:
    """Draws one crop per sample.

    Attributes:
        patch_size: Voxels that the network sees.
        positive_ratio: Share of the crops centred on a voxel of a random class; the others lie anywhere in the scan.
        affine_prob: Share of the crops that are read larger, for an affine change whose corners must hold voxels.
        margin_ratio: How much larger such a crop is read on each side, relative to the patch.
        ignore_label: Label value that no crop is centred on.
        partial: Gives the channels that a case has annotations of, where cases are annotated in part.
    """

    patch_size: Triple
    positive_ratio: float
    affine_prob: float = 0.0
    margin_ratio: float = 0.0
    ignore_label: int | None = None
    partial: PartialLabels | None = None

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        """Draw a crop from the scan's shape and class locations alone.

        Batch keys: ``image`` ``(1, C, *size)`` and ``label`` ``(1, *size)``; ``size`` is the patch, or the larger crop
        from which :class:`~mim3d.tasks.transforms.Augmenter` cuts it. Where cases are annotated in part
        also ``annotated`` ``(K,)``.
        """
        centre: np.ndarray | None = None
        if rng.random() < self.positive_ratio:
            # A voxel of a random class: rare and small structures are seen as often as large ones.
            locations, left_out = scan.class_locations, (0, self.ignore_label)
            classes = sorted(value for value, places in locations.items() if value not in left_out and len(places))
            if classes:
                places = locations[classes[int(rng.integers(len(classes)))]]
                centre = places[int(rng.integers(len(places)))]
        origin = [
            place_crop(voxels, size, None if centre is None else int(centre[axis]), rng)
            for axis, (voxels, size) in enumerate(zip(scan.shape, self.patch_size, strict=True))
        ]
        size = np.array(self.patch_size)
        if rng.random() < self.affine_prob:
            margin = np.ceil(size * self.margin_ratio).astype(int)
            origin, size = [int(voxel) for voxel in np.array(origin) - margin], size + 2 * margin
        footprint = (int(size[0]), int(size[1]), int(size[2]))
        crop = Crop((origin[0], origin[1], origin[2]), footprint, footprint)
        arrays = {} if self.partial is None else {"annotated": np.array(self.partial.channels(scan.case))}
        return Sample(images={"image": (crop,)}, labels={"label": (crop,)}, arrays=arrays)


def place_crop(voxels: int, size: int, centre: int | None, rng: np.random.Generator) -> int:
    """Return the first voxel of a crop along one axis: inside the scan, or covering all of a scan that is smaller.

    Args:
        voxels: Number of voxels of the scan along this axis.
        size: Number of voxels of the crop.
        centre: Voxel in the middle of the crop, moved no further than the scan's border asks; None draws a place.
        rng: Generator that the place is drawn from where it is open.
    """
    low, high = min(0, voxels - size), max(0, voxels - size)
    if centre is None or voxels < size:
        return int(rng.integers(low, high + 1))
    return min(max(centre - size // 2, low), high)
