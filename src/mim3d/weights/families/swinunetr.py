"""SwinUNETR: weights of its self-supervised pre-training, and networks of MONAI as users train them."""

from dataclasses import replace

from mim3d.scans.intensity import CT_WINDOW_HU, Intensity
from mim3d.weights.families.family import ExpectedInput, Family
from mim3d.weights.families.swin_shapes import PUBLISHED_MERGING, PUBLISHED_SWIN, SWIN

#: Heads beside the encoder, or MLPs under their first names (``model_swinvit.pt``).
SWINUNETR_PRETRAINING = replace(
    PUBLISHED_SWIN,
    name="SwinUNETR pre-training (Tang et al. 2022)",
    marks=(r"layers1\.0\.blocks\.0\.mlp\.fc1\.|\b(rotation_head|contrastive_head)\.|\bswin_vit\.",),
    absent=(r"\bbackbone\.swinViT\.",),
    expects=ExpectedInput(
        modality="CT",
        spacing_mm=(1.5, 1.5, 2.0),
        orientation="RAS+",
        intensity=Intensity(window=CT_WINDOW_HU),
    ),
    remark=(
        "the published script names this voxel size and its authors fine-tune at it, but its loader does not resample; "
        f"{PUBLISHED_MERGING}"
    ),
    licence="Apache 2.0 (the repository)",
    source="https://github.com/Project-MONAI/research-contributions/tree/main/SwinUNETR/Pretrain",
)

MONAI_SWINUNETR = replace(
    SWIN,
    name="MONAI SwinUNETR",
    marks=(r"\bswinViT\.",),
    remark=(
        "neighbours are merged as MONAI does since 1.5; for weights that were trained before, give "
        "--backbone.downsample published"
    ),
    licence="of whoever trained it",
    source="https://github.com/Project-MONAI/MONAI (monai.networks.nets.SwinUNETR)",
)

#: Of any number of stages.
OWN_SWIN = replace(
    MONAI_SWINUNETR,
    name="mim3d's Swin without its card, or MONAI's SwinTransformer",
    marks=(),
    last="",
    unfit=Family.unfit,
    source="mim3d, or https://github.com/Project-MONAI/MONAI (monai.networks.nets.swin_unetr.SwinTransformer)",
)
