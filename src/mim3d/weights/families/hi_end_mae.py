"""Hi-End-MAE: a decoder that attends to several layers of the encoder, on 10,000 CTs (Tang et al. 2025)."""

from dataclasses import replace

from mim3d.weights.families.family import ExpectedInput
from mim3d.weights.families.vit_shapes import ANCHORS, ENCODER, RENAMES, family_of_vit

#: Heads of its base and large size, by width and depth.
HEADS = {(768, 12): 12, (1536, 12): 16}

HI_END_MAE = replace(
    family_of_vit(HEADS),
    name="Hi-End-MAE (Tang et al. 2025)",
    anchors=(*ANCHORS, "cls_token"),
    marks=(r"\bencoder_pos_embed$",),
    # The table of positions lies beside the encoder, and keeps the prefixes of both.
    encoder=rf"(.*\.)?encoder_pos_embed$|{ENCODER}",
    renames=((r"^(.*\.)?encoder_pos_embed$", "pos_embed"), *RENAMES),
    # The published code reads scans that were prepared before, without saying how.
    expects=ExpectedInput(modality="CT"),
    remark="it was trained on cubes of 96 voxels; its authors do not say how scans were prepared",
    licence="Apache 2.0 (the repository)",
    source="https://github.com/FengheTan9/Hi-End-MAE",
)
