"""Hi-End-MAE: a decoder that attends to several layers of the encoder, on 10,000 CTs (Tang et al. 2025)."""

from mim3d.weights.families.family import ExpectedInput, Family
from mim3d.weights.families.vit_shapes import ANCHORS, ENCODER, LAST, RENAMES, settings_of_vit, to_own_vit, unfit_vit

#: Heads of its base and large size, by width and depth.
HEADS = {(768, 12): 12, (1536, 12): 16}

HI_END_MAE = Family(
    name="Hi-End-MAE (Tang et al. 2025)",
    anchors=(*ANCHORS, "cls_token"),
    marks=(r"\bencoder_pos_embed$",),
    # The table of positions lies beside the encoder.
    encoder=rf"encoder_pos_embed$|{ENCODER}",
    renames=((r"^encoder_pos_embed$", "pos_embed"), *RENAMES),
    convert=to_own_vit,
    last=LAST,
    backbone="vit",
    settings=settings_of_vit(HEADS),
    unfit=unfit_vit(HEADS),
    open=("num_heads",),
    # The published code reads scans that were prepared before, without saying how.
    expects=ExpectedInput(modality="CT"),
    remark="it was trained on cubes of 96 voxels; its authors do not say how scans were prepared",
    licence="Apache 2.0 (the repository)",
    source="https://github.com/FengheTan9/Hi-End-MAE",
)
