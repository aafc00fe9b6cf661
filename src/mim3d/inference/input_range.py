"""What a network learned from, in robust ranges, and what of a scan lies far outside of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from mim3d.caching.preprocessing import Prepared
from mim3d.caching.scan import CachedScan
from mim3d.core.types import Spacing
from mim3d.scans.modality import is_ct_set

#: Intensities in HU are far outside where they lie beyond those of training by this share of their usual width.
FAR_INTENSITY = 0.5

#: Voxels are far outside where they are this many times as large or small as any of training.
FAR_SPACING = 2.0

#: Share of the scans of training that must show air for one without it to be told.
LEAST_WITH_AIR = 0.98


@dataclass(frozen=True, kw_only=True)
class ChannelRange:
    """One channel over the scans of training.

    Attributes:
        modality: CT, MR or another, as most scans are; None where nobody says it.
        in_hu: Whether the scans are CT in HU.
        has_air: Whether nearly all of them show air, as a CT of more than soft tissue does.
        low: Least and greatest 0.5 percentile of a scan's foreground.
        mean: Least and greatest mean of a scan's foreground.
        high: Least and greatest 99.5 percentile of a scan's foreground.
        width: Median distance of both percentiles.
    """

    modality: str | None = None
    in_hu: bool = False
    has_air: bool = False
    low: tuple[float, float]
    mean: tuple[float, float]
    high: tuple[float, float]
    width: float


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """The scans of training.

    Attributes:
        channels: Each of their channels.
        spacing_mm: Least and greatest voxel size along X, Y, Z, as they were given to the network.
        source_spacing_mm: The same of their files, where they were resampled; None where they were not, or where that
            is not known.
    """

    channels: tuple[ChannelRange, ...]
    spacing_mm: tuple[Spacing, Spacing]
    source_spacing_mm: tuple[Spacing, Spacing] | None = None

    @classmethod
    def of(cls, scans: Sequence[CachedScan]) -> "InputRange":
        """The ranges of cached scans, one at least; no voxel is read."""
        channels = []
        for place in range(scans[0].num_channels):
            in_hu = is_ct_set([scan.modalities[place] for scan in scans if len(scan.modalities) > place])
            # Scans that differ from their set were named when it was cached; they are not what the network knows.
            alike = [scan for scan in scans if len(scan.modalities) > place and scan.modalities[place].in_hu == in_hu]
            found = [scan.modalities[place] for scan in alike]
            statistics = [scan.statistics[place] for scan in alike or scans]
            names = [channel.name for channel in found if channel.name is not None]
            lows = [stats.percentile_00_5 for stats in statistics]
            highs = [stats.percentile_99_5 for stats in statistics]
            means = [stats.mean for stats in statistics]
            channels.append(
                ChannelRange(
                    modality=max(names, key=names.count) if names else None,
                    in_hu=in_hu,
                    has_air=in_hu and sum(channel.sign == "HU" for channel in found) >= LEAST_WITH_AIR * len(found),
                    low=(min(lows), max(lows)),
                    mean=(min(means), max(means)),
                    high=(min(highs), max(highs)),
                    width=median(high - low for low, high in zip(lows, highs, strict=True)),
                )
            )
        sources = [scan.source_spacing_mm for scan in scans if scan.source_spacing_mm is not None]
        return cls(
            channels=tuple(channels),
            spacing_mm=_ends([scan.spacing_mm for scan in scans]),
            source_spacing_mm=_ends(sources) if len(sources) == len(scans) else None,
        )

    @property
    def in_hu(self) -> tuple[bool, ...]:
        """For each channel whether its scans are CT in HU."""
        return tuple(channel.in_hu for channel in self.channels)

    def warnings_on(self, prepared: Prepared) -> list[str]:
        """Sentences on what of a scan lies far outside; none for a scan of the kind that the network knows."""
        said = []
        for place, (known, found) in enumerate(zip(self.channels, prepared.modalities, strict=False)):
            where = f"channel {place}: " if len(self.channels) > 1 else ""
            stats = prepared.statistics[place]
            kind = known.modality or "scans that are not CT"
            is_other = found.name is not None and known.modality is not None and found.name != known.modality
            if known.in_hu and not found.in_hu:
                seen = f"{stats.minimum:.4g} to {stats.maximum:.4g}"
                said.append(f"{where}the network learned from CT in HU, and this scan ({seen}) is not in HU")
            elif is_other or (found.in_hu and not known.in_hu):
                said.append(f"{where}the network learned from {kind}, and this scan is {found.name or 'not'}")
            elif known.has_air and found.sign != "HU":
                said.append(f"{where}the network learned from CT, and this scan shows no air to tell CT by")
            elif known.in_hu:
                values, margin = (stats.percentile_00_5, stats.mean, stats.percentile_99_5), FAR_INTENSITY * known.width
                ranges = (known.low, known.mean, known.high)
                if any(not low - margin <= at <= high + margin for at, (low, high) in zip(values, ranges, strict=True)):
                    said.append(
                        f"{where}its intensities ({values[0]:.4g} to {values[2]:.4g} HU) lie far from those of "
                        f"training ({known.low[0]:.4g} to {known.high[1]:.4g} HU)"
                    )
        # What is resampled comes to the network in one voxel size, whatever it was.
        size_mm = prepared.spacing_mm if self.source_spacing_mm is None else prepared.grid.spacing_mm
        least, greatest = self.source_spacing_mm or self.spacing_mm
        ratios = zip(size_mm, least, greatest, strict=True)
        if any(not low / FAR_SPACING <= mm <= high * FAR_SPACING for mm, low, high in ratios):
            own, first, last = (" x ".join(f"{mm:.3g}" for mm in size) for size in (size_mm, least, greatest))
            said.append(f"its voxels of {own} mm lie far from those of training ({first} to {last} mm)")
        return [f"{text}; check what the network made of it." for text in said]


def _ends(sizes_mm: Sequence[Spacing]) -> tuple[Spacing, Spacing]:
    """Least and greatest along each axis."""
    x, y, z = zip(*sizes_mm, strict=True)
    return (min(x), min(y), min(z)), (max(x), max(y), max(z))
