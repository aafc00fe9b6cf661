"""3DINO: DINOv2 on about 100,000 CTs and MRIs (Xu et al. 2025)."""

from dataclasses import replace

from mim3d.weights.families.family import ExpectedInput
from mim3d.weights.families.vit_shapes import ANCHORS, RENAMES, family_of_vit

#: Heads of its base and large size, by width and depth; the large one was published.
HEADS = {(768, 12): 12, (1024, 24): 16}

THREE_DINO = replace(
    family_of_vit(HEADS),
    name="3DINO (Xu et al. 2025), or DINOv2 of volumes",
    # Blocks lie in chunks for sharding, with their own numbers inside.
    anchors=(ANCHORS[0], "cls_token"),
    marks=(r"\bblocks\.\d+\.(\d+\.norm1|ls1)\.",),
    renames=((r"^blocks\.\d+\.(\d+\.)", r"blocks.\1"), *RENAMES),
    expects=ExpectedInput(
        modality="CT and MR of more than ten organs",
        spacing="none: random crops were resized to 96 or 112 voxels",
        orientation="RAS+",
        values="the percentiles 0.05 to 99.95 of each scan mapped to -1 to 1",
    ),
    remark="it was trained on cubes of 96 voxels, then of 112; positions are interpolated for crops of other sizes",
    licence="not for commercial use, and no derivatives may be passed on (CC BY-NC-ND 4.0)",
    commercial=False,
    source="https://huggingface.co/AICONSlab/3DINO-ViT",
)
