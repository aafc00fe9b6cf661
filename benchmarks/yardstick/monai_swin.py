"""MONAI's SwinTransformer, for what ours is compared with."""

from typing import Any

import monai.networks.nets.swin_unetr as swin_unetr
from torch import Tensor, nn

from mim3d.backbones.swin import STEM_EDGE, Swin


def _rearranged(features: Tensor, pattern: str) -> Tensor:
    """The axes of a tensor in another order: all that MONAI uses einops for here."""
    before, after = (side.split() for side in pattern.split("->"))
    return features.permute([before.index(axis) for axis in after])


def monai_swin(recipe: Swin, **settings: Any) -> nn.Module:
    """MONAI's encoder with the settings of ours, without einops."""
    swin_unetr.rearrange = _rearranged
    return swin_unetr.SwinTransformer(
        in_chans=recipe.in_channels,
        embed_dim=recipe.feature_size,
        window_size=(recipe.window_size,) * 3,
        patch_size=(STEM_EDGE,) * 3,
        depths=recipe.depths,
        num_heads=recipe.num_heads,
        mlp_ratio=recipe.mlp_ratio,
        drop_path_rate=recipe.drop_path,
        use_checkpoint=recipe.recompute,
        downsample=recipe.downsample,
        use_v2=recipe.v2,
        **settings,
    )


def as_monai_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What MONAI's encoder holds, less the tables that follow from the window and ours does not store."""
    return {name: value for name, value in state.items() if not name.endswith("relative_position_index")}
