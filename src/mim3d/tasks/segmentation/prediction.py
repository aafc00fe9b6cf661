"""Prediction of label maps on the scans' own grids, with one segmenter or an ensemble of several."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mim3d.caching.preprocessing import Prepared, prepare
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.settings import nearest
from mim3d.datasets.cases import Case
from mim3d.inference import HeadedNetwork, Network, ProbabilityTarget, Readout, classes_readout, predict_prepared
from mim3d.scans.components import remove_components
from mim3d.scans.grids import Grid, split_channel
from mim3d.scans.nifti import ProbabilityFile
from mim3d.scans.volumes import channels_of, format_of_file, write_volume
from mim3d.tasks.contract import PredictionSettings, Predictor, TrainedNetwork
from mim3d.tasks.segmentation.targets import Targets
from mim3d.tasks.trained import require_alike
from mim3d.training.precision import DTYPES, choose_precision, require_precision
from mim3d.weights import full_path

#: Suffix of a scan -> suffix of its label map. All others (NIfTI, DICOM) give compressed NIfTI.
SUFFIXES = {".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmented:
    """A scan that was segmented, before its files are written.

    Attributes:
        labels_XYZ: Label values ``(X, Y, Z)`` on the RAS+ form of the scan's own grid.
        grid: That grid.
        probabilities: The file of its probabilities, filled; None where they are not asked for.
        noted: What the list says of it.
    """

    labels_XYZ: npt.NDArray[np.integer]
    grid: Grid
    probabilities: ProbabilityFile | None
    noted: Mapping[str, Any]


class SegmentationPredictor(Predictor):
    """An ensemble of segmenters of the same labels and preprocessing; the mean of their probabilities decides.

    Args:
        networks: The segmenters, one at least.
        settings: How scans are covered, cleaned and written.

    Raises:
        ConfigError: Networks that differ in what they must share, the same weights twice, or settings that cannot work.
    """

    done = "segmented"
    must_match = (
        "weights_digest",
        "precision",
        "overlap",
        "mirror_axes",
        "body_only",
        "largest_component",
        "min_component_ml",
    )
    memory_remedy = "use a smaller --batch_size, or fine-tune at a larger spacing_mm"

    def __init__(self, networks: Sequence[TrainedNetwork], settings: PredictionSettings) -> None:
        super().__init__(networks, settings)
        require_alike(networks, _shared)
        digests = [network.digest for network in networks]
        for index, digest in enumerate(digests):
            if digest in digests[:index]:
                paths = networks[index].path, networks[digests.index(digest)].path
                raise ConfigError(f"{paths[0]} has the same weights as {paths[1]}; name every network once.")
        self.first = networks[0]
        mirror_axes: tuple[int, ...] | None = None if settings.mirror is None else ()
        if settings.mirror:
            # Axes that every network saw mirrored in training.
            seen = [set(network.task.augmentation.flip_axes or ()) for network in networks]
            mirror_axes = tuple(sorted(set.intersection(*seen)))
        windows = self.first.task.windows(
            overlap=settings.overlap, batch_size=settings.batch_size, mirror_axes=mirror_axes
        )
        self.windows = replace(windows, body_only=settings.body_only)
        if not settings.min_component_ml >= 0:
            raise ConfigError(
                f"min_component_ml is {settings.min_component_ml}; it must be 0 (keeps all) or more, in millilitres."
            )
        self.largest = self._labels_of_one_component()
        self.precision: str = settings.precision
        self._why = ""
        device = self.first.device.type
        if self.precision == "auto":
            choice = choose_precision(device)
            self.precision, self._why = choice.precision, f"precision: {choice.precision} (auto; {choice.reason})"
        else:
            require_precision(self.precision, device)

    def _labels_of_one_component(self) -> tuple[int, ...]:
        """Return the label values of which the largest component alone is kept."""
        asked = self.settings.largest_component
        values = {name: value for value, name in self.first.labels.items() if value != 0}
        if isinstance(asked, bool):
            return tuple(sorted(values.values())) if asked else ()
        for name in asked:
            if name not in values:
                raise ConfigError(f"largest_component names '{name}', which is no label.{nearest(name, values)}")
        return tuple(sorted({values[name] for name in asked}))

    @property
    def targets(self) -> Targets:
        """What the channels of the networks stand for."""
        targets: Targets = self.first.module.targets
        return targets

    @property
    def digest(self) -> str:
        """SHA-256 of the weights of a single network, or of the digests of all."""
        digests = [network.digest for network in self.networks]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def identity(self) -> Mapping[str, Any]:
        paths = [full_path(network.path) for network in self.networks]
        return {
            "weights": paths[0] if len(paths) == 1 else paths,
            "weights_digest": self.digest,
            "precision": self.precision,
            "overlap": self.windows.overlap,
            "mirror_axes": list(self.windows.mirror_axes),
            "body_only": self.windows.body_only,
            "largest_component": list(self.largest),
            "min_component_ml": self.settings.min_component_ml,
            "labels": {str(value): name for value, name in self.first.labels.items()},
            "channels": list(self.targets.names),
            "regions": {name: list(values) for name, values in (self.first.task.regions or {}).items()},
            **({"resampling": self._resampling} if self._resampling else {}),
        }

    @property
    def notes(self) -> Sequence[str]:
        return [note for note in (self._why, self._resampling) if note]

    @property
    def _resampling(self) -> str:
        """How probabilities come to the scans' own grids, where the networks have a voxel size of their own."""
        spacing_mm = self.first.preprocessing.spacing_mm
        if spacing_mm is None:
            return ""
        return (
            f"probabilities are computed at {' x '.join(f'{mm:.4g}' for mm in spacing_mm)} mm and interpolated "
            "linearly to each scan's own grid, averaged where its voxels are larger; labels are decided there"
        )

    def accepted(self, cases: Sequence[Case]) -> Sequence[Case]:
        """Return the scans with a path for each channel, where one file holds all channels as in the Decathlon.

        Raises:
            ConfigError: No scan is a DICOM series although DICOM-SEG is asked for, or what writes it is missing.
        """
        if self.first.num_channels > 1:
            cases = [_with_channels_apart(case) for case in cases]
        if self.settings.format == "dicom_seg":
            from mim3d.scans.dicom.segmentation import NO_SERIES, require_highdicom

            require_highdicom()
            if cases and not any(is_dicom(case) for case in cases):
                raise ConfigError(f"{cases[0].images[0]}{NO_SERIES}")
        return cases

    def files_of(self, case: Case) -> dict[str, str]:
        """Return the names of the label map, by default in the format family of the scan, and of the probabilities."""
        if self.settings.format == "dicom_seg":
            suffix = ".dcm"
        elif self.settings.format != "auto":
            suffix = f".{self.settings.format}"
        else:
            own = "" if is_dicom(case) else os.path.splitext(split_channel(case.images[0])[0])[1].lower()
            suffix = SUFFIXES.get(own, ".nii.gz")
        names = {"prediction": f"{case.id}{suffix}"}
        return {**names, "probabilities": f"{case.id}_probabilities.nii.gz"} if self.settings.probabilities else names

    def read(self, case: Case) -> Prepared:
        """Return the scan as in training, once it is known that a DICOM-SEG can be made where one is asked for.

        Raises:
            DataError: The scan cannot be used, has another number of channels, or no DICOM-SEG can refer to it.
        """
        if self.settings.format == "dicom_seg":
            from mim3d.scans.dicom.segmentation import require_source

            require_source(case.images[0])
        self.first.check_channels(case)
        return prepare(case, self.first.preprocessing, with_label=False, set_in_hu=self.first.in_hu)

    def predict(
        self, cases: Sequence[Case], inputs: Sequence[Any], folder: Path, on_windows: Callable[[int, int], None]
    ) -> list[Segmented]:
        answers: list[Segmented] = []
        for case, prepared in zip(cases, inputs, strict=True):
            files = self.files_of(case)
            kept = ProbabilityFile(folder / files["probabilities"]) if "probabilities" in files else None
            with ExitStack() as unless_kept:
                if kept is not None:
                    unless_kept.enter_context(kept)
                labels = self.segment(
                    prepared, probability_target=None if kept is None else kept.target, on_windows=on_windows
                )
                unless_kept.pop_all()
            noted = _noted(self.first, prepared)
            answers.append(Segmented(labels_XYZ=labels, grid=prepared.grid, probabilities=kept, noted=noted))
        return answers

    def write(self, case: Case, answer: Segmented, folder: Path) -> Mapping[str, Any]:
        """Clean a label map, write it and the probabilities, and return what the list shall say.

        Raises:
            DataError: A file cannot be written.
        """
        labels, grid, path = answer.labels_XYZ, answer.grid, folder / self.files_of(case)["prediction"]
        if answer.probabilities is not None:
            with answer.probabilities as kept:
                kept.save()
        min_ml = self.settings.min_component_ml
        remove_components(labels, spacing_mm=grid.spacing_mm, largest=self.largest, min_ml=min_ml)
        if self.settings.format == "dicom_seg":
            from mim3d.scans.dicom.segmentation import write_dicom_seg

            # What the network can give: a label that was ignored in training is no segment.
            names = {value: self.first.labels.get(value, str(value)) for value in self.targets.label_values}
            write_dicom_seg(path, labels, case.images[0], names, algorithm=f"mim3d {self.digest[:12]}")
        else:
            write_volume(path, labels, grid)
        return answer.noted

    def segment(
        self,
        prepared: Prepared,
        *,
        probability_target: ProbabilityTarget | None = None,
        on_windows: Callable[[int, int], None] | None = None,
    ) -> npt.NDArray[np.integer]:
        """Return label values ``(X, Y, Z)`` of a scan on the RAS+ form of its own grid.

        Args:
            prepared: What :meth:`read` returns.
            probability_target: Gives the array that probabilities are written to; None for none.
            on_windows: Called with the number of windows that are done and their number in all.

        Raises:
            DataError: The scores of the scan do not fit into memory.
        """
        return predict_prepared(
            [self._computed(network) for network in self.networks],
            prepared,
            readout=readout_of(self.targets),
            intensity=self.first.intensity,
            windows=self.windows,
            device=self.first.device,
            probability_target=probability_target,
            on_windows=on_windows,
        )

    def _computed(self, network: TrainedNetwork) -> Network:
        """Return a network in the precision of the prediction, with its last layer apart where that is linear."""

        def in_precision(compute: Network) -> Network:
            dtype = DTYPES.get(self.precision)

            def computed(window_BCXYZ: Tensor) -> Tensor:
                with torch.autocast(window_BCXYZ.device.type, dtype, enabled=dtype is not None):
                    return compute(window_BCXYZ)

            return computed

        logits = in_precision(network.module.logits)
        head = getattr(network.module, "linear_head", None)
        if head is None:
            return logits
        features = in_precision(network.module.finest_features)
        return HeadedNetwork(logits=logits, features=features, weight_KF=head[0], bias_K=head[1])


