"""The published data pipeline of MiM, in MONAI: whole volumes pickled once, loaded whole for every sample.

``PersistentDataset`` keeps what the transforms before the first random one give: float32 volumes of the body's box,
made longer until whole windows of 96 voxels fill them. As published, with a recent MONAI, it never finds again what it
kept (``weights_only`` refuses its own files); here it does.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data.dataset import PersistentDataset
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import CropForegroundd, RandSpatialCropd
from monai.transforms.intensity.dictionary import ScaleIntensityRanged
from monai.transforms.io.dictionary import LoadImaged
from monai.transforms.spatial.dictionary import Orientationd
from monai.transforms.transform import MapTransform, RandomizableTransform, Transform
from monai.transforms.utility.dictionary import EnsureChannelFirstd
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from mim3d.core.types import Triple
from yardstick.page_cache import drop

WINDOW_HU = (-1000.0, 1000.0)
#: Volumes are padded to multiples of this; the published default of ``roi_x``, ``roi_y`` and ``roi_z``.
DIVISOR = 96
#: Edge of every volume that the network is shown.
SHOWN = 96
NUM_CHILDREN = 4


class CutLevels(RandomizableTransform, MapTransform):
    """The root resized to 96^3 and four random cells of it at full resolution, instead of the root."""

    def __init__(self) -> None:
        MapTransform.__init__(self, ["image"])
        RandomizableTransform.__init__(self)

    def __call__(self, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``coarse`` (1, 1, 96, 96, 96) and ``middle`` (4, 1, 96, 96, 96), float32."""
        root = torch.as_tensor(data["image"])
        grid = [voxels // SHOWN for voxels in root.shape[1:]]
        places = self.R.choice(int(np.prod(grid)), NUM_CHILDREN, replace=False)
        cells = []
        for place in places:
            x, y, z = (int(index) * SHOWN for index in np.unravel_index(place, grid))
            cells.append(root[:, x : x + SHOWN, y : y + SHOWN, z : z + SHOWN])
        coarse = F.interpolate(root[None], (SHOWN, SHOWN, SHOWN), mode="trilinear", align_corners=False)
        return {"coarse": coarse, "middle": torch.stack(cells)}


def persistent_dataset(
    images: Sequence[Path], folder: Path, random_transforms: Sequence[Transform] = ()
) -> PersistentDataset:
    """The published data set of scans, kept in ``folder``.

    Args:
        images: the scans.
        folder: of the pickled volumes.
        random_transforms: what follows the pickled part.
    """
    low, high = WINDOW_HU
    kept = [
        LoadImaged(keys=["image"]),
        EnsureChannelFirstd(keys=["image"]),
        Orientationd(keys=["image"], axcodes="RAS", labels=None),
        ScaleIntensityRanged(keys=["image"], a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True),
        CropForegroundd(keys=["image"], source_key="image", k_divisible=[DIVISOR] * 3, allow_smaller=True),
    ]
    return PersistentDataset(
        data=[{"image": str(path)} for path in images],
        transform=Compose([*kept, *random_transforms]),
        cache_dir=folder,
        pickle_protocol=pickle.HIGHEST_PROTOCOL,
        weights_only=False,
    )


class PublishedSamples(Dataset[dict[str, Tensor]]):
    """Samples of the published pipeline: one whole volume loaded for each.

    Args:
        images: the scans.
        folder: of the pickled volumes, which are there already.
        root: voxels of the root along X, Y, Z.
        pickles: files to make the system forget before each sample, by scan; none where they may stay in memory.
        dropped_s: shared; the seconds that took are added to it.
    """

    def __init__(
        self, images: Sequence[Path], folder: Path, root: Triple, pickles: Sequence[Path], dropped_s: Tensor
    ) -> None:
        random_transforms = (RandSpatialCropd(keys=["image"], roi_size=root, random_size=False), CutLevels())
        self.samples = persistent_dataset(images, folder, random_transforms)
        self.pickles = pickles
        self.dropped_s = dropped_s

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.pickles:
            self.dropped_s += drop([self.pickles[index]])
        return self.samples[index]
