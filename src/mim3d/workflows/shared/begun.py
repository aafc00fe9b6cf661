"""What followed from the defaults when a run of pre-training was started: later versions may plan otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mim3d.backbones.contract import Backbone
from mim3d.core.names import number_of
from mim3d.core.run_folder import MANIFEST_NAME, noted_intensity, read_manifest
from mim3d.core.settings import build_settings, coerce, to_named, update_settings
from mim3d.core.types import Spacing
from mim3d.methods import METHODS, Method
from mim3d.scans.intensity import Intensity
from mim3d.training.schedule import Optimisation

#: Passes over the scans of a planned length (the paper's 800 epochs).
PLANNED_PASSES = 800

#: Steps that a planned length has at least: a few hundred small ones bring losses just below that of a constant guess
#: (docs/concepts/learning-rates.md).
LEAST_STEPS = 5_000

#: And at most: samples are drawn anew in every pass, so that many scans need few passes.
MOST_STEPS = 100_000


@dataclass(frozen=True)
class Begun:
    """What a run that is resumed was started with; nothing where a run is new.

    Attributes:
        written: Its method with every value that was planned, as its manifest has it.
        optim: Its optimisation, which lacks the floor of rates where it is of before there was one.
        max_steps: Steps of the whole run.
        is_run: Whether there is a run that is resumed.
        spacing_mm: Voxel size that its scans were prepared at; None for each scan's own.
        intensity: Mapping of intensities that it learns from; None where none was noted yet.
    """

    written: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=lambda: {"least_learning_rate": None})
    max_steps: int | None = None
    is_run: bool = False
    spacing_mm: Spacing | None = None
    intensity: Intensity | None = None

    @classmethod
    def of(cls, out: str, *, resume: bool) -> "Begun":
        """What lies in ``out``, where it is to be resumed.

        Raises:
            ConfigError: A manifest that is none of a run.
        """
        path = Path(out) / MANIFEST_NAME
        if not (resume and path.is_file()):
            return cls()
        manifest = read_manifest(path)
        method, optim = (manifest["settings"].get(name) for name in ("method", "optim"))
        steps = manifest.get("derived", {}).get("max_steps")
        mapped = noted_intensity(path.parent, manifest)
        return cls(
            written=method if isinstance(method, dict) else {},
            optim=optim if isinstance(optim, dict) else cls().optim,
            max_steps=steps if isinstance(steps, int) and steps > 0 else None,
            is_run=True,
            spacing_mm=coerce(manifest["settings"].get("spacing_mm"), Spacing | None, "spacing_mm"),
            intensity=None if mapped is None else build_settings(Intensity, mapped, "intensity"),
        )

    def method(self, asked: Method) -> Method:
        """The method, with what it leaves to its plan as it was planned then."""
        own = to_named(asked, METHODS)
        if self.written.get("name") != own["name"]:
            return asked
        planned = [each.name for each in fields(asked) if each.default is None and own.get(each.name) is None]
        filled = {name: self.written[name] for name in planned if self.written.get(name) is not None}
        return update_settings(asked, filled, "method")

    def optimisation(self, asked: Optimisation, method: Method, backbone: Backbone) -> Optimisation:
        """The optimisation asked for, filled by the method's, with the floor that the run began with, or with none."""
        own = method.least_learning_rate(backbone) if "least_learning_rate" in self.optim else None
        least = coerce(self.optim.get("least_learning_rate"), float | None, "optim.least_learning_rate") or own
        return asked.filled_from(replace(method.optimisation, least_learning_rate=least))

    def num_steps(self, steps_of_passes: int, num_scans: int) -> tuple[int, str]:
        """Steps of a run whose length nobody gave, and the line that derives them.

        Args:
            steps_of_passes: Steps of ``PLANNED_PASSES`` over the scans.
            num_scans: Number of scans to learn from.
        """
        if self.max_steps is not None:
            return self.max_steps, f"length: {number_of(self.max_steps, 'step')}, as the run was started"
        steps = min(max(steps_of_passes, LEAST_STEPS), MOST_STEPS)
        passes = PLANNED_PASSES * steps / steps_of_passes
        why = f"the paper's {PLANNED_PASSES} passes"
        if steps != steps_of_passes:
            why += f" would take {steps_of_passes:,}, planned are {LEAST_STEPS:,} to {MOST_STEPS:,}"
        line = f"length: {steps:,} steps, {passes:.4g} passes over {number_of(num_scans, 'scan')} ({why})"
        return steps, f"{line}; --max_steps or --max_epochs sets another"
