"""Schedules of fine-tuning: when the encoder learns, and how the learning rate goes along with it.

The names and stages are those of the OpenMind benchmark (Wald et al., An OpenMind for 3D medical vision self-supervised
learning, ICCV 2025, arXiv 2412.17041). Its runs of 150 epochs give the lengths, as shares of all steps. Rates fall as
half a cosine, as everywhere in mim3d; its own fall as a polynomial.

- ``default``: everything learns from the first step, with the warm-up and the decay of the task. (That of the benchmark
  has no warm-up; those of mim3d's tasks have one of 5 %.)
- ``warmup``: the same with a longer warm-up of everything, 15 of 150 epochs.
- ``sawtooth``: for 15 of 150 epochs the encoder is frozen, and the rate of what is built on it rises in one half of
  them and falls in the other; then everything warms up for 15 epochs, and trains to the end.
- ``frozen``: the encoder never learns.

The benchmark's mean Dice over methods, with a convolutional network: sawtooth 76.6, warmup 76.3, default 76.2, frozen
55.3. With weights, sawtooth is therefore planned: it is the best of them and costs nothing, since steps with a frozen
encoder are shorter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import read_manifest
from mim3d.core.settings import coerce
from mim3d.tasks import create_task
from mim3d.tasks.contract import Task
from mim3d.training.schedule import Optimisation

if TYPE_CHECKING:
    from mim3d.workflows.finetune.settings import FinetuneSettings

ScheduleName = Literal["default", "warmup", "sawtooth", "frozen"]


@dataclass(frozen=True, kw_only=True)
class TuningSchedule:
    """What a schedule of fine-tuning comes to.

    Attributes:
        meaning: What it does, in words.
        frozen_ratio: Share of the steps, the first ones, in which the encoder is frozen.
        optim: Settings of the optimiser in place of the task's own.
        never_learns: Whether the encoder is frozen to the end.
    """

    meaning: str
    frozen_ratio: float = 0.0
    optim: Optimisation = Optimisation()
    never_learns: bool = False

    @property
    def freezes(self) -> bool:
        """Whether the encoder is frozen in some step."""
        return self.never_learns or self.frozen_ratio > 0


SCHEDULES: Mapping[ScheduleName, TuningSchedule] = {
    "default": TuningSchedule(meaning="everything learns from the first step"),
    "warmup": TuningSchedule(meaning="everything learns, after a longer warm-up", optim=Optimisation(warmup_ratio=0.1)),
    "sawtooth": TuningSchedule(
        meaning="what is built on the encoder learns alone at first, then everything warms up and learns",
        frozen_ratio=0.1,
        optim=Optimisation(warmup_ratio=0.1),
    ),
    "frozen": TuningSchedule(meaning="the encoder never learns", never_learns=True),
}


def schedule_of(settings: "FinetuneSettings") -> TuningSchedule:
    """The schedule of a run. Runs from before there was a choice have the default."""
    return SCHEDULES[settings.schedule or "default"]


def schedule_line(settings: "FinetuneSettings") -> str:
    """The schedule in a line, for people."""
    return f"schedule: {settings.schedule or 'default'} ({schedule_of(settings).meaning})"


def optimisation(settings: "FinetuneSettings", task: Task) -> Optimisation:
    """Settings of the optimiser as given, else those of the schedule, else the task's own."""
    return settings.optim.filled_from(schedule_of(settings).optim).filled_from(task.optimisation)


def recorded_schedule(manifest: Mapping[str, Any]) -> ScheduleName | None:
    """The schedule in the manifest of a run; None where it is older than the choice."""
    found: ScheduleName | None = coerce(manifest["settings"].get("schedule"), ScheduleName | None, "schedule")
    return found


def with_schedule(settings: "FinetuneSettings") -> "FinetuneSettings":
    """Settings with their schedule: as given, else that of the run that is resumed, else what suits the weights.

    Raises:
        ConfigError: The schedule contradicts the task's own freezing, there are no weights that it could spare, or the
            task cannot freeze its encoder.
    """
    task: Any = create_task(settings.task)
    asked, begun = settings.schedule, begun_manifest(settings)
    if begun is not None:
        recorded = recorded_schedule(begun)
        # Older runs go on as they began.
        asked = recorded if asked is None or (asked == "default" and recorded is None) else asked
        if asked is None:
            return replace(settings, schedule=None)
    frozen, ratio = getattr(task, "freeze_encoder", None), getattr(task, "unfreeze_ratio", None)
    if asked is None:
        spares = settings.weights is not None and settings.preset is None and ratio is None and frozen is not None
        return replace(settings, schedule="frozen" if frozen else "sawtooth" if spares else "default")
    schedule = SCHEDULES[asked]
    if frozen and not schedule.never_learns:
        raise ConfigError(f"schedule is {asked}, but freeze_encoder keeps the encoder from learning; give only one.")
    if schedule.freezes and ratio is not None:
        raise ConfigError(
            f"schedule is {asked} and unfreeze_ratio is {ratio}, and both say when the encoder begins to learn; give "
            "only one of them."
        )
    if asked != "default" and settings.weights is None and not frozen:
        raise ConfigError(
            f"schedule is {asked}, which spares a pre-trained encoder, but there are no weights; give --weights, or "
            "leave schedule out."
        )
    if schedule.freezes and frozen is None:
        raise ConfigError(f"schedule is {asked}, but the task {type(task).__name__} freezes no encoder; use default.")
    return replace(settings, schedule=asked)


def scheduled_task(task: Task, settings: "FinetuneSettings") -> Task:
    """The task, whose encoder never learns where the schedule says so."""
    own: Any = task
    return replace(own, freeze_encoder=True) if schedule_of(settings).never_learns else task


def begun_manifest(settings: "FinetuneSettings") -> dict[str, Any] | None:
    """The manifest of the run that is resumed, or of another of the same folds; None where nothing has begun."""
    if not settings.resume:
        return None
    out = Path(settings.out)
    folds = out.parent if out.name.startswith("fold_") else out
    manifests = [out / "manifest.json", *sorted(folds.glob("fold_*/manifest.json"))]
    found = next((path for path in manifests if path.is_file()), None)
    return None if found is None else read_manifest(found)
