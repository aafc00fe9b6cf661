"""nnssl: self-supervised pre-training of nnU-Net's networks, such as the OpenMind checkpoints (Wald et al. 2024)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mim3d.scans.intensity import Intensity
from mim3d.weights.families.family import ExpectedInput
from mim3d.weights.families.nnunet import NNUNET_RESENC
from mim3d.weights.families.resenc_shapes import ORIENTATION

#: What the networks of the OpenMind checkpoints expect; the plan in a file counts more, where it has one.
OPENMIND = ExpectedInput(
    modality="MR of the head (OpenMind)",
    spacing_mm=(1.0, 1.0, 1.0),
    orientation=ORIENTATION,
    intensity=Intensity(kind="zscore", window=None),
)

#: What its files have in common, whatever the network.
OF_NNSSL: Mapping[str, Any] = {
    "keys": ("nnssl_adaptation_plan",),
    "expects": OPENMIND,
    "licence": "CC BY 4.0 (the OpenMind checkpoints)",
    "source": "https://github.com/MIC-DKFZ/nnssl",
}

NNSSL_RESENC = replace(NNUNET_RESENC, name="nnssl ResEnc (Wald et al. 2024)", **OF_NNSSL)
