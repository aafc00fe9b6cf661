"""nnU-Net: its residual encoders are ours, its plain ones are not."""

from dataclasses import replace

from mim3d.weights.families.family import ExpectedInput, Family
from mim3d.weights.families.resenc_shapes import (
    ANCHORS,
    DROPS,
    ENCODER,
    ORIENTATION,
    expected_by_plan,
    settings_of_resenc,
    turned_back,
    unfit_resenc,
)

NNUNET_RESENC = Family(
    name="nnU-Net residual encoder (Isensee et al. 2024)",
    anchors=ANCHORS,
    encoder=ENCODER,
    drops=DROPS,
    convert=turned_back,
    backbone="resenc",
    settings=settings_of_resenc,
    unfit=unfit_resenc,
    expects=ExpectedInput(orientation=ORIENTATION),
    expects_in_file=expected_by_plan,
    licence="of whoever trained it",
    source="https://github.com/MIC-DKFZ/nnUNet",
)

NNUNET_PLAIN = replace(
    NNUNET_RESENC,
    name="nnU-Net with plain convolutions (PlainConvUNet)",
    anchors=("stages.0.0.convs.0.conv.weight", "stages.1.0.convs.0.conv.weight"),
    backbone="",
    why_not="its encoder has no residual blocks, and no backbone of mim3d is such a network",
)
