"""How large a crop is and how many make a batch: as much of a scan as memory holds, in the proportions of the scan."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from mim3d.backbones.contract import size_text
from mim3d.core.errors import ConfigError
from mim3d.core.resources import in_words
from mim3d.core.types import Spacing, Triple
from mim3d.scans.grids import times

#: A patch has about this many voxels at most: 128 along each axis of a cube.
MAX_PATCH_VOXELS = 128**3

#: Crops of a batch: one alone is no average over scans, and more than the largest number slow a step without gain.
MIN_BATCH, MAX_BATCH = 2, 16

#: A batch holds at most this share of all training voxels (nnU-Net's rule): more of them would see little variety.
MAX_BATCH_SHARE = 0.05

#: Share of the usable memory that a plan fills; dry runs are within about a tenth of what was measured.
FILLED_SHARE = 0.9


class MemoryQuestion(Protocol):
    """Answers what a plan asks about memory; implemented where the network is known.

    Attributes:
        usable_bytes: Memory that training may take; None where it is not known, which is no limit.
    """

    usable_bytes: int | None

    def need_bytes(self, patch_size: Triple, batch_size: int) -> int:
        """Memory that training with crops of a size needs."""
        ...


@dataclass(frozen=True)
class SizeChoice:
    """A patch and a batch size.

    Attributes:
        patch_size: Voxels of a crop along X, Y, Z.
        batch_size: Number of crops of a batch.
        reason: The numbers that the choice follows from, for people.
    """

    patch_size: Triple
    batch_size: int
    reason: str


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


def choose_patch(median_shape: Spacing, multiple: Triple, memory: MemoryQuestion | None, batch_size: int) -> SizeChoice:
    """The largest patch of ``growing_patches`` that memory holds and that has no more than 128^3 voxels.

    Args:
        median_shape: Voxels along X, Y, Z of the median scan, at the voxel size of training.
        multiple: Voxels along X, Y, Z that a patch must be a multiple of for the encoder.
        memory: Answers what training needs; None for no limit.
        batch_size: Number of crops that memory must hold.
    """
    patches = list(growing_patches(median_shape, multiple))
    small = [patch for patch in patches if math.prod(patch) <= MAX_PATCH_VOXELS] or patches[:1]
    usable = None if memory is None else memory.usable_bytes
    chosen = small[-1] if usable is None or memory is None else _largest_that_fits(small, memory, usable, batch_size)
    scan = times([round(voxels) for voxels in median_shape])
    if chosen == patches[-1]:
        reason = f"covers the median scan of {scan} voxels in tokens of {size_text(multiple)}"
    elif chosen == small[-1]:
        reason = f"in the proportions of the median scan ({scan} voxels), up to 128 x 128 x 128 voxels in all"
    else:
        assert memory is not None and usable is not None
        larger = small[small.index(chosen) + 1]
        reason = (
            f"in the proportions of the median scan ({scan} voxels); {times(larger)} would need "
            f"{in_words(memory.need_bytes(larger, batch_size))} of memory in batches of {batch_size}, and "
            f"{in_words(int(FILLED_SHARE * usable))} are to be filled"
        )
    return SizeChoice(chosen, batch_size, reason)


def choose_batch(
    patch_size: Triple, training_voxels: float, memory: MemoryQuestion | None, micro_batches: int
) -> SizeChoice:
    """The largest batch that memory holds and that has no more than a twentieth of the training voxels.

    Args:
        patch_size: Voxels of a crop along X, Y, Z.
        training_voxels: Voxels of all training scans, at the voxel size of training.
        memory: Answers what training needs; None for no limit.
        micro_batches: Number of micro-batches that make a step: accumulated ones, and those of all devices.
    """
    allowed = int(MAX_BATCH_SHARE * training_voxels / (math.prod(patch_size) * micro_batches))
    wanted = min(MAX_BATCH, max(MIN_BATCH, allowed))
    usable = None if memory is None else memory.usable_bytes
    chosen = wanted
    while memory is not None and usable is not None and chosen > MIN_BATCH:
        if memory.need_bytes(patch_size, chosen) <= FILLED_SHARE * usable:
            break
        chosen -= 1
    if chosen < wanted:
        assert memory is not None and usable is not None
        reason = f"{chosen + 1} would need {in_words(memory.need_bytes(patch_size, chosen + 1))} of memory"
    elif allowed < MIN_BATCH:
        reason = f"the least, though {_share(allowed, patch_size, training_voxels)}"
    elif wanted == MAX_BATCH:
        reason = f"the most; memory and {training_voxels / 1e6:.4g} million training voxels would allow it"
    else:
        reason = _share(allowed, patch_size, training_voxels)
    return SizeChoice(patch_size, chosen, reason)


def check_patch(patch_size: Triple | None) -> None:
    """Refuse a patch no crop can have.

    Raises:
        ConfigError: An axis without voxels.
    """
    if patch_size is not None and min(patch_size) < 1:
        raise ConfigError(f"patch_size {list(patch_size)} must be three numbers of voxels, such as [96, 96, 96].")


def _share(allowed: int, patch_size: Triple, training_voxels: float) -> str:
    return (
        f"{MAX_BATCH_SHARE:.0%} of the {training_voxels / 1e6:.4g} million training voxels are "
        f"{allowed or 'less than 1'} times a crop of {math.prod(patch_size) / 1e6:.3g} million"
    )


def _largest_that_fits(patches: list[Triple], memory: MemoryQuestion, usable: int, batch_size: int) -> Triple:
    """The largest patch that fits, as the need grows with the patch; the smallest where none does.

    An answer takes seconds, so the next question is where a line through the answers so far meets the limit: the need
    is nearly a line over the voxels.
    """
    limit = FILLED_SHARE * usable
    known: dict[int, int] = {}

    def is_within(place: int) -> bool:
        need = memory.need_bytes(patches[place], batch_size)
        known[math.prod(patches[place])] = need
        return need <= limit

    fits, fails = 0, len(patches) - 1
    if fails == 0 or is_within(fails):
        return patches[fails]
    place = fails // 2
    while fails - fits > 1:
        place = min(max(place, fits + 1), fails - 1)
        if is_within(place):
            fits = place
        else:
            fails = place
        place = _place_at(limit, patches, known)
    return patches[fits]


def _place_at(limit: float, patches: list[Triple], known: dict[int, int]) -> int:
    """The last patch that a line through the two answers nearest to the limit puts below it."""
    (one, need), (other, other_need) = sorted(known.items(), key=lambda answer: abs(answer[1] - limit))[:2]
    bytes_per_voxel = max((other_need - need) / (other - one), 1e-9)
    voxels = one + (limit - need) / bytes_per_voxel
    return sum(math.prod(patch) <= voxels for patch in patches) - 1
