"""Stores of one scan, each of which gives any crop: the scan's own file, the published caches, and mim3d's."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mim3d.caching.cache import open_cache
from mim3d.caching.scan import CachedScan
from mim3d.core.types import Triple
from mim3d.nn.volumes import resize_image
from mim3d.scans.intensity import CT_WINDOW_HU, Intensity, apply_rescaling
from yardstick.blosc_partition import blosc_partition
from yardstick.ct_scans import Scan, nib
from yardstick.page_cache import files_below
from yardstick.published_loader import WINDOW_HU, persistent_dataset

#: Crops that decide the partition of blosc2 arrays; the rule gives the same for 96 and for 192.
BLOSC_PATCH = (192, 192, 192)
BLOSC_LEVEL = 8

#: Names of the stores, in results and ratios.
NIFTI = ".nii.gz, nibabel"
PUBLISHED = "MONAI PersistentDataset"
MAPPED = "MONAI PersistentDataset, mmap=True"
NNSSL = "blosc2 float32 (nnssl)"
NNSSL_INT16 = "blosc2 int16 (its rule)"
PLAIN = "float32 unpadded, mapped"
BY_ZARR = "mim3d 8-bit, by zarr-python"
OURS = "mim3d 8-bit"
OURS_STORED = "mim3d 8-bit, as stored"
EXACT = "mim3d lossless"
EXACT_STORED = "mim3d lossless, as stored"
LEVEL_2 = "mim3d 8-bit, level 2: 96x96x48"
LEVEL_1 = "mim3d 8-bit, level 1: 192x192x96"
LEVEL_1_AVERAGED = "mim3d 8-bit, level 1 averaged to 96^3"

ReadCrop = Callable[[Triple, Triple], np.ndarray]


@dataclass(frozen=True)
class Store:
    """One scan in one store.

    Attributes:
        name: of the kind of store.
        place: file or folder that holds the scan.
        delivers: what a crop is: type and unit.
        read: the crop of ``(origin, size)``, in voxels of full resolution.
        hu_of: what a crop means in HU; None where it is no crop of full resolution.
        opened_anew: gives a ``read`` that knows nothing of the scan; None where ``read`` opens the file each time.
        slow: measured once per scan and size only.
    """

    name: str
    place: Path
    delivers: str
    read: ReadCrop
    hu_of: Callable[[np.ndarray], np.ndarray] | None
    opened_anew: Callable[[], ReadCrop] | None = None
    slow: bool = False

    @property
    def files(self) -> list[Path]:
        """The files that hold the scan."""
        return files_below(self.place)


def normalised(voxels_hu: np.ndarray) -> np.ndarray:
    """Float32, the window mapped to 0..1."""
    low, high = WINDOW_HU
    values = voxels_hu.astype(np.float32)
    np.clip(values, low, high, out=values)
    values -= np.float32(low)
    values *= np.float32(1 / (high - low))
    return values


def _hu_of_normalised(values: np.ndarray) -> np.ndarray:
    low, high = WINDOW_HU
    return values * np.float32(high - low) + np.float32(low)


def _box(origin: Triple, size: Triple) -> tuple[slice, slice, slice]:
    x, y, z = (slice(first, first + length) for first, length in zip(origin, size, strict=True))
    return x, y, z


def nifti_store(scan: Scan) -> Store:
    """The scan's own file, of which nibabel unpacks as much as a crop needs."""

    def read(origin: Triple, size: Triple) -> np.ndarray:
        image = nib.load(scan.path)
        axes = nib.io_orientation(image.affine).astype(int)
        stored: list[slice] = []
        for voxels, (axis, sign) in zip(image.shape, axes, strict=True):
            first = origin[axis] if sign > 0 else voxels - origin[axis] - size[axis]
            stored.append(slice(first, first + size[axis]))
        return normalised(np.ascontiguousarray(nib.apply_orientation(image.dataobj[tuple(stored)], axes)))

    return Store(NIFTI, scan.path, "float32 0..1", read, _hu_of_normalised, slow=True)


def _padded_origin(origin: Triple, size: Triple, start: np.ndarray, shape: tuple[int, ...]) -> Triple:
    """A crop's place in a padded body box; crops that reach out of it are moved inside."""
    limits = [voxels - length for voxels, length in zip(shape, size, strict=True)]
    x, y, z = (min(max(o - int(s), 0), limit) for o, s, limit in zip(origin, start, limits, strict=True))
    return x, y, z


def build_persistent(scan: Scan, folder: Path) -> Path:
    """Pickle the scan as the published pipeline does; the file."""
    dataset = persistent_dataset([scan.path], folder)
    before = set(folder.glob("*.pt"))
    dataset[0]
    (made,) = set(folder.glob("*.pt")) - before
    return made


def persistent_stores(scan: Scan, pickle: Path) -> list[Store]:
    """The published store, and the same file mapped into memory."""
    dataset = persistent_dataset([scan.path], pickle.parent)

    def cut(item: dict[str, torch.Tensor], origin: Triple, size: Triple) -> np.ndarray:
        image = torch.as_tensor(item["image"])[0]
        first = _padded_origin(origin, size, np.asarray(item["foreground_start_coord"]), tuple(image.shape))
        return image[_box(first, size)].clone(memory_format=torch.contiguous_format).numpy()

    def read_whole(origin: Triple, size: Triple) -> np.ndarray:
        return cut(dataset[0], origin, size)

    def read_mapped(origin: Triple, size: Triple) -> np.ndarray:
        return cut(torch.load(pickle, mmap=True, weights_only=False), origin, size)

    return [
        Store(PUBLISHED, pickle, "float32 0..1", read_whole, _hu_of_normalised),
        Store(MAPPED, pickle, "float32 0..1", read_mapped, _hu_of_normalised),
    ]


