"""A Gaussian blur that keeps the borders of a crop as bright as they are."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.networks.layers.simplelayers import GaussianFilter
from monai.transforms.transform import RandomizableTransform
from torch import Tensor
from torch.nn import functional as F

#: Widths of the Gaussian after which it is cut off.
_CUT_OFF = 4.0


class RandBlurd(RandomizableTransform):
    """Smooths one entry of a sample, by another width along each axis.

    MONAI's own transform takes what lies beyond a crop for 0, so that borders fade; here they go on as they end.

    Args:
        key: of the entry ``(C, X, Y, Z)``.
        prob: of the change.
        sigma: smallest and largest width, in voxels.
    """

    def __init__(self, key: str, prob: float, sigma: tuple[float, float]) -> None:
        super().__init__(prob)
        self.key, self.sigma = key, sigma

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """The sample, changed or not."""
        self.randomize(None)
        if not self._do_transform:
            return dict(data)
        widths = self.R.uniform(*self.sigma, size=3).tolist()
        return {**data, self.key: blurred(torch.as_tensor(data[self.key]), widths)}


def blurred(image_CXYZ: Tensor, sigma: list[float]) -> Tensor:
    """The image convolved with a Gaussian of a width ``sigma`` in voxels along X, Y and Z."""
    reach = int(_CUT_OFF * max(sigma) + 0.5)
    padded = F.pad(image_CXYZ[None].float(), (reach,) * 6, mode="replicate")
    smooth: Tensor = GaussianFilter(3, sigma, truncated=_CUT_OFF)(padded)[0]
    inside = slice(reach, -reach)
    return smooth[:, inside, inside, inside] if reach else smooth
