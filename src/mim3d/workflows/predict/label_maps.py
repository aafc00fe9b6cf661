"""What becomes of a segmented scan: a label map cleaned and written in the format asked for, and its probabilities."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from mim3d.core.errors import ConfigError
from mim3d.core.settings import nearest
from mim3d.datasets.cases import Case
from mim3d.inference import Windows
from mim3d.scans.components import remove_components
from mim3d.scans.probabilities import ProbabilityFile
from mim3d.scans.volumes import write_volume
from mim3d.tasks.segmentation.ensemble import Ensemble
from mim3d.workflows.predict.predictions import Format, Predictions, is_dicom


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Which connected components of label maps are kept.

    Attributes:
        largest: label values of which the largest component alone is kept.
        min_ml: components smaller than this are removed, in millilitres.
    """

    largest: tuple[int, ...] = ()
    min_ml: float = 0.0

    @classmethod
    def of(cls, largest: bool | Sequence[str], min_ml: float, labels: Mapping[int, str]) -> "Cleaning":
        """From labels by name (or true for all) to their values.

        Raises:
            ConfigError: a name that is no label, or a negative volume.
        """
        if not min_ml >= 0:
            raise ConfigError(f"min_component_ml is {min_ml}; it must be 0 (keeps all) or more, in millilitres.")
        values = {name: value for value, name in labels.items() if value != 0}
        if isinstance(largest, bool):
            return cls(largest=tuple(sorted(values.values())) if largest else (), min_ml=min_ml)
        for name in largest:
            if name not in values:
                raise ConfigError(f"largest_component names '{name}', which is no label.{nearest(name, values)}")
        return cls(largest=tuple(sorted({values[name] for name in largest})), min_ml=min_ml)


def check_format(format: Format, cases: Sequence[Case]) -> None:
    """Refuse DICOM-SEG for scans that are no DICOM series, or without what writes it.

    Raises:
        ConfigError: naming the first such scan.
    """
    if format != "dicom_seg":
        return
    from mim3d.scans.dicom.segmentation import require_highdicom

    require_highdicom()
    other = next((case for case in cases if not is_dicom(case)), None)
    if other is not None:
        raise ConfigError(
            f"{other.images[0]} is no DICOM series, and a DICOM-SEG refers to the slices of one; use --format auto."
        )


def segment_to_files(
    ensemble: Ensemble,
    case: Case,
    windows: Windows,
    cleaning: Cleaning,
    predictions: Predictions,
    on_windows: Callable[[int, int], None],
) -> None:
    """Segment a scan and write all that is asked for.

    Raises:
        DataError: a scan that cannot be used, or a file that cannot be written.
    """
    probabilities = ProbabilityFile(predictions.probabilities_of(case)) if predictions.with_probabilities else None
    with probabilities or nullcontext():
        labels, grid = ensemble.segment(
            case,
            windows,
            probability_target=None if probabilities is None else probabilities.target,
            on_windows=on_windows,
        )
        if probabilities is not None:
            probabilities.save()
    remove_components(labels, spacing_mm=grid.spacing_mm, largest=cleaning.largest, min_ml=cleaning.min_ml)
    if predictions.format != "dicom_seg":
        write_volume(predictions.path_of(case), labels, grid)
        return
    from mim3d.scans.dicom.segmentation import write_dicom_seg

    # What the network can give: a label that was ignored in training is no segment.
    names = {value: ensemble.first.labels.get(value, str(value)) for value in ensemble.first.network.label_values}
    algorithm = f"mim3d {ensemble.digest[:12]}"
    write_dicom_seg(predictions.path_of(case), labels, case.images[0], names, algorithm=algorithm)
