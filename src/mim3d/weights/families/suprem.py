"""SuPreM: networks that learned to segment AbdomenAtlas (Li et al. 2024); of the three, Swin is one of ours."""

from dataclasses import replace

from mim3d.weights.families.swin_shapes import PUBLISHED_SWIN
from mim3d.weights.families.voco import SOFT_TISSUE

SUPREM_SWIN = replace(
    PUBLISHED_SWIN,
    name="SuPreM Swin UNETR (Li et al. 2024)",
    marks=(r"\bbackbone\.swinViT\.", r"^net:|\b(organ_embedding|precls_conv|controller)\b"),
    absent=(r"\b(student|teacher)\.", r"\blayers1c\.", r"\b(rotation_head|contrastive_head)\."),
    expects=SOFT_TISSUE,
    licence="not for commercial use (learned from AbdomenAtlas, CC BY-NC-SA 4.0; its README names pending patents)",
    commercial=False,
    source="https://github.com/MrGiovanni/SuPreM",
)

SUPREM_UNET = replace(
    SUPREM_SWIN,
    name="SuPreM U-Net (Li et al. 2024)",
    anchors=("down_tr64.ops.0.conv1.weight", "down_tr512.ops.1.conv1.weight"),
    marks=(),
    absent=(),
    backbone="",
    remark="",
    why_not="it is the 3-D U-Net of Models Genesis (batch norms, max pooling), which no backbone of mim3d is",
)

SUPREM_SEGRESNET = replace(
    SUPREM_UNET,
    name="SegResNet of MONAI (SuPreM publishes one; Li et al. 2024)",
    anchors=("convInit.conv.weight", "down_layers.0.1.conv1.conv.weight"),
    why_not="it is MONAI's SegResNet (group norms before convolutions), which no backbone of mim3d is",
)
