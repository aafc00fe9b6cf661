"""The variation of training samples by MONAI's transforms, which change image and label map alike."""

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.networks.layers.simplelayers import GaussianFilter
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from monai.transforms.spatial.dictionary import RandAffined, RandFlipd, RandRotate90d, RandSimulateLowResolutiond
from monai.transforms.transform import RandomizableTransform
from torch import Tensor
from torch.nn import functional as F

from mim3d.core.types import Spacing, Triple
from mim3d.tasks.augmentation import Augmentation

#: Widths of the Gaussian after which it is cut off.
_CUT_OFF = 4.0


class Augmenter:
    """Changes one finished sample, as a pure function of the sample and a seed; can be sent to worker processes.

    Args:
        settings: Planned settings.
        patch_size: Voxels the network sees. A larger crop is cut to it by an affine change.
        spacing_mm: Typical voxel size of the training scans.
    """

    def __init__(self, settings: Augmentation, patch_size: Triple, spacing_mm: Spacing) -> None:
        self.patch_size = patch_size
        both, flip_axes = ["image", "label"], settings.flip_axes or ()
        affine = RandAffined(
            both,
            prob=1.0,
            rotate_range=[float(np.deg2rad(angle)) for angle in settings.rotation_degrees or (0.0, 0.0, 0.0)],
            scale_range=(settings.zoom_ratio,) * 3,
            spatial_size=patch_size,
            mode=("bilinear", "nearest"),
            padding_mode="border",
        )
        self._affine = Compose([affine])
        flips = [RandFlipd(both, prob=settings.flip_prob, spatial_axis=axis) for axis in flip_axes]
        turns = [
            RandRotate90d(both, prob=settings.rotate90_prob, max_k=3, spatial_axes=plane)
            for plane in square_planes(flip_axes, patch_size, spacing_mm)
        ]
        # In the order of nnU-Net (Isensee et al. 2021): the scanner's noise and blur before what maps intensities.
        intensities = [
            RandGaussianNoised("image", prob=settings.noise_prob, std=settings.noise_std),
            RandBlurd("image", settings.blur_prob, settings.blur_sigma),
            RandScaleIntensityd("image", prob=settings.scale_prob, factors=settings.scale_ratio),
            RandShiftIntensityd("image", prob=settings.shift_prob, offsets=settings.shift),
            RandSimulateLowResolutiond(
                "image", prob=settings.low_resolution_prob, zoom_range=settings.low_resolution_zoom
            ),
            RandAdjustContrastd("image", prob=settings.gamma_prob, gamma=settings.gamma),
        ]
        self._changes = Compose([*flips, *turns, *intensities])

    def __call__(self, sample: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Vary ``image`` ``(1, C, *size)`` and ``label`` ``(1, *size)``; both come back in the patch size."""
        data = {"image": sample["image"][0], "label": sample["label"].float()}
        if tuple(data["label"].shape[1:]) != self.patch_size:
            self._affine.set_random_state(seed)
            data = self._affine(data)
        self._changes.set_random_state(seed)
        data = self._changes(data)
        image, label = (torch.as_tensor(data[key]).contiguous() for key in ("image", "label"))
        return {**sample, "image": image[None], "label": label.round().long()}


def square_planes(flip_axes: Sequence[int], patch_size: Triple, spacing_mm: Spacing) -> list[tuple[int, int]]:
    """Return the planes in which a quarter turn keeps the patch size and the proportions of the anatomy."""
    return [
        (one, other)
        for one, other in itertools.combinations(sorted(flip_axes), 2)
        if patch_size[one] == patch_size[other] and abs(spacing_mm[one] / spacing_mm[other] - 1) < 0.05
    ]


class RandBlurd(RandomizableTransform):
    """Smooths one entry of a sample, by another width along each axis.

    MONAI's own transform takes what lies beyond a crop for 0, so that borders fade; here they go on as they end.

    Args:
        key: Key of the entry ``(C, X, Y, Z)``.
        prob: Probability of the change.
        sigma: Smallest and largest width of the Gaussian, in voxels.
    """

    def __init__(self, key: str, prob: float, sigma: tuple[float, float]) -> None:
        super().__init__(prob)
        self.key, self.sigma = key, sigma

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the sample, changed or not."""
        self.randomize(None)
        if not self._do_transform:
            return dict(data)
        widths = self.R.uniform(*self.sigma, size=3).tolist()
        reach = int(_CUT_OFF * max(widths) + 0.5)
        image_1CXYZ = torch.as_tensor(data[self.key])[None].float()
        smooth: Tensor = GaussianFilter(3, widths, truncated=_CUT_OFF)(F.pad(image_1CXYZ, (reach,) * 6, "replicate"))[0]
        inside = slice(reach, -reach)
        return {**data, self.key: smooth[:, inside, inside, inside] if reach else smooth}
