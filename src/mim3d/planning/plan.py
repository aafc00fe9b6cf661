"""The plan of a data set: settings of training, each with the numbers that it follows from."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mim3d.backbones.contract import size_text
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import ConfigError
from mim3d.core.names import number_of
from mim3d.core.resources import in_words
from mim3d.core.types import Spacing, Triple
from mim3d.planning.fingerprint import DatasetFingerprint, ScanGrid
from mim3d.scans.grids import times
from mim3d.scans.intensity import Intensity
from mim3d.scans.modality import is_ct_set

if TYPE_CHECKING:
    from mim3d.caching.scan import CachedScan

#: Spacings that differ by less are taken for one: nothing is gained by resampling them.
SAME_SPACING = 0.01

#: Voxels more anisotropic than this, with correspondingly few slices, get the finer end of their coarsest axis.
ANISOTROPY = 3.0

#: Percentile of the spacings along the coarsest axis that is aimed at there (nnU-Net's rule).
COARSE_AXIS_PERCENTILE = 10

#: Windows that radiologists and published networks use, HU.
KNOWN_WINDOWS_HU = {
    "the brain": (0.0, 80.0),
    "soft tissue": (-160.0, 240.0),
    "published abdominal networks": (-175.0, 250.0),
    "the lung": (-1350.0, 150.0),
    "bones": (-500.0, 1300.0),
    "published pre-training": (-1000.0, 1000.0),
}

#: A known window may be this many times as wide as the intensities inside the structures: wider ones waste contrast.
MAX_KNOWN_WIDTH = 2.5

#: What a window of the data set's own has on each side beyond the percentiles, for borders against other tissue.
WINDOW_MARGIN = 0.1

#: Ends of planned windows, HU: air, and the end of 12-bit CT.
CT_RANGE_HU = (-1024.0, 3071.0)

#: Planned windows end on multiples of this many HU.
WINDOW_STEP_HU = 5.0

#: A patch has about this many voxels at most: 128 along each axis of a cube.
MAX_PATCH_VOXELS = 128**3

#: Crops of a batch: one alone is no average over scans, and more than the largest number slow a step without gain.
MIN_BATCH, MAX_BATCH = 2, 16

#: A batch holds at most this share of all training voxels (nnU-Net's rule): more of them would see little variety.
MAX_BATCH_SHARE = 0.05

#: Share of the usable memory that a plan fills; dry runs are within about a tenth of what was measured.
FILLED_SHARE = 0.9

#: Passes over the training scans, where a pass takes as many crops as cover a scan.
PASSES = 300

#: Bounds of the planned steps: fewer train no network, more are for those who ask for them.
MIN_STEPS, MAX_STEPS = 1_000, 40_000

#: Share of a scan that carries labels, and the share of crops centred on them: what is common is met by chance.
POSITIVE_RATIOS = ((0.05, 0.33), (0.001, 0.5), (0.0, 0.67))

#: Who says what a scan is, in the words of a reason.
_DECIDERS = {
    "declared": "declaration",
    "header": "their headers",
    "voxels": "their voxels",
    "set": "the rest of the set",
    "earlier version": "their darkest voxels",
}


def plan_intensity(scans: Sequence["CachedScan"]) -> Intensity:
    """A set of CT in HU gets the Hounsfield window, every other one the z-score of each scan's foreground."""
    is_ct = all(is_ct_set(channels) for channels in zip(*(scan.modalities for scan in scans), strict=True))
    return Intensity() if is_ct else Intensity(kind="zscore", window=None)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings for a data set; what is None is left to the command's defaults.

    Attributes:
        spacing_mm: Voxel size along X, Y, Z that scans are resampled to; None keeps each scan's own.
        intensity: How intensities become network input.
        patch_size: Voxels of one crop along X, Y, Z.
        batch_size: Number of crops of a micro-batch on one device.
        max_steps: Number of optimiser steps.
        positive_ratio: Share of the crops that are centred on a structure.
        flip_axes: Axes (0 X, 1 Y, 2 Z) along which crops may be mirrored.
        rotation_degrees: Largest rotations about X, Y, Z.
        reasons: The numbers that each of these follows from, by its name; for people alone.
        made_for: Digest of the data and settings that the plan was made for. The processes of one run find it by this.
    """

    spacing_mm: Spacing | None = None
    intensity: Intensity | None = None
    patch_size: Triple | None = None
    batch_size: int | None = None
    max_steps: int | None = None
    positive_ratio: float | None = None
    flip_axes: tuple[int, ...] | None = None
    rotation_degrees: tuple[float, float, float] | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    made_for: str | None = None

    def __post_init__(self) -> None:
        Preprocessing(spacing_mm=self.spacing_mm)
        if self.patch_size is not None and min(self.patch_size) < 1:
            raise ConfigError(
                f"patch_size {list(self.patch_size)} must be three numbers of voxels, such as [96, 96, 96]."
            )
        for name in ("batch_size", "max_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        if self.positive_ratio is not None and not 0 <= self.positive_ratio <= 1:
            raise ConfigError(f"positive_ratio is {self.positive_ratio}; it must lie between 0 and 1.")
        if self.flip_axes is not None and not set(self.flip_axes) <= {0, 1, 2}:
            raise ConfigError(f"flip_axes {list(self.flip_axes)} must name axes among 0 (X), 1 (Y) and 2 (Z).")
        if self.rotation_degrees is not None and not all(0 <= angle <= 180 for angle in self.rotation_degrees):
            raise ConfigError(f"rotation_degrees {list(self.rotation_degrees)} must lie between 0 and 180.")


@dataclass(frozen=True, kw_only=True)
class FixedChoices:
    """Choices that were made before planning.

    Attributes:
        values: Field of :class:`Plan` -> its value, which may be None.
        by: Field of :class:`Plan` -> who chose it, such as ``of the encoder``.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    by: Mapping[str, str] = field(default_factory=dict)


