"""What shapes and names show of a Swin encoder in the layout of MONAI, which all its families share."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mim3d.weights.families.family import Family

#: A block of each stage holds the table of biases, whose shape shows both the window and the heads.
_TABLE = "attn.relative_position_bias_table"

#: Said of weights that were trained before MONAI 1.5.
PUBLISHED_MERGING = (
    "neighbours are merged as MONAI did before 1.5, when these weights were made; --backbone.downsample merging does "
    "as it does now"
)


def settings_of_swin(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of our Swin, by the tensors of an encoder by our names."""
    stem = tensors["patch_embed.proj.weight"]
    depths: list[int] = []
    while blocks := {int(found[1]) for name in tensors if (found := _in_stage(len(depths) + 1).match(name))}:
        depths.append(max(blocks) + 1)
    tables = [tensors.get(f"layers{stage}.0.blocks.0.{_TABLE}") for stage in range(1, len(depths) + 1)]
    shown: dict[str, Any] = {
        "feature_size": stem.shape[0],
        "in_channels": stem.shape[1],
        "depths": depths,
        "v2": any(re.match(r"layers\d+c\.", name) for name in tensors),
    }
    if tables and all(table is not None and table.ndim == 2 for table in tables):
        shown["num_heads"] = [table.shape[1] for table in tables if table is not None]
        shown["window_size"] = (round(tables[0].shape[0] ** (1 / 3)) + 1) // 2 if tables[0] is not None else 0
    hidden = tensors.get("layers1.0.blocks.0.mlp.linear1.weight")
    if hidden is not None and hidden.ndim == 2:
        shown["mlp_ratio"] = hidden.shape[0] / hidden.shape[1]
    return shown


def settings_of_published_swin(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same of weights that were trained before MONAI 1.5, whose merging read two of eight neighbours twice."""
    return {**settings_of_swin(tensors), "downsample": "published"}


def lost_stages(shown: Mapping[str, Any], *_: Any) -> str:
    """What a Swin encoder lacks of the four stages that SwinUNETR has, as the end of a sentence."""
    found = len(shown["depths"])
    if found == 4:
        return ""
    return f", but holds {found} of the 4 stages that SwinUNETR has; it is not whole, so copy it again"


def _in_stage(stage: int) -> re.Pattern[str]:
    return re.compile(rf"layers{stage}\.0\.blocks\.(\d{{1,4}})\.")


#: What all families with a Swin encoder have in common.
SWIN = Family(
    name="Swin",
    source="https://github.com/Project-MONAI/MONAI",
    anchors=("patch_embed.proj.weight", f"layers1.0.blocks.0.{_TABLE}"),
    encoder=r"patch_embed\.|layers\d+c?\.|absolute_pos_embed$",
    # They follow from the length of the window.
    drops=(r"relative_position_index$",),
    # MLPs as they were called before MONAI took the network in.
    renames=((r"\.mlp\.fc([12])\.", r".mlp.linear\1."),),
    last="layers4.0.downsample.reduction.weight",
    backbone="swin",
    settings=settings_of_swin,
    unfit=lost_stages,
)

#: The same of those that were trained before MONAI 1.5.
PUBLISHED_SWIN = replace(SWIN, settings=settings_of_published_swin, remark=PUBLISHED_MERGING)
