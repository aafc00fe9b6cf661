"""A cache as a MONAI data set: ``mim3d.CachedDataset(CACHE, transform)``."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from monai.data.dataset import Dataset
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import Randomizable

from mim3d.caching.cache import Cache, open_cache
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple


class CachedDataset(Dataset, Randomizable):
    """Replaces ``PersistentDataset(files, transform, folder)``; the loading transforms are left out.

    Each item is a dict: ``image``, a MetaTensor ``(C, X, Y, Z)`` float32 in source units (HU for CT) with its affine in
    RAS millimetres; ``label``, a MetaTensor ``(1, X, Y, Z)``, where the scan has one; ``id`` and ``patient``.

    With ``crop`` only a crop of a scan is read, at a random place of its body: many times faster than reading all of it
    to cut the crop out. MONAI's loader seeds the places in each of its processes; ``set_random_state`` does by hand.

    Args:
        cache: The cache, or its folder.
        transform: MONAI transform that is applied to each item.
        crop: Voxels along X, Y, Z to read; whole scans are read if not given.

    Raises:
        DataError: The folder is no cache, or a damaged one.
        ConfigError: The crop is empty along an axis.
    """

    def __init__(
        self,
        cache: Cache | str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        crop: Triple | None = None,
    ) -> None:
        if crop is not None and min(crop) < 1:
            raise ConfigError(f"crop {crop} must be three positive numbers, such as 96 96 96.")
        super().__init__(cache if isinstance(cache, Cache) else open_cache(os.fspath(cache)), transform)
        self.crop = crop

    def _transform(self, index: int) -> Any:
        scan: CachedScan = self.data[index]
        size = self.crop or scan.shape
        origin = (0, 0, 0)
        if self.crop is not None:
            # A random crop that touches the body's box, inside the scan where it fits.
            places = []
            for voxels, start, stop, length in zip(scan.shape, *scan.body_box, size, strict=True):
                limit = max(voxels - length, 0)
                low, high = sorted((min(start, limit), min(max(stop - length, 0), limit)))
                places.append(int(self.R.randint(low, high + 1)))
            origin = (places[0], places[1], places[2])
        affine = scan.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ np.array(origin)
        place = torch.from_numpy(affine)
        image = torch.from_numpy(scan.to_values(scan.read(origin, size)))
        item: Any = {"image": MetaTensor(image, affine=place), "id": scan.case.id, "patient": scan.case.patient}
        if scan.has_label:
            label = torch.from_numpy(scan.read_label(origin, size)[None].astype(np.int32))
            item["label"] = MetaTensor(label, affine=place)
        return item if self.transform is None else self.transform(item)