class MemoryQuestion(Protocol):
    """Answers what a plan asks about memory; implemented where the network is known.

    Attributes:
        usable_bytes: Memory that training may take.
    """

    usable_bytes: int

    def need_bytes(self, patch_size: Triple, batch_size: int) -> int:
        """Memory that training with crops of a size needs."""
        ...


def plan_dataset(
    fingerprint: DatasetFingerprint,
    *,
    multiple: Triple,
    num_training: int,
    memory: MemoryQuestion | None = None,
    micro_batches: int = 1,
    fixed: FixedChoices = FixedChoices(),
) -> Plan:
    """Plan training for a data set.

    Follows the published rules of nnU-Net (Isensee et al., "nnU-Net: a self-configuring method for deep learning-based
    biomedical image segmentation", Nature Methods 2021) for spacing, patch and batch, in multiples of the encoder's
    tokens and within measured memory.

    Args:
        fingerprint: What the data set looks like.
        multiple: Voxels along X, Y, Z that a patch must be a multiple of for the encoder.
        num_training: Number of scans to train on.
        memory: Answers what training needs; None for no limit.
        micro_batches: Number of micro-batches that make a step: accumulated ones, and those of all devices.
        fixed: Choices already made, which others then follow from.
    """
    values: dict[str, Any] = dict(fixed.values)
    reasons = {name: fixed.by.get(name, "given") for name in values}

    def settle(name: str, value: Any, reason: str) -> Any:
        """Settle a choice on a planned value, unless it is fixed; the value that it has then."""
        if name not in values:
            values[name], reasons[name] = value, reason
        elif reason and value != values[name]:
            reasons[name] += f" (the plan would be {_in_words(value)}: {reason})"
        return values[name]

    spacing_mm = settle("spacing_mm", *plan_spacing(fingerprint.scans))
    settle("intensity", *_plan_intensity(fingerprint))
    shapes = shapes_at(fingerprint.scans, spacing_mm)
    x, y, z = (float(np.median([shape[axis] for shape in shapes])) for axis in range(3))
    training_voxels = num_training * float(np.mean([math.prod(shape) for shape in shapes]))
    # Patch and batch are asked for only where they are open: answers about memory take seconds.
    if "patch_size" not in values:
        patch, reason = choose_patch((x, y, z), multiple, memory, values.get("batch_size") or MIN_BATCH)
        settle("patch_size", patch, reason + _reach(patch, spacing_mm, fingerprint))
    patch_size: Triple = values["patch_size"]
    if "batch_size" not in values:
        settle("batch_size", *choose_batch(patch_size, training_voxels, memory, micro_batches))
    crops_per_step: int = values["batch_size"] * micro_batches
    settle("max_steps", *_plan_steps(training_voxels, num_training, math.prod(patch_size), crops_per_step))
    settle("positive_ratio", *_plan_positive(fingerprint))
    return Plan(**values, reasons=reasons)


