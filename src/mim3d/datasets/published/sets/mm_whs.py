"""MM-WHS CT: seven parts of the heart on CT."""

from mim3d.datasets.published.presets import NIFTI, FileNames, Preset
from mim3d.scans.intensity import Intensity

MM_WHS = Preset(
    name="MM-WHS CT",
    aliases=("MM-WHS", "MMWHS", "Whole Heart"),
    labels={
        0: "background",
        205: "myocardium of the left ventricle",
        420: "left atrium",
        500: "left ventricle",
        550: "right atrium",
        600: "right ventricle",
        820: "ascending aorta",
        850: "pulmonary artery",
    },
    num_cases=20,
    spacing_mm=(1.5, 1.5, 1.5),
    intensity=Intensity(window=(0.0, 1700.0)),
    files=FileNames(
        image=rf"ct_train_(?P<case>\d{{4}})_image{NIFTI}",
        label=rf"ct_train_(?P<case>\d{{4}})_label{NIFTI}",
        example="ct_train_{0}_image.nii.gz with ct_train_{0}_label.nii.gz",
    ),
    folds=("1001-1004", "1005-1008", "1009-1012", "1013-1016", "1017-1020"),
    citation=(
        "Zhuang and Shen, Multi-scale patch and multi-modality atlases for whole heart segmentation of MRI, Medical "
        "Image Analysis 31 (2016) 77-87"
    ),
    url="https://zmiclab.github.io/zxh/0/mmwhs",
)
