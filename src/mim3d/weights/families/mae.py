"""MAE on plain transformers: of volumes, and of pictures (He et al. 2022), whose tokens are made as deep as wide."""

from dataclasses import replace
from typing import Any

from mim3d.weights.families.family import ExpectedInput, Tensors
from mim3d.weights.families.vit_shapes import (
    family_of_vit,
    settings_of_vit,
    to_own_vit,
)
from mim3d.weights.states import HeldWeights

#: Heads of MAE's base, large and huge size, by width and depth.
HEADS = {(768, 12): 12, (1024, 24): 16, (1280, 32): 16}

MAE_3D = replace(
    family_of_vit(HEADS),
    name="MAE of volumes, or another plain transformer in timm's names",
    absent=(r"\bblocks\.\d+\.\d+\.", r"\bencoder_pos_embed$", r"\.ls1\.gamma$"),
    licence="of whoever trained it",
    source="He et al., CVPR 2022 (https://github.com/facebookresearch/mae), in three dimensions",
)


def inflated(tensors: Tensors, held: HeldWeights) -> Tensors:
    """Tensors of a transformer of volumes: each token has the same kernel, and position, at every depth.

    Where a volume repeats one picture along Z, its tokens are those of the picture: kernels are divided by their depth
    (Carreira and Zisserman, CVPR 2017).
    """
    kernel = tensors["embed.weight"]
    tensors["embed.weight"] = kernel[..., None].expand(*kernel.shape, kernel.shape[-1]) / kernel.shape[-1]
    token, table = tensors.get("cls_token"), tensors.get("pos_embed")
    if table is not None and table.ndim == 3 and table.shape[1] > 0 and table.shape[::2] == (1, len(kernel)):
        first = 1 if token is not None and round((table.shape[1] - 1) ** 0.5) ** 2 == table.shape[1] - 1 else 0
        if first and token is not None and token.shape == table[:, :1].shape:
            tensors["cls_token"] = token + table[:, :1]
        tensors["position_table"] = table[0, first:]
        del tensors["pos_embed"]
    return to_own_vit(tensors, held)


def settings_of_inflated(tensors: Tensors) -> dict[str, Any]:
    """Settings of our ViT, whose positions are the same at every depth."""
    shown: dict[str, Any] = settings_of_vit(HEADS)(tensors)
    if (table := tensors.get("position_table")) is not None:
        edge = round(len(table) ** 0.5)
        shown["position_grid"] = [edge, edge, 1]
    return shown


MAE_2D = replace(
    MAE_3D,
    name="MAE of pictures (He et al. 2022), or another plain transformer of pictures in timm's names",
    axes=4,
    convert=inflated,
    settings=settings_of_inflated,
    expects=ExpectedInput(
        modality="photographs (ImageNet)",
        spacing="none: pictures of 224 x 224 pixels",
        orientation="rows and columns of a picture are taken for X and Y",
        values="each channel of 0 to 1 less ImageNet's mean, over its deviation",
        channels="red, green, blue; for one channel give --input_layers mean, as is the default",
    ),
    remark=(
        "each kernel is repeated along Z and divided by its depth, and positions are the same at every depth, so that "
        "a volume that repeats one picture along Z has the tokens of the picture"
    ),
    licence="not for commercial use (CC BY-NC 4.0, where the weights are those of MAE's authors)",
    commercial=False,
    source="https://github.com/facebookresearch/mae",
)
