"""Settings of the optimiser, and the learning-rate schedule that follows from them in one run."""

import math
from dataclasses import dataclass, fields, replace

from mim3d.core.errors import BothSetError, ConfigError
from mim3d.core.names import number_of

# AdamW's own defaults, for what neither the user nor the method or task sets.
_PLAIN_WEIGHT_DECAY = 0.01
_PLAIN_BETAS = (0.9, 0.999)

#: A scaled learning rate below this learns nothing in any number of steps that people wait for.
TINY_LEARNING_RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Settings of AdamW and its schedule. None means the default of the method or task.

    Attributes:
        learning_rate: Peak learning rate, used as it is.
        base_learning_rate: Peak learning rate at ``reference_batch`` samples per step. It grows with the batch.
        reference_batch: Samples per step that ``base_learning_rate`` is meant for.
        least_learning_rate: Peak learning rate where the batch is so small that ``base_learning_rate`` would give less;
            0 for no such floor. A base learning rate that is set without it has none.
        weight_decay: Decoupled weight decay, never of biases, norms, tokens and positions.
        betas: Decay of AdamW's two moments.
        warmup_steps: Optimiser steps of linear warm-up.
        warmup_ratio: Share of all steps that is warm-up.
        clip_norm: Largest norm of the whole gradient. 0 leaves it unclipped.
        layer_decay: Factor on the learning rate from each layer of the encoder to the one below it. 1 for none.
        ema_decay: Decay of an average of the weights, which is validated and exported in their place. 0 for none.
    Raises:
        ConfigError: A value is out of range, or two settings say the same thing.
    """

    learning_rate: float | None = None
    base_learning_rate: float | None = None
    reference_batch: int | None = None
    least_learning_rate: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] | None = None
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    clip_norm: float | None = None
    layer_decay: float | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        for one, other in (("learning_rate", "base_learning_rate"), ("warmup_steps", "warmup_ratio")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise BothSetError(one, other)
        rates = ("learning_rate", "base_learning_rate", "least_learning_rate")
        for name in (*rates, "weight_decay", "warmup_steps", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} is {value}; it must be zero or more.")
        if self.reference_batch is not None and self.reference_batch < 1:
            raise ConfigError(f"reference_batch is {self.reference_batch}; it must be at least 1.")
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"warmup_ratio is {self.warmup_ratio}; it must lie between 0 and 1.")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {self.betas}; both must lie in [0, 1).")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ConfigError(f"layer_decay is {self.layer_decay}; it must be above 0 and at most 1, such as 0.75.")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}; it must be 0 or more and below 1, such as 0.999.")

    def filled_from(self, defaults: "Optimisation") -> "Optimisation":
        """The same settings, with everything unset taken from ``defaults``.

        Settings that exclude one another count as one: a learning rate set here displaces a default base
        learning rate, and warm-up steps a default warm-up ratio. Either rate displaces a default floor.
        """
        displaced = set()
        if self.learning_rate is not None:
            displaced |= {"base_learning_rate", "reference_batch", "least_learning_rate"}
        if self.base_learning_rate is not None:
            displaced |= {"learning_rate", "least_learning_rate"}
        if self.warmup_steps is not None or self.warmup_ratio is not None:
            displaced |= {"warmup_steps", "warmup_ratio"}
        missing = {
            field.name: getattr(defaults, field.name)
            for field in fields(self)
            if getattr(self, field.name) is None and field.name not in displaced
        }
        return replace(self, **missing)


@dataclass(frozen=True)
class Schedule:
    """The numbers that follow from the settings in one run, and the sentences that derive them.

    Attributes:
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decay of AdamW's two moments.
        warmup_steps: Optimiser steps until the peak.
        max_steps: Optimiser steps until zero.
        clip_norm: Largest norm of the gradient. Infinite where nothing is clipped.
        derivations: One line for each derived number, for people.
        layer_decay: Factor on the learning rate from each layer of the encoder to the one below it.
        ema_decay: Decay of the average of the weights. 0 where there is none.
        frozen_steps: First steps, in which the encoder is frozen and what is built on it learns. Warm-up follows them.
        rate_note: Why the learning rate is not what the batch would make of it. Empty where it is.
    """

    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    warmup_steps: int
    max_steps: int
    clip_norm: float
    derivations: tuple[str, ...]
    layer_decay: float = 1.0
    ema_decay: float = 0.0
    frozen_steps: int = 0
    rate_note: str = ""

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimiser step ``step``, from 1 on: linear warm-up, then half a cosine.

        The last warm-up step has the peak rate. Zero would be reached one step after the last. Where the encoder is
        frozen at first, the rate rises in one half of these steps and falls in the other, and begins anew after them.
        """
        if step <= self.frozen_steps:
            return self._tooth_at(step, self.frozen_steps // 2, self.frozen_steps)
        return self._tooth_at(step - self.frozen_steps, self.warmup_steps, self.max_steps - self.frozen_steps)

    def _tooth_at(self, step: int, warmup_steps: int, num_steps: int) -> float:
        if step <= warmup_steps:
            return self.learning_rate * step / warmup_steps
        done = (step - 1 - warmup_steps) / (num_steps - warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def make_schedule(
    settings: Optimisation, *, effective_batch: int, max_steps: int, frozen_ratio: float = 0.0
) -> Schedule:
    """Turn settings into numbers.

    Args:
        settings: Settings that are already filled from the defaults of the method or task.
        effective_batch: Samples per optimiser step over all processes.
        max_steps: Optimiser steps of the whole run.
        frozen_ratio: Share of them, the first ones, in which the encoder is frozen.
    Raises:
        ConfigError: No learning rate follows from the settings.
    """
    learning_rate, rate_line, rate_note = _learning_rate(settings, effective_batch)
    wanted, source = settings.warmup_steps or 0, ""
    if settings.warmup_ratio is not None:
        wanted, source = round(settings.warmup_ratio * max_steps), f" = {settings.warmup_ratio:g} x {max_steps}"
    frozen_steps = round(frozen_ratio * max_steps)
    warmup_steps = min(wanted, max_steps - frozen_steps)
    if warmup_steps < wanted:
        source = f" ({wanted} were asked for, but the run has only {max_steps - frozen_steps})"
    frozen = (
        f"encoder frozen for {number_of(frozen_steps, 'step')} = {frozen_ratio:g} x {max_steps}, in which the rate "
        "rises and falls, then "
        if frozen_steps
        else ""
    )
    warm_up = f"warm-up {number_of(warmup_steps, 'step')}{source}, then" if warmup_steps else "no warm-up,"
    warmup_line = f"{frozen}{warm_up} a cosine that would reach 0 at step {max_steps + 1}"
    weight_decay = _PLAIN_WEIGHT_DECAY if settings.weight_decay is None else settings.weight_decay
    betas = settings.betas or _PLAIN_BETAS
    clip_norm = settings.clip_norm or math.inf
    clip_line = f"gradient norm clipped at {clip_norm:g}" if settings.clip_norm else "gradients not clipped"
    adamw_line = f"AdamW with weight decay {weight_decay:g} and betas {betas[0]:g}, {betas[1]:g}; {clip_line}"
    ema_decay = settings.ema_decay or 0.0
    average_lines = []
    if ema_decay:
        # Where (1 + t) / (10 + t) reaches the decay; rounded first, lest 80.00000000000001 steps take one more.
        steps = max(0, math.ceil(round((10 * ema_decay - 1) / (1 - ema_decay), 6)))
        average_lines.append(
            f"weights averaged over about {1 / (1 - ema_decay):.4g} steps (decay {ema_decay:g}, reached after {steps}"
            "); the average is validated and exported"
        )
    return Schedule(
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        betas=(betas[0], betas[1]),
        warmup_steps=warmup_steps,
        max_steps=max_steps,
        clip_norm=clip_norm,
        derivations=(rate_line, warmup_line, adamw_line, *average_lines),
        layer_decay=1.0 if settings.layer_decay is None else settings.layer_decay,
        ema_decay=ema_decay,
        frozen_steps=frozen_steps,
        rate_note=rate_note,
    )


def average_decay(ema_decay: float, num_updates: int) -> float:
    """Decay of the average of the weights at its ``num_updates``-th update, from 1 on: lower at the beginning.

    The warm-up of TensorFlow's ExponentialMovingAverage, (1 + t) / (10 + t): without it the first weights, drawn at
    random or of another task, would weigh on the average for 1 / (1 - decay) steps.
    """
    return min(ema_decay, (1 + num_updates) / (10 + num_updates))


def _learning_rate(settings: Optimisation, effective_batch: int) -> tuple[float, str, str]:
    """The peak rate, the line that derives it, and a note where it is a floor."""
    if settings.learning_rate is not None:
        return settings.learning_rate, f"learning rate {settings.learning_rate:g} (as set, whatever the batch)", ""
    if settings.base_learning_rate is None or settings.reference_batch is None:
        raise ConfigError(
            "No learning rate follows from the settings; "
            "give learning_rate, or base_learning_rate together with reference_batch."
        )
    rate = settings.base_learning_rate * effective_batch / settings.reference_batch
    factors = (
        f"{settings.base_learning_rate:g} (base) x {effective_batch} (effective batch) "
        f"/ {settings.reference_batch} (reference batch)"
    )
    least = settings.least_learning_rate or 0.0
    if rate < least:
        line = f"learning rate {least:g} = floor for this network, since {factors} = {rate:.3g} would be less"
        return least, line, f"floor for this network; by its batch {rate:.2g}"
    line = f"learning rate {rate:g} = {factors}"
    if 0 < rate < TINY_LEARNING_RATE:
        line += "; that is next to nothing"
    return rate, line, ""