def plan_spacing(grids: Sequence[ScanGrid]) -> tuple[Spacing | None, str]:
    """The voxel size to resample to, None to keep each scan's own, and why.

    The median along each axis; but along an axis whose voxels are more than three times as coarse as the finest, and of
    which there are correspondingly few, the 10th percentile, so that the better half of the scans loses no slices.
    """
    spacings = np.array([grid.spacing_mm for grid in grids])
    shapes = np.array([grid.shape for grid in grids])
    middle = np.median(spacings, axis=0)
    if (np.abs(spacings / middle - 1) < SAME_SPACING).all():
        found = " x ".join(f"{value:.4g}" for value in middle)
        who = f"all {len(grids):,} scans share" if len(grids) > 1 else "the only scan has"
        return None, f"{who} {found} mm within {SAME_SPACING:.0%}; nothing to resample"
    coarse = int(middle.argmax())
    others = [axis for axis in range(3) if axis != coarse]
    typical = np.median(shapes, axis=0)
    low, high = spacings.min(axis=0), spacings.max(axis=0)
    ranges = ", ".join(f"{a:.3g} to {b:.3g}" for a, b in zip(low, high, strict=True))
    reason = f"median of {number_of(len(grids), 'scan')} (X, Y, Z: {ranges} mm)"
    target = middle.copy()
    if middle[coarse] > ANISOTROPY * middle.min() and typical[coarse] * ANISOTROPY < typical[others].min():
        finer = np.percentile(spacings[:, coarse], COARSE_AXIS_PERCENTILE)
        target[coarse] = max(finer, middle[others].max())
        reason += (
            f"; along {'XYZ'[coarse]} the {COARSE_AXIS_PERCENTILE}th percentile, as its median of "
            f"{middle[coarse]:.3g} mm is over {ANISOTROPY:g} times {middle.min():.3g} mm and its "
            f"{typical[coarse]:.0f} voxels are few"
        )
    x, y, z = (float(f"{value:.4g}") for value in target)
    return (x, y, z), reason


def shapes_at(grids: Sequence[ScanGrid], spacing_mm: Spacing | None) -> list[Triple]:
    """Voxels of every scan once it is resampled."""
    if spacing_mm is None:
        return [grid.shape for grid in grids]
    shapes = []
    for grid in grids:
        x, y, z = (
            max(1, round(size * have / want))
            for size, have, want in zip(grid.shape, grid.spacing_mm, spacing_mm, strict=True)
        )
        shapes.append((x, y, z))
    return shapes


def growing_patches(median_shape: Spacing, multiple: Triple) -> Iterator[Triple]:
    """Patches from the smallest to the one that covers the median scan, each a little larger than the one before.

    The axes that cover the smallest share of the scan grow next, so that a patch has the scan's proportions in
    millimetres; axes alike stay alike. A scan of few slices gets thin patches: one token along them.

    Args:
        median_shape: Voxels along X, Y, Z of the median scan, at the voxel size of training.
        multiple: Voxels along X, Y, Z that a patch must be a multiple of for the encoder.
    """
    whole = [max(1, math.ceil(voxels / edge)) for voxels, edge in zip(median_shape, multiple, strict=True)]
    if max(whole) == 1:
        # One token alone leaves nothing to normalise over; the longest axis gets two.
        whole[max(range(3), key=lambda axis: median_shape[axis])] = 2
    tokens = [1, 1, 1]
    while True:
        if max(tokens) > 1:
            yield tokens[0] * multiple[0], tokens[1] * multiple[1], tokens[2] * multiple[2]
        smallest = min(have / all_of_it for have, all_of_it in zip(tokens, whole, strict=True))
        if smallest == 1:
            return
        tokens = [have + (have / all_of_it == smallest) for have, all_of_it in zip(tokens, whole, strict=True)]


