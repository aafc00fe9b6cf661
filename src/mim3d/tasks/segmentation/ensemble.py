"""One segmenter, or several that answer together."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.types import Named
from mim3d.datasets.cases import Case
from mim3d.inference import ProbabilityTarget, Windows, predict_scan
from mim3d.scans.volumes import Grid
from mim3d.tasks.segmentation.segmenter import Segmenter, load_segmenter


@dataclass(frozen=True)
class Ensemble:
    """Segmenters of the same labels and preprocessing; the mean of their probabilities decides.

    Attributes:
        members: one at least.
    """

    members: tuple[Segmenter, ...]

    @property
    def first(self) -> Segmenter:
        """The member that stands for what all have in common."""
        return self.members[0]

    @property
    def digest(self) -> str:
        """SHA-256 of the weights of a single member, or of the digests of all."""
        digests = [member.digest for member in self.members]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def segment(
        self,
        case: Case,
        windows: Windows,
        *,
        probability_target: ProbabilityTarget | None = None,
        on_windows: Callable[[int, int], None] | None = None,
    ) -> tuple[npt.NDArray[np.integer], Grid]:
        """Label values ``(X, Y, Z)`` of a scan on the RAS+ form of its own grid, and that grid.

        Args:
            case: the scan's files.
            windows: how it is covered; see ``settings.windows()`` of a member.
            probability_target: gives the array that probabilities are written to; None for none.
            on_windows: told the windows done and their number.
        Raises:
            DataError: a scan that cannot be used, or with another number of channels.
        """
        first = self.first
        if len(case.images) != first.num_channels:
            raise DataError(
                f"{case.images[0]}: {len(case.images)} images (channels) where the network was trained on "
                f"{first.num_channels}; list the channels of a scan separated by ';' in a CSV."
            )
        return predict_scan(
            [member.network.logits for member in self.members],
            case,
            readout=first.readout(),
            preprocessing=first.preprocessing,
            intensity=first.intensity,
            windows=windows,
            device=first.device,
            probability_target=probability_target,
            on_windows=on_windows,
        )


def load_ensemble(
    paths: Sequence[str | Path], *, device: torch.device | None = None, backbone: Named | None = None
) -> Ensemble:
    """Load segmenters that answer together.

    Args:
        paths: runs of ``mim3d finetune``, or folders with an exported segmenter.
        device: where they shall compute; the CPU if not given.
        backbone: the encoder, where a card names a class that is not mim3d's own.
    Raises:
        CheckpointError: one that is no segmenter, see :func:`load_segmenter`.
        ConfigError: no path, the same weights twice, or segmenters that differ in what they must share.
    """
    if not paths:
        raise ConfigError("--weights is empty; name a run of mim3d finetune, or several for an ensemble.")
    members = tuple(load_segmenter(path, device=device, backbone=backbone) for path in paths)
    for path, member in zip(paths[1:], members[1:], strict=True):
        for what, ours, theirs in _shared(members[0], member):
            if ours != theirs:
                raise ConfigError(
                    f"{path} has other {what} ({theirs}) than {paths[0]} ({ours}), so that their probabilities cannot "
                    "be averaged; name runs that differ in fold or seed alone."
                )
    digests = [member.digest for member in members]
    twice = next((index for index, digest in enumerate(digests) if digest in digests[:index]), None)
    if twice is not None:
        first = digests.index(digests[twice])
        raise ConfigError(f"{paths[twice]} has the same weights as {paths[first]}; name every network once.")
    return Ensemble(members)


def _shared(one: Segmenter, other: Segmenter) -> list[tuple[str, object, object]]:
    return [
        ("labels", one.labels, other.labels),
        ("images per scan", one.num_channels, other.num_channels),
        ("voxel size", one.preprocessing.spacing_mm, other.preprocessing.spacing_mm),
        ("preprocessing", one.preprocessing, other.preprocessing),
        ("intensities", one.intensity, other.intensity),
        ("patch size", one.settings.patch_size, other.settings.patch_size),
    ]
