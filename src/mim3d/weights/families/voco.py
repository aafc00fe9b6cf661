"""VoCo: volume contrast on 10,000 CTs (2024), and its large-scale sequel in three sizes."""

from dataclasses import replace

from mim3d.scans.intensity import Intensity
from mim3d.weights.families.family import ExpectedInput
from mim3d.weights.families.swin_shapes import PUBLISHED_MERGING, PUBLISHED_SWIN

#: CT of soft tissue, as VoCo and SuPreM see it.
SOFT_TISSUE = ExpectedInput(
    modality="CT",
    spacing_mm=(1.5, 1.5, 1.5),
    orientation="RAS+",
    intensity=Intensity(window=(-175.0, 250.0)),
)

#: Projection heads beside one backbone; feature size 48 (B), 96 (L) or 192 (H).
VOCO_LARGE = replace(
    PUBLISHED_SWIN,
    name="VoCo large-scale (Wu et al. 2024)",
    marks=(r"\bbackbone\.swinViT\.", r"\b(student|teacher)\.layer1\.", r"\blayers1c\."),
    expects=SOFT_TISSUE,
    remark=f"scans of the chest were seen at 1.25 x 1.25 x 5 mm and -1000 to 500 HU; {PUBLISHED_MERGING}",
    source="https://github.com/Luffy03/Large-Scale-Medical",
)

#: A student and a teacher as training saves them, or one of them alone, without the decoder that SwinUNETR has.
VOCO_10K = replace(
    PUBLISHED_SWIN,
    name="VoCo 10k (Wu et al. 2024)",
    marks=(r"\bswinViT\.layers1c\.",),
    absent=(r"\bbackbone\.swinViT\.", r"\b(decoder1|out)\."),
    expects=SOFT_TISSUE,
    remark=f"its published loader resizes each scan to 384 x 384 x 96 voxels; {PUBLISHED_MERGING}",
    source="https://github.com/Luffy03/VoCo",
)