def choose_patch(
    median_shape: Spacing, multiple: Triple, memory: MemoryQuestion | None, batch_size: int
) -> tuple[Triple, str]:
    """The largest patch of ``growing_patches`` that memory holds and that has no more than 128^3 voxels, and why.

    Args:
        median_shape: Voxels along X, Y, Z of the median scan, at the voxel size of training.
        multiple: Voxels along X, Y, Z that a patch must be a multiple of for the encoder.
        memory: Answers what training needs; None for no limit.
        batch_size: Number of crops that memory must hold.
    """
    patches = list(growing_patches(median_shape, multiple))
    small = [patch for patch in patches if math.prod(patch) <= MAX_PATCH_VOXELS] or patches[:1]
    chosen = small[-1] if memory is None else _largest_that_fits(small, memory, batch_size)
    scan = times([round(voxels) for voxels in median_shape])
    if chosen == patches[-1]:
        return chosen, f"covers the median scan of {scan} voxels in tokens of {size_text(multiple)}"
    if chosen == small[-1] or memory is None:
        return chosen, f"in the proportions of the median scan ({scan} voxels), up to 128 x 128 x 128 voxels in all"
    larger = small[small.index(chosen) + 1]
    return chosen, (
        f"in the proportions of the median scan ({scan} voxels); {times(larger)} would need "
        f"{in_words(memory.need_bytes(larger, batch_size))} of memory in batches of {batch_size}, and "
        f"{in_words(int(FILLED_SHARE * memory.usable_bytes))} are to be filled"
    )


def _largest_that_fits(patches: list[Triple], memory: MemoryQuestion, batch_size: int) -> Triple:
    """The largest patch that fits, as the need grows with the patch; the smallest where none does.

    An answer takes seconds, so the next question is where a line through the two answers nearest to the limit meets it:
    the need is nearly a line over the voxels.
    """
    limit = FILLED_SHARE * memory.usable_bytes
    needs: dict[int, int] = {}

    def is_within(place: int) -> bool:
        need = needs[math.prod(patches[place])] = memory.need_bytes(patches[place], batch_size)
        return need <= limit

    fits, fails = 0, len(patches) - 1
    if fails == 0 or is_within(fails):
        return patches[fails]
    place = fails // 2
    while fails - fits > 1:
        if is_within(place):
            fits = place
        else:
            fails = place
        (one, need), (other, other_need) = sorted(needs.items(), key=lambda answer: abs(answer[1] - limit))[:2]
        bytes_per_voxel = max((other_need - need) / (other - one), 1e-9)
        voxels = one + (limit - need) / bytes_per_voxel
        place = sum(math.prod(patch) <= voxels for patch in patches) - 1
        place = min(max(place, fits + 1), fails - 1)
    return patches[fits]


def choose_batch(
    patch_size: Triple, training_voxels: float, memory: MemoryQuestion | None, micro_batches: int
) -> tuple[int, str]:
    """The largest batch that memory holds and that has no more than a twentieth of the training voxels, and why.

    Args:
        patch_size: Voxels of a crop along X, Y, Z.
        training_voxels: Voxels of all training scans, at the voxel size of training.
        memory: Answers what training needs; None for no limit.
        micro_batches: Number of micro-batches that make a step: accumulated ones, and those of all devices.
    """
    allowed = int(MAX_BATCH_SHARE * training_voxels / (math.prod(patch_size) * micro_batches))
    chosen = wanted = min(MAX_BATCH, max(MIN_BATCH, allowed))
    too_much = 0
    while memory is not None and chosen > MIN_BATCH:
        need = memory.need_bytes(patch_size, chosen)
        if need <= FILLED_SHARE * memory.usable_bytes:
            break
        chosen, too_much = chosen - 1, need
    share = (
        f"{MAX_BATCH_SHARE:.0%} of the {training_voxels / 1e6:.4g} million training voxels are "
        f"{allowed or 'less than 1'} times a crop of {math.prod(patch_size) / 1e6:.3g} million"
    )
    if chosen < wanted:
        return chosen, f"{chosen + 1} would need {in_words(too_much)} of memory"
    if allowed < MIN_BATCH:
        return chosen, f"the least, though {share}"
    if wanted == MAX_BATCH:
        return chosen, f"the most; memory and {training_voxels / 1e6:.4g} million training voxels would allow it"
    return chosen, share


