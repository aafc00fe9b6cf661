"""What is probed: views of scans that an encoder sees, and the items in them whose class is known.

Items are tokens that carry one label clearly, as many of each label as of any other, or one box of each scan with a
class, as the classification task makes them. Shape suffixes: n items of a view, N items of all views, F raw values per
item, C channels, L tokens of a crop, T tokens of all crops of a scan.
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mim3d.backbones.contract import Encoder, check_multiple
from mim3d.caching.cache import Cache
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import DataError, listed
from mim3d.core.types import Triple
from mim3d.datasets.references import annotated_values
from mim3d.loading.samples import SampleDataset
from mim3d.nn.volumes import to_blocks
from mim3d.probing.settings import Probing
from mim3d.scans.intensity import Intensity
from mim3d.tasks.classification.cubes import CubeFinisher
from mim3d.tasks.classification.task import Classification
from mim3d.tasks.segmentation.crops import place_crop

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: Edge in voxels that a planned crop does not exceed.
LARGEST_PLANNED_EDGE = 96

#: Background whose voxels vary less than this (in mapped intensities) is air: it needs no feature to be recognised.
CONSTANT_STD = 1e-3

#: Passes scans on and shows how many have come.
Watch = Callable[[Sequence[CachedScan]], Iterable[CachedScan]]


@dataclass(frozen=True, kw_only=True, eq=False)
class View:
    """A box of one scan as the encoder sees it, and its items: tokens, or the whole box as one.

    Attributes:
        load: Reads it, ``(C, X, Y, Z)`` float32 network input.
        tokens_n: Raster indices of its tokens; None for the mean over all of them, which is then the one item.
        classes_n: Class of each item.
        raw_nF: Mean and deviation of each channel over each item's voxels: what needs no encoder.
        patient: Whose scan it is.
    """

    load: Callable[[], Tensor]
    tokens_n: Ints | None
    classes_n: Ints
    raw_nF: Floats
    patient: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeSet:
    """Views to learn from and to score on, apart by patient.

    Attributes:
        target: ``labels`` of tokens, or ``classes`` of whole scans.
        names: K classes, each of them among the items to learn from.
        training: Views to learn from.
        held_out: Views to score on.
        size: Voxels of every view.
        token_edge: Voxels per token edge.
        num_scans: Scans to learn from, and to score on.
        left_out: Names of classes without an item to learn from.
    """

    target: str
    names: tuple[str, ...]
    training: tuple[View, ...]
    held_out: tuple[View, ...]
    size: Triple
    token_edge: int
    num_scans: tuple[int, int]
    left_out: tuple[str, ...] = ()

    def counts(self) -> dict[str, tuple[int, int]]:
        """Items of each class to learn from, and to score on."""
        per_part = [Counter(classes_of(views).tolist()) for views in (self.training, self.held_out)]
        return {name: (per_part[0][place], per_part[1][place]) for place, name in enumerate(self.names)}

    def is_scored_as(self, other: "ProbeSet") -> bool:
        """Whether both score on the same items: the same tokens of the same crops, or the same scans."""
        if self.target == "labels" and (self.size, self.token_edge) != (other.size, other.token_edge):
            return False
        mine, others = (
            [(v.patient, None if v.tokens_n is None else v.tokens_n.tolist(), v.classes_n.tolist()) for v in s.held_out]
            for s in (self, other)
        )
        return self.names == other.names and mine == others

    def in_memory(self) -> "ProbeSet":
        """The same with every view read once and kept."""

        def kept(view: View) -> View:
            image = view.load()
            return replace(view, load=lambda: image)

        return replace(self, training=tuple(map(kept, self.training)), held_out=tuple(map(kept, self.held_out)))


def classes_of(views: Sequence[View]) -> Ints:
    """Classes ``(N,)`` of all items."""
    return np.concatenate([view.classes_n for view in views]) if views else np.empty(0, np.int64)


def planned_size(scans: Sequence[CachedScan], multiple: Triple, largest: Triple | None = None) -> Triple:
    """Voxels of a crop in multiples of an encoder's: those of the median scan, limited along each axis."""
    limits = largest or (LARGEST_PLANNED_EDGE,) * 3
    voxels = (min(int(median(scan.shape[axis] for scan in scans)), limits[axis]) for axis in range(3))
    x, y, z = (max(1, edge // step) * step for edge, step in zip(voxels, multiple, strict=True))
    return x, y, z


def label_set(
    training: Sequence[CachedScan],
    held_out: Sequence[CachedScan],
    names: Mapping[int, str],
    encoder: Encoder,
    intensity: Intensity,
    probing: Probing,
    *,
    seed: int = 0,
    largest: Triple | None = None,
    watch: Watch | None = None,
) -> ProbeSet:
    """Tokens of scans with label maps.

    Which tokens of a scan are taken depends on the scan, the encoder's tokens, the settings and the seed alone.

    Args:
        training: Scans to learn from.
        held_out: Scans to score on.
        names: Label value -> name, background 0 included.
        encoder: Whose tokens they are.
        intensity: Mapping of stored intensities to network input.
        probing: How tokens are chosen.
        seed: Seed of places and tokens.
        largest: Edges that a planned crop does not exceed.
        watch: Passes the scans on, to show progress.
    Raises:
        ConfigError: A crop that is no multiple of the token edge.
        DataError: Fewer than two labels have clear tokens, or none is left to score on.
    """
    size = checked_crop_size(probing.crop_size, encoder) or planned_size(training, encoder.input_multiple, largest)
    chooser = _Chooser(names, size, encoder.strides[-1], intensity, probing, seed)
    scans = [*training, *held_out]
    of_scan = [chooser.views(scan, number) for number, scan in enumerate(scans if watch is None else watch(scans))]
    parts = [list(chain(*part)) for part in (of_scan[: len(training)], of_scan[len(training) :])]
    known = sorted({int(value) for view in parts[0] for value in view.classes_n})
    numbered = [_numbered(part, known) for part in parts]
    absent = tuple(name for value, name in sorted(names.items()) if value not in known)
    share = f"{probing.clear_ratio:.0%}"
    remedy = (
        f"a token is {chooser.token_edge} voxels wide; probe an encoder with smaller tokens, prepare the scans with a "
        "smaller spacing_mm, or lower probing.clear_ratio."
    )
    if len(known) < 2:
        raise DataError(
            f"Fewer than two labels fill {share} of a token in the training scans (none does for {listed(absent)}): "
            f"{remedy}"
        )
    if not numbered[1]:
        raise DataError(f"No label fills {share} of a token in the held-out scans: {remedy}")
    return ProbeSet(
        target="labels",
        names=tuple(names[value] for value in known),
        training=numbered[0],
        held_out=numbered[1],
        size=size,
        token_edge=chooser.token_edge,
        num_scans=(len(training), len(held_out)),
        left_out=absent,
    )


def checked_crop_size(asked: int | Triple | None, encoder: Encoder) -> Triple | None:
    """Voxels along X, Y, Z of the crop that is asked for; None where it is to be planned.

    Raises:
        ConfigError: It is no multiple of the token edge; the sentence names the nearest sizes.
    """
    size = (asked,) * 3 if isinstance(asked, int) else asked
    if size is not None:
        check_multiple(size, encoder.input_multiple, "probing.crop_size")
    return size


def _numbered(views: Sequence[View], known: Sequence[int]) -> tuple[View, ...]:
    """Views with places in ``known`` for label values; items of other labels, and views without any, are left out."""
    kept = []
    for view in views:
        keep_n = np.isin(view.classes_n, known)
        if keep_n.any():
            classes_n = np.searchsorted(known, view.classes_n[keep_n])
            tokens_n = None if view.tokens_n is None else view.tokens_n[keep_n]
            kept.append(replace(view, tokens_n=tokens_n, classes_n=classes_n, raw_nF=view.raw_nF[keep_n]))
    return tuple(kept)


@dataclass(frozen=True, eq=False)
class TokenCrop:
    """A crop of a scan that can be read: network input, in full resolution."""

    scan: CachedScan
    origin: Triple
    size: Triple
    intensity: Intensity

    def __call__(self) -> Tensor:
        """``(C, *size)`` float32."""
        stored = self.scan.read(self.origin, self.size)
        return torch.from_numpy(self.intensity.apply(self.scan.to_values(stored), self.scan.statistics))

    def label(self, values: Sequence[int], token_edge: int) -> tuple[Ints, Floats]:
        """Of each token (L,), the label value that most of its voxels carry, and their share of all its voxels.

        Args:
            values: Label values that count; voxels of others, and those beyond the scan, carry none.
            token_edge: Voxels per token edge.
        """
        label = self.scan.read_label(self.origin, self.size)
        x, y, z = (
            (start + np.arange(edge) >= 0) & (start + np.arange(edge) < voxels)
            for start, edge, voxels in zip(self.origin, self.size, self.scan.shape, strict=True)
        )
        inside_XYZ = x[:, None, None] & y[:, None] & z
        return token_labels(np.where(inside_XYZ, label.astype(np.int64), -1), values, token_edge)


def token_labels(label_XYZ: npt.NDArray[np.int64], values: Sequence[int], token_edge: int) -> tuple[Ints, Floats]:
    """Of each token (L,) in raster order, the value that most of its voxels carry, and their share of its voxels.

    Args:
        label_XYZ: Label values; what is none of ``values`` counts for no label.
        values: Label values, rising.
        token_edge: Voxels per token edge, a divisor of every axis.
    """
    blocks = to_blocks(torch.from_numpy(label_XYZ)[None, None], (token_edge,) * 3)[0].flatten(1).numpy()
    places = np.searchsorted(values, blocks).clip(max=len(values) - 1)
    known = np.asarray(values)[places] == blocks
    token = np.broadcast_to(np.arange(len(blocks))[:, None], blocks.shape)
    counts = np.bincount(token[known] * len(values) + places[known], minlength=len(blocks) * len(values))
    counts_LK = counts.reshape(len(blocks), len(values))
    return np.asarray(values, dtype=np.int64)[counts_LK.argmax(1)], counts_LK.max(1) / blocks.shape[1]


@dataclass(frozen=True, eq=False)
class _Chooser:
    """Chooses crops and tokens of one scan after the other; the classes of its views are label values."""

    names: Mapping[int, str]
    size: Triple
    token_edge: int
    intensity: Intensity
    probing: Probing
    seed: int

    def views(self, scan: CachedScan, position: int) -> list[View]:
        """The views of the scan at a position, with the tokens that were drawn."""
        rng = np.random.default_rng((self.seed, zlib.crc32(scan.case.id.encode())))
        # The background of a scan counts where it has annotations of all labels.
        annotated = annotated_values(scan.case, self.names)
        every = annotated is None or annotated >= set(self.names)
        values = [v for v in sorted(self.names) if annotated is None or (v in annotated and (v != 0 or every))]
        crops = [
            TokenCrop(scan, origin, self.size, self.intensity) for origin in self._origins(scan, values, position, rng)
        ]
        raw = [raw_of_tokens(crop(), self.token_edge) for crop in crops]
        labels = []
        for crop, raw_LF in zip(crops, raw, strict=True):
            value_L, share_L = crop.label(values, self.token_edge)
            deviation_LC = raw_LF[:, raw_LF.shape[1] // 2 :]
            is_air_L = (value_L == 0) & (deviation_LC.max(1) < CONSTANT_STD)
            labels.append(np.where((share_L >= self.probing.clear_ratio) & ~is_air_L, value_L, -1))
        # Tokens of each crop, at most so many of each label over all of them.
        crop_T = np.concatenate([np.full(len(value_L), place) for place, value_L in enumerate(labels)])
        token_T = np.concatenate([np.arange(len(value_L)) for value_L in labels])
        value_T = np.concatenate(labels)
        chosen = []
        for value in values:
            candidates = np.flatnonzero(value_T == value)
            number = min(len(candidates), self.probing.tokens_per_label)
            chosen.append(rng.choice(candidates, number, replace=False))
        places = np.sort(np.concatenate(chosen))
        drawn = [token_T[places[crop_T[places] == place]] for place in range(len(labels))]
        return [
            View(
                load=crop,
                tokens_n=tokens,
                classes_n=value_L[tokens],
                raw_nF=raw_LF[tokens],
                patient=scan.case.patient,
            )
            for crop, tokens, value_L, raw_LF in zip(crops, drawn, labels, raw, strict=True)
            if len(tokens)
        ]

    def _origins(
        self, scan: CachedScan, values: Sequence[int], position: int, rng: np.random.Generator
    ) -> list[Triple]:
        """Where crops begin: a token is centred on a voxel of each label in turn, as far as the scan reaches."""
        places = scan.class_locations
        present = [value for value in values if value != 0 and len(places.get(value, ()))]
        # The middle of a crop lies between two tokens where their number is even.
        shift = [self.token_edge // 2 * (edge // self.token_edge % 2 == 0) for edge in self.size]
        origins = []
        for crop in range(self.probing.crops_per_scan):
            centre: list[int | None] = [None, None, None]
            if present:
                # Each scan goes on where the one before it ended, so that all labels have their turn.
                voxels = places[present[(position * self.probing.crops_per_scan + crop) % len(present)]]
                voxel = voxels[int(rng.integers(len(voxels)))]
                centre = [int(at) - by for at, by in zip(voxel, shift, strict=True)]
            x, y, z = (
                place_crop(shape, edge, at, rng) for shape, edge, at in zip(scan.shape, self.size, centre, strict=True)
            )
            origins.append((x, y, z))
        return list(dict.fromkeys(origins))


def raw_of_tokens(image_CXYZ: Tensor, token_edge: int) -> Floats:
    """Mean, then deviation, of each channel over each token's voxels: ``(L, 2 C)``."""
    blocks_LVC = to_blocks(image_CXYZ[None].double(), (token_edge,) * 3)[0].flatten(1, 3)
    raw: Floats = torch.cat([blocks_LVC.mean(1), blocks_LVC.std(1, correction=0)], dim=1).numpy()
    return raw


def class_set(
    training: Cache,
    held_out: Sequence[CachedScan],
    encoder: Encoder,
    intensity: Intensity,
    probing: Probing,
    *,
    watch: Watch | None = None,
) -> ProbeSet:
    """Boxes of scans with a class each, placed and sized as `mim3d finetune --task classification` plans them.

    Args:
        training: Scans to learn from.
        held_out: Scans to score on.
        encoder: What will see them.
        intensity: Mapping of stored intensities to network input.
        probing: Its ``crop_size`` gives the voxels of a box.
        watch: Passes the scans on, to show progress.
    Raises:
        ConfigError: A size that is no multiple of the token edge.
        DataError: Fewer than two classes.
    """
    asked = Classification(size=probing.crop_size).checked(encoder.recipe)
    classes = asked.classes_of(training)
    planned = asked.planned(encoder.recipe, tuple(training), classes)
    names = tuple(name for _, name in sorted(classes.items()))
    sampler = planned.exact_sampler(names)
    scans = [*training, *held_out]
    views = []
    for scan in scans if watch is None else watch(scans):
        boxes = SampleDataset([scan], sampler, intensity, 0, CubeFinisher(), strict=True)
        load = partial(_box_of, boxes)
        image_CXYZ = load().double()
        raw = [image_CXYZ.mean((1, 2, 3)).numpy(), image_CXYZ.std((1, 2, 3), correction=0).numpy()]
        views.append(
            View(
                load=load,
                tokens_n=None,
                classes_n=np.array([names.index(str(scan.case.class_name))]),
                raw_nF=np.concatenate(raw)[None],
                patient=scan.case.patient,
            )
        )
    return ProbeSet(
        target="classes",
        names=names,
        training=tuple(views[: len(training)]),
        held_out=tuple(views[len(training) :]),
        size=planned.cube().size,
        token_edge=encoder.strides[-1],
        num_scans=(len(training), len(held_out)),
    )


def _box_of(boxes: SampleDataset) -> Tensor:
    return boxes[0]["image"][0]
