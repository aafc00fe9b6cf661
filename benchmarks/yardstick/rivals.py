"""Segmentation networks of others, untrained: what mim3d's stand beside."""

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.swin_unetr import SwinUNETR
from torch import nn

from yardstick.machine import Row

SWIN, PLAIN = "MONAI SwinUNETR", "plain U-Net, 32 to 320 channels"


def rivals(num_classes: int, device: torch.device, quick: bool) -> dict[str, nn.Module]:
    """Networks of others; SwinUNETR where there is einops, which it needs."""
    torch.manual_seed(0)
    filters = (8, 16, 16) if quick else (32, 64, 128, 256, 320, 320)
    strides = (1, *(2,) * (len(filters) - 1))
    plain = DynUNet(3, 1, num_classes, [3] * len(filters), strides, strides[1:], filters=filters)
    found: dict[str, nn.Module] = {PLAIN: plain.to(device)}
    if find_spec("einops") is not None:
        found[SWIN] = SwinUNETR(1, num_classes, feature_size=12 if quick else 48).to(device)
    return found


def without_einops() -> Iterator[Row]:
    """A row that says what is missing."""
    if find_spec("einops") is None:
        yield {"network": SWIN, "left_out": "einops, which it needs, is not installed"}
