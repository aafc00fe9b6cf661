"""What a scan is told by besides its name: where it lies, its size and time of change, and its content."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mim3d.caching.case import digest_files, source_files
from mim3d.core.errors import DataError
from mim3d.scans.grids import file_of, is_there, resolved


@dataclass(frozen=True, kw_only=True)
class ScanFiles:
    """The files of a scan as they were when it was read.

    Attributes:
        paths: Addresses of its channels, with links resolved.
        num_bytes: Size of its files, those of the whole folder for a series.
        modified_ns: Time of their last change, in nanoseconds.
        sha256: Digest of their content; None where they could not be read.
    """

    paths: tuple[str, ...]
    num_bytes: int
    modified_ns: int
    sha256: str | None = None

    @classmethod
    def of(cls, images: Sequence[str], *, with_content: bool = False) -> "ScanFiles":
        """What can be told of a scan; its content only where asked for, as all of it is read."""
        stamps = [(0, 0), *(stamp for image in images for stamp in _stamps(image))]
        digest = None
        if with_content:
            try:
                digest = digest_files([file for image in images for file in source_files(image)], {})[0]
            except (DataError, OSError):
                digest = None
        return cls(
            paths=resolved(images),
            num_bytes=sum(size for size, _ in stamps),
            modified_ns=max(time for _, time in stamps),
            sha256=digest,
        )

    def entry(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return asdict(self)

    @property
    def is_gone(self) -> bool:
        """Whether nothing lies at its addresses any more."""
        return not any(is_there(path) for path in self.paths)

    @classmethod
    def read(cls, entry: Any) -> "ScanFiles | None":
        """A source from the plain values of a file; None where they are none."""
        try:
            paths = tuple(map(str, entry["paths"]))
            size, time, digest = int(entry["num_bytes"]), int(entry["modified_ns"]), entry["sha256"]
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        return cls(paths=paths, num_bytes=size, modified_ns=time, sha256=digest if isinstance(digest, str) else None)


def _stamps(image: str) -> list[tuple[int, int]]:
    """Size and time of change of each file of a channel, voxels beside a header included."""
    place = Path(file_of(image))
    try:
        found = [*place.iterdir()] if place.is_dir() else [Path(file) for file in source_files(image)]
        statuses = [each.stat() for each in found]
    except (DataError, OSError):
        return []
    return [(status.st_size, status.st_mtime_ns) for status in statuses]
