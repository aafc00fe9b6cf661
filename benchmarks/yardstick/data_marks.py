"""What the measured crops, bytes and build times are held against."""

from collections.abc import Sequence

from mim3d.core.types import Triple
from yardstick.data_stores import (
    EXACT,
    EXACT_STORED,
    MAPPED,
    NIFTI,
    NNSSL,
    NNSSL_INT16,
    OURS,
    OURS_STORED,
    PLAIN,
    PUBLISHED,
)
from yardstick.machine import Row
from yardstick.marks import Ratio

LARGE = (384, 384, 192)
SIZES = ((96, 96, 96), (192, 192, 192), LARGE)


def name_of(size: Sequence[int]) -> str:
    """A crop size for people."""
    return f"{size[0]}^3" if len(set(size)) == 1 else "x".join(str(edge) for edge in size)


def crop_ratios(rows: Sequence[Row], size: Triple, ours: str, others: Sequence[str], marked: bool) -> list[Ratio]:
    """How many times faster ``ours`` is than others, with marks where there are some."""
    marks = {PUBLISHED: (15.0, 20.0), NNSSL: (2.5, 5.0)} if marked else {}
    times = {row["store"]: row for row in rows if row["part"] == "crops" and row["size"] == size}
    ratios = []
    for other in others:
        for key, mark in zip(("warm_cpu_ms", "cold_wall_ms"), marks.get(other, (None, None)), strict=True):
            if other in times and ours in times:
                title = f"{name_of(size)} {key.split('_')[0]}: {other} / {ours}"
                ratios.append(Ratio(title, times[other][key] / times[ours][key], at_least=mark))
    return ratios


def judge_crops(rows: Sequence[Row]) -> list[Ratio]:
    """Ratios of crops of all sizes: marks, the ratios that flatter least, crops as stored and from the pyramid."""
    ratios = []
    others = (PUBLISHED, NNSSL, MAPPED, NNSSL_INT16, PLAIN)
    for size in SIZES:
        names = [row["store"] for row in rows if row["part"] == "crops" and row["size"] == size]
        ratios += crop_ratios(rows, size, OURS, others, size == SIZES[0])
        ratios += crop_ratios(rows, size, OURS_STORED, others, False)
        ratios += crop_ratios(rows, size, EXACT_STORED, (NNSSL_INT16,), False)
        for name in names:
            if "level" in name:
                ratios += crop_ratios(rows, size, name, others, False)
    return ratios


def judge_builds(rows: Sequence[Row]) -> list[Ratio]:
    """Ratios of bytes and of build times, and whether the lossless mode is."""
    stores = {row["store"]: row for row in rows if row["part"] == "build"}
    voxels = [row for row in rows if row["part"] == "voxels"]
    ours, equal = stores[OURS], sum(row["lossless_equal_in_window"] for row in voxels)
    ratios = [
        Ratio(f"bytes: {OURS} with pyramid / {PUBLISHED}", ours["bytes"] / stores[PUBLISHED]["bytes"], at_most=1 / 12),
        Ratio(f"bytes: {OURS} with pyramid / .nii.gz", ours["bytes"] / stores[NIFTI]["bytes"], at_most=0.6),
        *(
            Ratio(f"bytes: {OURS} with pyramid / {other}", ours["bytes"] / stores[other]["bytes"])
            for other in (NNSSL, NNSSL_INT16, PLAIN)
            if other in stores
        ),
        Ratio(
            "lossless: equal voxels in the window", equal / sum(row["voxels_in_window"] for row in voxels), 1.0, unit=""
        ),
    ]
    for other, mark in ((PUBLISHED, 3.0), (NNSSL, None), (NNSSL_INT16, None)):
        if other in stores:
            title = f"build, wall: {other} / {OURS}"
            ratios.append(Ratio(title, stores[other]["build_wall_s"] / ours["build_wall_s"], at_least=mark))
            ratios.append(Ratio(f"build, CPU: {other} / {OURS}", stores[other]["build_cpu_s"] / ours["build_cpu_s"]))
    title = f"build, wall: {PUBLISHED} / {EXACT}"
    return [*ratios, Ratio(title, stores[PUBLISHED]["build_wall_s"] / stores[EXACT]["build_wall_s"])]


def judge_loaders(rows: Sequence[Row]) -> list[Ratio]:
    """Ratios of the loaders: with a mark from the disk; and what eight workers would give, if the disk can."""
    ratios = []
    for row in rows:
        if row["part"] != "loader":
            continue
        mark = (7.0 if row["root"] == SIZES[1] else 20.0) if row["cold"] else None
        where = f"{'cold' if row['cold'] else 'warm'}, {row['num_workers']} workers: {row['hierarchy']}"
        ratios.append(Ratio(f"samples, {where}", row["published_ms"] / row["mim3d_ms"], at_least=mark))
        ratios.append(Ratio(f"as float32, {where}", row["published_ms"] / row["mim3d_float32_ms"]))
        if row["cold"] and row["num_workers"]:
            seconds = row["mim3d_ms"] / 1e3
            title = f"8 workers / {seconds:.4f} s each: {row['hierarchy']}"
            ratios.append(Ratio(title, 8 / seconds, at_least=400.0, unit="/s"))
    return ratios
