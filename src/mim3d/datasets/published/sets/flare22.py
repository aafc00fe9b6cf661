"""FLARE22: thirteen abdominal organs on CT; nobody published folds."""

from mim3d.datasets.published.presets import NIFTI, FileNames, Preset, Variation, numbered
from mim3d.scans.intensity import Intensity

LABELS = numbered(
    "liver", "right kidney", "spleen", "pancreas", "aorta", "inferior vena cava", "right adrenal gland",
    "left adrenal gland", "gallbladder", "oesophagus", "stomach", "duodenum", "left kidney",
)  # fmt: skip

FLARE22 = Preset(
    name="FLARE22",
    aliases=("FLARE",),
    labels=LABELS,
    num_cases=50,
    spacing_mm=(1.5, 1.5, 2.0),
    intensity=Intensity(window=(-175.0, 250.0)),
    variation=Variation(flip_prob=0.2, rotate90_prob=0.2, shift_prob=0.1),
    files=FileNames(
        image=rf"FLARE22_Tr_(?P<case>\d{{4}})_0000{NIFTI}",
        label=rf"FLARE22_Tr_(?P<case>\d{{4}}){NIFTI}",
        example="images/FLARE22_Tr_{0}_0000.nii.gz with labels/FLARE22_Tr_{0}.nii.gz",
    ),
    citation=(
        "Ma et al., Unleashing the strengths of unlabelled data in deep learning-assisted pan-cancer abdominal organ "
        "quantification: the FLARE22 challenge, The Lancet Digital Health 6 (2024) e815-e826"
    ),
    url="https://flare22.grand-challenge.org",
)
