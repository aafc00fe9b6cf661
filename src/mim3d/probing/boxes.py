"""Items from classes: one box of each scan, as the classification task makes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mim3d.backbones.contract import Encoder
from mim3d.caching.cache import Cache
from mim3d.caching.scan import CachedScan
from mim3d.loading.loader import SampleDataset
from mim3d.probing.items import ProbeSet, View
from mim3d.probing.settings import Probing
from mim3d.probing.tokens import Watch
from mim3d.scans.intensity import Intensity
from mim3d.tasks.classification.cubes import CubeFinisher, CubeSampler
from mim3d.tasks.classification.task import Classification


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
    views = [_view(scan, sampler, intensity, names) for scan in (scans if watch is None else watch(scans))]
    return ProbeSet(
        target="classes",
        names=names,
        training=tuple(views[: len(training)]),
        held_out=tuple(views[len(training) :]),
        size=planned.cube().size,
        token_edge=encoder.strides[-1],
        num_scans=(len(training), len(held_out)),
    )


@dataclass(frozen=True, eq=False)
class Box:
    """The box of a scan that can be read: network input, resampled."""

    scan: CachedScan
    sampler: CubeSampler
    intensity: Intensity

    def __call__(self) -> Tensor:
        """``(C, *size)`` float32."""
        dataset = SampleDataset([self.scan], self.sampler, self.intensity, 0, CubeFinisher(), strict=True)
        return dataset[0]["image"][0]


def _view(scan: CachedScan, sampler: CubeSampler, intensity: Intensity, names: Sequence[str]) -> View:
    box = Box(scan, sampler, intensity)
    image = box()
    raw = np.concatenate([image.double().mean((1, 2, 3)).numpy(), image.double().std((1, 2, 3), correction=0).numpy()])
    return View(
        load=box,
        tokens_n=None,
        classes_n=np.array([names.index(str(scan.case.class_name))]),
        raw_nF=raw[None],
        patient=scan.case.patient,
    )