def _plan_intensity(fingerprint: DatasetFingerprint) -> tuple[Intensity | None, str]:
    if not fingerprint.channels:
        return None, ""
    num_scans = len(fingerprint.voxel_scans)
    num_ct = min(channel.num_ct for channel in fingerprint.channels)
    deciders = {decider for channel in fingerprint.channels for decider in channel.decided_by.split(", ")}
    by = " and ".join(_DECIDERS.get(decider, decider) for decider in sorted(deciders))
    seen = f"CT in {num_ct} of {number_of(num_scans, 'scan')} (by {by}"
    if not fingerprint.is_ct:
        darkest = ", ".join(f"{channel.minimum:.4g}" for channel in fingerprint.channels)
        seen += f"; the median of their darkest voxels is {darkest})"
        return Intensity(kind="zscore", window=None), f"mean and deviation of each scan's body: {seen}"
    known = [
        (channel.class_percentile_00_5, channel.class_percentile_99_5)
        for channel in fingerprint.channels
        if channel.class_percentile_00_5 is not None and channel.class_percentile_99_5 is not None
    ]
    ct = f"{seen})"
    if not known:
        return Intensity(), f"{ct}, without a labelled voxel to go by: the window of published pre-training"
    low, high = min(pair[0] for pair in known), max(pair[1] for pair in known)
    window, which = plan_window(low, high)
    return Intensity(window=window), f"{ct}; labelled voxels lie between {low:.4g} and {high:.4g} HU ({which})"


def plan_window(low_hu: float, high_hu: float) -> tuple[tuple[float, float], str]:
    """The window for structures between two percentiles, and which it is.

    A known window where one covers them without being much wider, since networks and eyes are used to it; else their
    own, with a margin.
    """
    width = high_hu - low_hu
    for name, (low, high) in sorted(KNOWN_WINDOWS_HU.items(), key=lambda item: item[1][1] - item[1][0]):
        if low <= low_hu and high_hu <= high and high - low <= MAX_KNOWN_WIDTH * width:
            return (low, high), f"percentiles 0.5 and 99.5; the window of {name} covers them"
    margin = max(WINDOW_MARGIN * width, 2 * WINDOW_STEP_HU)
    low = max(CT_RANGE_HU[0], math.floor((low_hu - margin) / WINDOW_STEP_HU) * WINDOW_STEP_HU)
    high = min(CT_RANGE_HU[1], math.ceil((high_hu + margin) / WINDOW_STEP_HU) * WINDOW_STEP_HU)
    return (low, high), f"percentiles 0.5 and 99.5; {margin:.0f} HU more on each side"


def _plan_steps(training_voxels: float, num_training: int, patch_voxels: int, crops_per_step: int) -> tuple[int, str]:
    crops_per_scan = max(1.0, training_voxels / num_training / patch_voxels)
    wanted = math.ceil(PASSES * num_training * crops_per_scan / crops_per_step)
    steps = min(MAX_STEPS, max(MIN_STEPS, wanted))
    reason = (
        f"{PASSES} passes over {number_of(num_training, 'scan')}, each covered by {crops_per_scan:.3g} times a crop; "
        f"{crops_per_step} crops a step"
    )
    if steps != wanted:
        reason += f": {wanted}, kept between {MIN_STEPS} and {MAX_STEPS}"
    return steps, reason


def _plan_positive(fingerprint: DatasetFingerprint) -> tuple[float | None, str]:
    if not fingerprint.voxel_scans:
        return None, "the voxels of no scan were looked at"
    filled = fingerprint.foreground_ratio
    ratio = next(ratio for share, ratio in POSITIVE_RATIOS if filled >= share)
    return ratio, f"structures fill {filled:.2%} of a scan (median)"


def _reach(patch_size: Triple, spacing_mm: Spacing | None, fingerprint: DatasetFingerprint) -> str:
    """The patch in millimetres beside the largest structure."""
    middle = np.median([grid.spacing_mm for grid in fingerprint.scans], axis=0) if spacing_mm is None else spacing_mm
    size = " x ".join(f"{voxels * mm:.0f}" for voxels, mm in zip(patch_size, middle, strict=True))
    reach = f"; {size} mm"
    if fingerprint.classes:
        largest = max(fingerprint.classes, key=lambda facts: math.prod(facts.extent_mm))
        extent = " x ".join(f"{mm:.0f}" for mm in largest.extent_mm)
        reach += f", where '{largest.name}' reaches {extent} mm at most"
    return reach


def _in_words(value: Any) -> str:
    if isinstance(value, Intensity):
        return describe_intensity(value)
    return " ".join(f"{item:g}" for item in value) if isinstance(value, tuple) else str(value)


def describe_intensity(intensity: Intensity | None) -> str:
    """An intensity mapping in words."""
    if intensity is None or intensity.window is None or intensity.kind == "zscore":
        return "z-score"
    return f"window {intensity.window[0]:g} to {intensity.window[1]:g}"
