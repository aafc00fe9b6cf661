"""nnssl: self-supervised pre-training of nnU-Net's networks, such as the OpenMind checkpoints (Wald et al. 2024)."""

from dataclasses import replace

from mim3d.scans.intensity import Intensity
from mim3d.weights.families.family import ExpectedInput
from mim3d.weights.families.nnunet import NNUNET_RESENC
from mim3d.weights.families.resenc_shapes import ORIENTATION

NNSSL_RESENC = replace(
    NNUNET_RESENC,
    name="nnssl ResEnc (Wald et al. 2024)",
    keys=("nnssl_adaptation_plan",),
    # The plan in the file counts more, where it has one.
    expects=ExpectedInput(
        modality="MR of the head (OpenMind)",
        spacing_mm=(1.0, 1.0, 1.0),
        orientation=ORIENTATION,
        intensity=Intensity(kind="zscore", window=None),
    ),
    licence="CC BY 4.0 (the OpenMind checkpoints)",
    source="https://github.com/MIC-DKFZ/nnssl",
)

PRIMUS = replace(
    NNSSL_RESENC,
    name="Primus (Wald et al. 2025), of nnssl or nnU-Net",
    anchors=("eva.blocks.0.attn.q_proj.weight", "eva.blocks.0.mlp.norm.weight"),
    axes=2,
    keys=(),
    backbone="",
    why_not=(
        "its MLPs norm their hidden channels, learned positions are added to rotary ones of other frequencies, and no "
        "backbone of mim3d computes that"
    ),
)