def build_blosc(scan: Scan, target: Path, dtype: str) -> Path:
    """Write the scan as nnssl does, as ``float32`` 0..1 or as ``int16`` HU; the file."""
    import blosc2

    blosc2.set_nthreads(1)
    voxels = scan.voxels_hu()
    array = np.ascontiguousarray(normalised(voxels) if dtype == "float32" else voxels.astype(np.int16))[None]
    blocks, chunks = blosc_partition(array.shape, BLOSC_PATCH, array.itemsize)
    cparams = {"codec": blosc2.Codec.ZSTD, "clevel": BLOSC_LEVEL, "nthreads": 1}
    blosc2.asarray(array, urlpath=str(target), chunks=chunks, blocks=blocks, cparams=cparams, mmap_mode="w+")
    return target


def blosc_store(path: Path, dtype: str) -> Store:
    """A blosc2 array, opened and mapped for each crop as nnssl does."""
    import blosc2

    def read(origin: Triple, size: Triple) -> np.ndarray:
        array = blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
        return array[(0, *_box(origin, size))]

    if dtype == "float32":
        return Store(NNSSL, path, "float32 0..1", read, _hu_of_normalised)
    return Store(NNSSL_INT16, path, "int16 HU", read, lambda crop: crop)


def build_plain(scan: Scan, target: Path) -> Path:
    """Write the scan as plain float32; the file."""
    np.save(target, normalised(scan.voxels_hu()))
    return target


def plain_store(path: Path) -> Store:
    """A plain array, mapped for each crop."""

    def read(origin: Triple, size: Triple) -> np.ndarray:
        return np.array(np.load(path, mmap_mode="r")[_box(origin, size)], order="C")

    return Store(PLAIN, path, "float32 0..1", read, _hu_of_normalised)


@dataclass(frozen=True)
class OurCache:
    """A cache of one scan, and other names for it under which nothing of it is remembered.

    Attributes:
        path: of the cache.
        aliases: numbers of the names given out.
    """

    path: Path
    aliases: Iterator[int] = field(default_factory=itertools.count)

    def scan(self) -> CachedScan:
        """The scan, of which the process remembers what it read before."""
        return open_cache(self.path)[0]

    def unknown_scan(self) -> CachedScan:
        """The scan under a new name: its metadata and index are read again."""
        alias = self.path.with_name(f"{self.path.name}_alias_{next(self.aliases)}")
        alias.symlink_to(self.path, target_is_directory=True)
        return open_cache(alias)[0]

    @property
    def array_path(self) -> Path:
        """The full-resolution array, for other readers of zarr."""
        return next(self.path.rglob("image/0/zarr.json")).parent


def _values(scan: CachedScan, origin: Triple, size: Triple, level: int, shown: Triple | None) -> np.ndarray:
    """A crop as the network's float32 input, from a level of the pyramid; averaged to ``shown`` where given."""
    x, y, z = (first >> level for first in origin)
    p, q, r = (length >> level for length in size)
    image = torch.from_numpy(scan.read((x, y, z), (p, q, r), level)).to(torch.float32)
    apply_rescaling(image, Intensity().rescaling(scan.stored_intensities, scan.statistics))
    return (image if shown is None else resize_image(image[None], shown)[0])[0].numpy()


def _stored(scan: CachedScan, origin: Triple, size: Triple) -> np.ndarray:
    return scan.read(origin, size)[0]


def _our_store(
    name: str,
    cache: OurCache,
    delivers: str,
    read: Callable[..., np.ndarray],
    hu_of: Callable[[np.ndarray], np.ndarray] | None,
) -> Store:
    return Store(
        name,
        cache.path,
        delivers,
        partial(read, cache.scan()),
        hu_of,
        opened_anew=lambda: partial(read, cache.unknown_scan()),
    )


def our_stores(eight: OurCache, sixteen: OurCache) -> list[Store]:
    """What mim3d reads of its cache at full resolution, in 8 bits and without loss."""
    assert CT_WINDOW_HU == WINDOW_HU

    def hu_of_stored(cache: OurCache, crop: np.ndarray) -> np.ndarray:
        return cache.scan().to_values(crop[None])[0]

    whole = partial(_values, level=0, shown=None)
    return [
        _our_store(OURS, eight, "float32 0..1", whole, _hu_of_normalised),
        _our_store(OURS_STORED, eight, "uint8", _stored, partial(hu_of_stored, eight)),
        _our_store(EXACT, sixteen, "float32 0..1", whole, _hu_of_normalised),
        _our_store(EXACT_STORED, sixteen, "int16 HU", _stored, partial(hu_of_stored, sixteen)),
    ]


def pyramid_stores(eight: OurCache) -> list[Store]:
    """What mim3d reads for a crop of 384x384x192 that is shown smaller."""
    shown = partial(_values, level=1, shown=(96, 96, 96))
    return [
        _our_store(LEVEL_2, eight, "float32 0..1", partial(_values, level=2, shown=None), None),
        _our_store(LEVEL_1_AVERAGED, eight, "float32 0..1", shown, None),
        _our_store(LEVEL_1, eight, "float32 0..1", partial(_values, level=1, shown=None), None),
    ]


def zarr_store(eight: OurCache) -> Store:
    """zarr-python on the arrays of mim3d's cache."""
    import zarr

    def read(origin: Triple, size: Triple) -> np.ndarray:
        return np.asarray(zarr.open_array(eight.array_path, mode="r")[(0, *_box(origin, size))])

    def hu_of(crop: np.ndarray) -> np.ndarray:
        return eight.scan().to_values(crop[None])[0]

    return Store(BY_ZARR, eight.path, "uint8", read, hu_of)
