"""Scans in a MONAI bundle: prepared, covered with windows and labelled exactly as ``mim3d predict`` does.

The transform and the inferer here, and the functions of mim3d that they call, are what a bundle carries in ``scripts``.
"""

from collections.abc import Sequence
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.inferers.inferer import Inferer
from monai.transforms.transform import MapTransform

from mim3d.caching.foreground import foreground_of, statistics_of, threshold_of
from mim3d.caching.resampling import plan_resampling, resample_linear, target_grid
from mim3d.inference.prediction import padding_values, sweep_labels
from mim3d.inference.readout import Network
from mim3d.inference.sweep import Sweep
from mim3d.inference.windows import Windows, body_windows
from mim3d.scans.grids import spacing_of
from mim3d.scans.intensity import Intensity
from mim3d.scans.modality import decide, sign_of
from mim3d.tasks.segmentation.prediction import readout_of
from mim3d.tasks.segmentation.targets import Targets

#: Where the transform leaves to the inferer what it found out about a scan.
PREPARED_SCAN = "prepared_scan"


class PrepareScand(MapTransform):
    """Resample a scan along RAS+ axes, find its body, and map its intensities to network input.

    Args:
        keys: Key of the scan, a ``MetaTensor`` ``(C, X, Y, Z)`` of intensities as they are stored.
        spacing_mm: Voxel size that the network takes; None for the scan's own.
        kind: How intensities are mapped, see ``Intensity``.
        window: Lower and upper bound of intensities.
        in_hu: For each channel whether training was on CT in HU; it decides for scans that show nothing.
    """

    def __init__(
        self,
        keys: str,
        *,
        spacing_mm: Sequence[float] | None,
        kind: Literal["window", "zscore"],
        window: Sequence[float] | None,
        in_hu: Sequence[bool] = (),
    ) -> None:
        super().__init__(keys)
        self.spacing_mm = spacing_mm
        self.intensity = Intensity(kind=kind, window=None if window is None else (window[0], window[1]))
        self.in_hu = in_hu

    def __call__(self, data: Any) -> dict[str, Any]:
        """Return the item with network input, and what the inferer needs in its metadata."""
        return {**data, **{key: self.prepared(data[key], data.get("files")) for key in self.key_iterator(data)}}

    def prepared(self, scan: MetaTensor, files: str | Sequence[str] | None = None) -> MetaTensor:
        """Return a scan as network input; its files say which channels are stored as whole numbers."""
        affine, stored = scan.affine.numpy(), _as_stored(scan, files)
        x, y, z = stored[0].shape
        own_shape, own_mm = (x, y, z), spacing_of(affine)
        shape, spacing_mm = own_shape, own_mm
        if self.spacing_mm is not None:
            x_mm, y_mm, z_mm = self.spacing_mm
            shape, spacing_mm, _ = target_grid(own_shape, affine, own_mm, (x_mm, y_mm, z_mm))
        axes = plan_resampling(own_shape, own_mm, shape, spacing_mm)
        channels = [resample_linear(channel, axes, channel.dtype) for channel in stored]
        # Integers beside fractions become float32 too, after they were resampled as integers.
        is_mixed = len({channel.dtype for channel in channels}) > 1
        image = np.stack([channel.astype(np.float32) if is_mixed else channel for channel in channels])
        others = self.in_hu if len(self.in_hu) == len(image) else [False] * len(image)
        in_hu = [decide(sign_of(channel), set_in_hu=is_ct).in_hu for channel, is_ct in zip(image, others, strict=True)]
        thresholds = [threshold_of(channel, is_ct) for channel, is_ct in zip(image, in_hu, strict=True)]
        statistics = [statistics_of(*channel) for channel in zip(image, thresholds, in_hu, strict=True)]
        made = MetaTensor(torch.from_numpy(self.intensity.apply(image, statistics)), meta=scan.meta)
        # Without them MONAI cannot turn the label map back.
        made.applied_operations = scan.applied_operations
        made.meta[PREPARED_SCAN] = {
            "foreground": foreground_of(image, thresholds),
            "padding": padding_values(self.intensity, statistics),
            "axes": plan_resampling(shape, spacing_mm, own_shape, own_mm),
        }
        return made


def _as_stored(scan: MetaTensor, files: str | Sequence[str] | None) -> list[np.ndarray]:
    """Voxels as the files hold them: whole numbers as int64 where they are stored as such, all else as float32."""
    paths = [files] if isinstance(files, str) else list(files or [])
    voxels = scan.as_tensor().numpy()
    # Volumes of one file have one type.
    images: list[Any] = [nib.load(path) for path in paths]
    kinds = [image.get_data_dtype().kind for image in images] or [voxels.dtype.kind]
    kinds = kinds * len(voxels) if len(kinds) == 1 else kinds
    stored = []
    for channel, kind in zip(voxels, kinds, strict=True):
        # Integers that a header rescales are read as fractions.
        is_whole = kind in "iu" and bool((np.rint(channel) == channel).all())
        stored.append(channel.astype(np.int64 if is_whole else np.float32))
    return stored


class WindowsInferer(Inferer):
    """Label values of a scan: windows, their weights, and the way back to its own grid are those of mim3d.

    Args:
        roi_size: Voxels of a window along X, Y, Z.
        overlap: Least share of a window that its neighbour sees too.
        sw_batch_size: Windows per call of the network.
        mirror_axes: Axes along which windows are mirrored too.
        body_only: Whether windows cover the body alone.
        activation: ``softmax`` or ``sigmoid``.
        channels: Names of the network's channels.
        label_values: Label value that each channel gives.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        *,
        overlap: float,
        sw_batch_size: int,
        mirror_axes: Sequence[int],
        body_only: bool,
        activation: Literal["softmax", "sigmoid"],
        channels: Sequence[str],
        label_values: Sequence[int],
    ) -> None:
        x, y, z = roi_size
        self.windows = Windows(
            patch_size=(x, y, z),
            overlap=overlap,
            batch_size=sw_batch_size,
            mirror_axes=tuple(mirror_axes),
            body_only=body_only,
        )
        self.targets = Targets(
            names=tuple(channels),
            members=tuple((value,) for value in label_values),
            label_values=tuple(label_values),
            activation=activation,
        )

    def __call__(self, inputs: MetaTensor, network: Network) -> MetaTensor:  # type: ignore[override]
        """Return label values ``(1, 1, X, Y, Z)`` along RAS+ axes on the scan's own grid.

        Args:
            inputs: One scan ``(1, C, X, Y, Z)`` as :class:`PrepareScand` gives it.
            network: Gives logits of windows.
        """
        found, image = inputs.meta[PREPARED_SCAN], inputs.as_tensor()[0].cpu()
        x, y, z = image.shape[1:]
        shape, windows = (x, y, z), self.windows
        places = body_windows(shape, found["foreground"], windows) if windows.body_only else windows.places(shape)
        device = next((parameter.device for parameter in getattr(network, "parameters", list)()), inputs.device)
        labels = sweep_labels(
            [network],
            Sweep.over(places, windows.patch_size, shape),
            image.__getitem__,
            axes=found["axes"],
            padding=found["padding"],
            readout=readout_of(self.targets),
            windows=windows,
            device=device,
        )
        return MetaTensor(torch.from_numpy(labels)[None, None], meta=inputs.meta)
