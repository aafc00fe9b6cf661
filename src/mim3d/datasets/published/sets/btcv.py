"""BTCV: thirteen abdominal organs on CT."""

from mim3d.datasets.published.presets import NIFTI, FileNames, Preset, Variation, numbered
from mim3d.scans.intensity import Intensity

LABELS = numbered(
    "spleen", "right kidney", "left kidney", "gallbladder", "oesophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
)  # fmt: skip

BTCV = Preset(
    name="BTCV",
    aliases=("Synapse", "Beyond the Cranial Vault"),
    labels=LABELS,
    num_cases=30,
    spacing_mm=(1.5, 1.5, 2.0),
    intensity=Intensity(window=(-175.0, 250.0)),
    variation=Variation(flip_prob=0.1, rotate90_prob=0.1, shift_prob=0.5),
    files=FileNames(
        image=rf"img(?P<case>\d{{4}}){NIFTI}",
        label=rf"label(?P<case>\d{{4}}){NIFTI}",
        example="imagesTr/img{0}.nii.gz with labelsTr/label{0}.nii.gz",
    ),
    folds=("35-40", "29-34", "23-28", "7-10 21 22", "1-6"),
    citation="Landman et al., MICCAI Multi-Atlas Labeling Beyond the Cranial Vault: Workshop and Challenge (2015)",
    url="https://www.synapse.org/Synapse:syn3193805",
)