def readout_of(targets: Targets) -> Readout:
    """Return how scores of whole scans become label values: of one label each, or of regions in one another."""
    if targets.activation == "softmax":
        return classes_readout(len(targets.names), torch.tensor(targets.label_values))
    dtype = torch.uint8 if max(targets.label_values) < 256 else torch.int32
    return Readout(
        empty=(0.0,) * len(targets.names),
        activate=targets.probabilities,
        decide=lambda probabilities: targets.labels_of(probabilities).to(dtype),
        order_is_enough=False,
    )


def _noted(network: TrainedNetwork, prepared: Prepared) -> dict[str, Any]:
    """Return what the list says: what was assumed, what is unlike training, and another voxel size of the scores."""
    is_resampled = prepared.spacing_mm != prepared.grid.spacing_mm
    noted = {
        "assumed": list(prepared.grid.assumed),
        "warnings": network.warnings_on(prepared),
        "computed_mm": list(prepared.spacing_mm) if is_resampled else [],
    }
    return {name: said for name, said in noted.items() if said}


def is_dicom(case: Case) -> bool:
    """Whether a scan may be a DICOM series, by its name: a folder, or a file of no other format."""
    file = split_channel(case.images[0])[0]
    return os.path.isdir(file) or format_of_file(file) is None


def _with_channels_apart(case: Case) -> Case:
    try:
        return replace(case, images=channels_of(case.images[0])) if len(case.images) == 1 else case
    except DataError:
        # It is reported when its turn comes: one damaged file must not stop the others.
        return case


def _shared(network: TrainedNetwork) -> dict[str, object]:
    return {
        "labels": network.labels,
        "images per scan": network.num_channels,
        "voxel size": network.preprocessing.spacing_mm,
        "preprocessing": network.preprocessing,
        "intensities": network.intensity,
        "patch size": network.task.patch_size,
    }
