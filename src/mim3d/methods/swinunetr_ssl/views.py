"""Views of crops for SwinUNETR's pre-training: turned in plane, with boxes cut out, all on the device of the crops."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mim3d.caching.scan import CachedScan
from mim3d.core.types import Triple
from mim3d.loading.samples import Crop, Sample
from mim3d.methods.crops import draw_origin, with_little_air

# Shape suffixes: B crops, V = 2 B views, C channels, X Y Z space, M boxes of a view, n voxels along an axis.

#: Turns by 0, 90, 180 and 270 degrees.
NUM_TURNS = 4

#: More boxes are drawn than reach the largest share on average, so that nearly every draw can.
_SPARE_BOXES = 1.5

#: Name of the crop in batches.
CROP = "crop"


@dataclass(frozen=True)
class CutOut:
    """What boxes are cut out of a view.

    Attributes:
        ratio: Largest share of the voxels that all boxes of a view cover together.
        box_ratio: Least and largest edge of a box, as a share of each axis.
        swap_prob: Chance that a box shows another crop's content instead of noise.
    """

    ratio: float
    box_ratio: tuple[float, float]
    swap_prob: float

    def edges(self, voxels: int) -> tuple[int, int]:
        """Least and largest edge of a box along an axis, in whole voxels."""
        low, high = self.box_ratio
        largest = max(1, math.floor(high * voxels))
        return min(max(1, math.ceil(low * voxels)), largest), largest

    def num_boxes(self, size: Triple) -> int:
        """Boxes that are drawn for a view, of which those within the share drawn for it are cut out."""
        mean = math.prod(sum(self.edges(voxels)) / 2 for voxels in size)
        return math.ceil(_SPARE_BOXES * self.ratio * math.prod(size) / mean)


@dataclass(frozen=True)
class Views:
    """Two views of every crop: those of all crops, then again those of all crops.

    Attributes:
        shown_VCXYZ: What the network sees.
        whole_VCXYZ: The same with nothing cut out.
        turns_V: By how many quarters each was turned.
        cut_V1XYZ: True where something was cut out.
    """

    shown_VCXYZ: Tensor
    whole_VCXYZ: Tensor
    turns_V: Tensor
    cut_V1XYZ: Tensor


def two_views(crops_BCXYZ: Tensor, cut_out: CutOut, generator: torch.Generator) -> Views:
    """Each crop twice, each time turned and cut out by a draw of its own."""
    device, num_crops = crops_BCXYZ.device, len(crops_BCXYZ)
    num_views = 2 * num_crops
    turns_V = torch.randint(NUM_TURNS, (num_views,), generator=generator, device=device)
    whole = turned(crops_BCXYZ.repeat(2, 1, 1, 1, 1), turns_V)
    x, y, z = whole.shape[2:]
    first_VM3, edges_VM3, kept_VM = draw_boxes((x, y, z), num_views, cut_out, generator)
    swapped_VM = torch.rand(kept_VM.shape, generator=generator, device=device) < cut_out.swap_prob
    # A crop that is alone has no other to show.
    swapped_VM = swapped_VM & kept_VM & (num_crops > 1)
    swapped = covered(first_VM3, edges_VM3, swapped_VM, (x, y, z))[:, None]
    noisy = covered(first_VM3, edges_VM3, kept_VM & ~swapped_VM, (x, y, z))[:, None]
    # Another crop of the batch, as the view of the same turn shows it at these places.
    offset_V = torch.randint(1, max(num_crops, 2), (num_views,), generator=generator, device=device)
    view_V = torch.arange(num_views, device=device)
    other_V = (view_V + offset_V) % num_crops + view_V // num_crops * num_crops
    shown = torch.where(noisy, normalised_noise(whole, generator), whole)
    shown = torch.where(swapped, whole[other_V], shown)
    return Views(shown, whole, turns_V, noisy | swapped)


def turned(volume_VCXYZ: Tensor, turns_V: Tensor) -> Tensor:
    """Each volume turned in the X-Y plane by ``turns`` quarters, as ``torch.rot90`` turns it; X and Y are equal."""
    turns = turns_V.reshape(-1, 1, 1, 1, 1)
    volume_VCXYZ = torch.where(turns % 2 == 1, volume_VCXYZ.transpose(2, 3).flip(2), volume_VCXYZ)
    return torch.where(turns >= 2, volume_VCXYZ.flip(2, 3), volume_VCXYZ)


def draw_boxes(
    size: Triple, num_views: int, cut_out: CutOut, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """First voxels and edges ``(V, M, 3)`` of boxes, and which of them ``(V, M)`` are cut out.

    Each view has its own share of voxels, drawn between 0 and the largest; as many boxes are cut out, in the order of
    drawing, as have no more voxels than that together.
    """
    device = generator.device
    shape = (num_views, cut_out.num_boxes(size), 3)
    least, largest = torch.tensor([cut_out.edges(voxels) for voxels in size], device=device).T
    voxels = torch.tensor(size, device=device)
    # Rounding may give the last multiple of a share, but never the number itself.
    share = torch.rand(shape, generator=generator, device=device).clamp(max=1 - 1e-6)
    edges_VM3 = least + (share * (largest - least + 1)).long()
    share = torch.rand(shape, generator=generator, device=device).clamp(max=1 - 1e-6)
    first_VM3 = (share * (voxels - edges_VM3 + 1)).long()
    wanted_V1 = torch.rand(num_views, 1, generator=generator, device=device) * cut_out.ratio * math.prod(size)
    return first_VM3, edges_VM3, edges_VM3.prod(-1).cumsum(1) <= wanted_V1


def covered(first_VM3: Tensor, edges_VM3: Tensor, chosen_VM: Tensor, size: Triple) -> Tensor:
    """True in the voxels ``(V, X, Y, Z)`` that at least one of the chosen boxes covers."""
    inside = []
    for axis, voxels in enumerate(size):
        place_n = torch.arange(voxels, device=first_VM3.device)
        first = first_VM3[..., axis, None]
        inside.append(((place_n >= first) & (place_n < first + edges_VM3[..., axis, None])).float())
    # Products of ones and zeros, summed over boxes: how many cover a voxel.
    along_x, along_y, along_z = inside[0] * chosen_VM[..., None], inside[1], inside[2]
    planes_VMxy = (along_x[..., :, None] * along_y[..., None, :]).flatten(2)
    return torch.bmm(planes_VMxy.mT, along_z).unflatten(1, size[:2]) > 0  # type: ignore[no-untyped-call]


def normalised_noise(like_VCXYZ: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise, stretched to the least and the largest intensity of each volume."""
    noise = torch.randn(like_VCXYZ.shape, generator=generator, device=like_VCXYZ.device, dtype=like_VCXYZ.dtype)
    axes = (1, 2, 3, 4)
    low, high = noise.amin(axes, keepdim=True), noise.amax(axes, keepdim=True)
    least, largest = like_VCXYZ.amin(axes, keepdim=True), like_VCXYZ.amax(axes, keepdim=True)
    return least + (noise - low) / (high - low) * (largest - least)


@dataclass(frozen=True)
class BodyCrops:
    """Draws one crop of a scan, inside its body where that can be had.

    Attributes:
        size: Voxels of the crop.
        max_air: Share of air above which a crop is drawn anew, a few times; None keeps the first.
    """

    size: Triple
    max_air: float | None

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        """Batch keys: ``crop``, the image, and ``air``, the share of it outside the body."""

        def once() -> tuple[Triple, float]:
            origin = draw_origin(scan.shape, scan.body_box, self.size, rng)
            return origin, 1 - scan.foreground_ratio(origin, self.size)

        origin, air = with_little_air(once, self.max_air)
        return Sample({CROP: (Crop(origin, self.size, self.size),)}, arrays={"air": np.array([air], dtype=np.float32)})
