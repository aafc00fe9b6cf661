"""CC-CCII: pneumonia and healthy lungs on CT, as slice images; a classification without published folds."""

from mim3d.datasets.published.presets import Preset
from mim3d.scans.intensity import Intensity

CC_CCII = Preset(
    name="CC-CCII",
    aliases=("CCCCII",),
    task="classification",
    # Its slices are 8-bit images in which the owners chose the window: 0 to 255 is from minimum to maximum.
    intensity=Intensity(window=(0.0, 255.0)),
    classes={"CP": "common pneumonia", "NCP": "COVID-19 pneumonia", "Normal": "normal"},
    num_cases=4178,
    spacing_mm=None,
    patch_size=(384, 384, 32),
    citation=(
        "Zhang et al., Clinically Applicable AI System for Accurate Diagnosis, Quantitative Measurements, and "
        "Prognosis of COVID-19 Pneumonia Using Computed Tomography, Cell 181 (2020) 1423-1433"
    ),
    url="http://ncov-ai.big.ac.cn/download",
)
