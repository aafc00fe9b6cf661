"""A small labelled data set on disk: bright and very bright balls in noise, as a Decathlon folder."""

import json
from pathlib import Path

import nibabel
import numpy as np

#: Declared label values are not consecutive on purpose.
LABELS = {0: "background", 2: "ball", 5: "core"}


def ball_scan(seed: int, shape: tuple[int, int, int] = (22, 20, 18)) -> tuple[np.ndarray, np.ndarray]:
    """An image (X, Y, Z) float32 and its label map uint8."""
    rng = np.random.default_rng(seed)
    centre = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
    places = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm(places - centre, axis=-1)
    label = np.where(distance < 3, 5, np.where(distance < 6, 2, 0)).astype(np.uint8)
    image = rng.normal(100, 8, shape) + 80 * (label == 2) + 160 * (label == 5)
    return image.astype(np.float32), label


def write_scan(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1.0, 1.2, 1.0]) if affine is None else affine), path)


def write_ball_set(folder: Path, num_cases: int = 6) -> Path:
    """Write a Decathlon folder and return it."""
    training = []
    for index in range(num_cases):
        image, label = ball_scan(index, (22 + index, 20, 18))
        names = {"image": f"imagesTr/ball_{index}.nii.gz", "label": f"labelsTr/ball_{index}.nii.gz"}
        write_scan(folder / names["image"], image)
        write_scan(folder / names["label"], label)
        training.append(names)
    labels = {str(value): name for value, name in LABELS.items()}
    description = {"name": "balls", "labels": labels, "modality": {"0": "MRI"}, "training": training}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder
