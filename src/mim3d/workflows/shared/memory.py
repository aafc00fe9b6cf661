"""Before a run begins: the memory it will need, and where that is not there, the settings with which it fits."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import numpy as np

from mim3d.backbones import BACKBONES, Backbone
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import ConfigError, Mim3dError, first_line
from mim3d.core.progress import say
from mim3d.core.resources import available_memory_bytes, in_words
from mim3d.core.run_folder import is_first_process
from mim3d.core.settings import spelled, to_mapping, to_named
from mim3d.core.types import Triple
from mim3d.methods import Method
from mim3d.objective import Objective
from mim3d.training.memory import MemoryNeed, SampleShapes, StepMemory, can_be_known, usable_bytes
from mim3d.training.schedule import Optimisation
from mim3d.workflows.shared.training import TrainingSettings

#: Flags that ask for settings which compute the same step with more or less memory -> what builds its objective.
StepVariants = dict[str, Callable[[], Objective]]


def pretraining_variants(method: Method, recipe: Backbone) -> StepVariants:
    """The settings as asked; then variants that need less memory and more time, the quicker ones first."""
    variants: StepVariants = {"": lambda: method.build(recipe)}
    less = _with(recipe, "recompute", True)
    if less is not None:
        variants["--backbone.recompute true"] = lambda: method.build(less)
    single = _with(method, "chunk_size", 1)
    if single is not None:
        # Beside recomputation alone: what is kept for the backward pass is the same in chunks of any size.
        flags = f"{list(variants)[-1]} --method.chunk_size 1".strip()
        variants[flags] = lambda: single.build(less or recipe)
    return variants


@dataclass(frozen=True)
class ScanOutline:
    """All that a sampler or a validation may ask of a scan of which only the header was read.

    Attributes:
        shape: Voxels along X, Y, Z. All of them belong to the body.
        class_locations: Where the voxels of each label lie. None is labelled.
    """

    shape: Triple
    class_locations: Mapping[int, np.ndarray] = field(default_factory=dict)

    @property
    def body_box(self) -> tuple[Triple, Triple]:
        """First voxel of the body, and the one after its last."""
        return (0, 0, 0), self.shape

    def foreground_ratio(self, _origin: Triple, _size: Triple) -> float:
        """Share of the body in a crop."""
        return 1.0


def pretraining_sample(method: Method, recipe: Backbone, shape: Triple) -> SampleShapes:
    """Shapes and types of one sample, drawn as if from a scan of ``shape`` voxels."""
    scan = cast(CachedScan, ScanOutline(shape))
    return method.sampler(recipe).draw(scan, np.random.default_rng(0)).shapes(recipe.in_channels)


def largest_image(sample: SampleShapes) -> Triple | None:
    """Voxels of the largest volume of a sample that the encoder sees; None where it has no volumes."""
    images = [shape[2:] for shape, kind in sample.values() if len(shape) == 5 and kind.is_floating_point]
    x, y, z = max(images, key=math.prod, default=(0, 0, 0))
    return (x, y, z) if images else None


def finetuning_variants(build: Callable[[Backbone], Objective], recipe: Backbone) -> StepVariants:
    """As asked; then with recomputation. ``build`` gives the objective on an encoder of the settings it is given."""
    variants: StepVariants = {"": lambda: build(recipe)}
    less = _with(recipe, "recompute", True)
    if less is not None:
        # Spelled out, since a backbone that comes from weights has no name yet which a flag could be added to.
        variants[_spelled(less)] = lambda: build(less)
    return variants


def require_memory(
    training: TrainingSettings,
    variants: StepVariants,
    sample: SampleShapes,
    optim: Optimisation,
    *,
    smaller: str,
    under: str = "",
    validation_bytes: int = 0,
    less_validation: str = "prepare the scans with a larger spacing_mm, or train without validation (--fold null)",
) -> dict[str, Any]:
    """Say what training will need, measured by a dry run, and refuse what does not fit.

    Args:
        training: Settings of the training.
        variants: Variants of the settings, as asked first, then in the order of the time they take.
        sample: Shapes and types of one sample.
        optim: The optimiser's settings, filled from the defaults of the method or task.
        smaller: What to make smaller when nothing else helps, in the words of an error.
        under: What stands before the names of the settings in flags, as ``finetune.`` where they are of a recipe.
        validation_bytes: What a validation holds on the CPU besides the network at work.
        less_validation: What to do where that is too much, in the words of an error.
    Returns:
        What to note in the manifest; nothing where the need is not known beforehand.
    Raises:
        ConfigError: It does not fit; the sentence names flags with which it does.
    """
    loop = training.loop(training.max_steps or 1)
    if training.memory_limit == 0 or not is_first_process() or not can_be_known(loop):
        return {}
    memories = {flags: StepMemory(build, sample, loop, optim, validation_bytes) for flags, build in variants.items()}
    asked = memories[""]
    try:
        need = asked.need(training.batch_size or 1, training.accumulation)
    except Mim3dError:
        raise
    except Exception as error:
        # A method of the user's own may look at values, which fake tensors do not have; it may train all the same.
        say(f"memory: not known beforehand ({type(error).__name__}: {first_line(error)})")
        return {}
    limit = None if training.memory_limit is None else int(training.memory_limit * 2**30)
    usable = usable_bytes(loop, limit)
    room = "" if usable is None else f", {in_words(usable)} {'available' if limit is None else 'allowed'}"
    parts = f" ({need.parts()})" if training.verbose else ""
    say(f"memory: about {_total(need, loop.devices)}{parts}{room}")
    if usable is not None and need.total > usable:
        raise ConfigError(_refusal(training, memories, need, usable, smaller, under))
    if asked.device == "cpu":
        needed, free = asked.validation_bytes(), usable
    else:
        needed, free = validation_bytes, available_memory_bytes()
    if validation_bytes and free is not None and needed > free:
        raise ConfigError(
            f"Validating needs about {in_words(needed)} of memory, {in_words(validation_bytes)} of it besides the "
            f"network, but {in_words(free)} can be used; {less_validation}."
        )
    return {"memory_need_bytes": {field.name: getattr(need, field.name) for field in fields(need)}}


def _refusal(
    training: TrainingSettings,
    memories: Mapping[str, StepMemory],
    need: MemoryNeed,
    usable: int,
    smaller: str,
    under: str,
) -> str:
    """The sentence with the first settings that fit: of the same effective batch, those of the batch as asked first."""
    has = "are available" if training.memory_limit is None else "are allowed by memory_limit"
    sentence = f"Training needs about {_total(need, training.devices or 1)} of memory, but {in_words(usable)} {has}; "
    begun = " (a run that has begun keeps its settings: go on with it where more memory is free)"
    least = ("", need.total)
    whole = training.batch_size or 1
    for parts in (parts for parts in range(1, whole + 1) if whole % parts == 0):
        batch_size, accumulation = whole // parts, training.accumulation * parts
        split = f"--{under}batch_size {batch_size} --{under}accumulation {accumulation}" if parts > 1 else ""
        for variant, memory in memories.items():
            flags = f"{variant} {split}".strip()
            if not flags:
                continue
            total = memory.most_bytes(batch_size, accumulation)
            if total <= usable:
                return f"{sentence}use {flags}, which needs about {in_words(total)}{begun if training.resume else ''}."
            least = min(least, (flags, total), key=lambda offer: offer[1])
    at_least = f"even {least[0]} needs about {in_words(least[1])}, so use" if least[0] else "use"
    return (
        f"{sentence}{at_least} {smaller}, or a machine with more memory (--{under}memory_limit 0 trains all the same)."
    )


def _total(need: MemoryNeed, num_processes: int) -> str:
    return in_words(need.total) + (f" in each of {num_processes} processes" if num_processes > 1 else "")


def _with(settings: Any, name: str, value: Any) -> Any:
    """The settings with a field changed; None when they have no such field, or that value already."""
    known = {field.name for field in fields(settings)}
    return replace(settings, **{name: value}) if name in known and getattr(settings, name) != value else None


def _spelled(recipe: Backbone) -> str:
    """Flags that name these settings in full, on top of the ready size that is nearest to them."""
    kind, wanted = type(recipe), to_named(recipe, BACKBONES)
    ready = {name: entry() if isinstance(entry, type) else entry for name, entry in BACKBONES.items()}
    known = {name: to_mapping(entry) for name, entry in ready.items() if isinstance(entry, kind)}
    # A backbone of the user's own has no ready sizes.
    known = known or {wanted["name"]: {}}
    changes = {
        name: {key: value for key, value in to_mapping(recipe).items() if key not in fixed or fixed[key] != value}
        for name, fixed in known.items()
    }
    name = min(changes, key=lambda name: len(changes[name]))
    return " ".join([f"--backbone {name}", *(f"--backbone.{key} {spelled(v)}" for key, v in changes[name].items())])
