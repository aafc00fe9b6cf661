"""Optimisation settings and the schedule they come to."""

import itertools
import math
from dataclasses import replace

import pytest

from mim3d.core.errors import ConfigError
from mim3d.training.schedule import Optimisation, make_schedule

DEFAULTS = Optimisation(
    base_learning_rate=1.5e-4, reference_batch=256, weight_decay=0.05, betas=(0.9, 0.95), warmup_ratio=0.1
)


def test_unset_values_come_from_the_defaults_and_set_ones_stay() -> None:
    filled = Optimisation(weight_decay=0.2, reference_batch=64).filled_from(DEFAULTS)
    assert filled == Optimisation(
        base_learning_rate=1.5e-4, reference_batch=64, weight_decay=0.2, betas=(0.9, 0.95), warmup_ratio=0.1
    )


def test_a_learning_rate_displaces_the_default_base_rate_and_steps_the_default_ratio() -> None:
    filled = Optimisation(learning_rate=1e-3, warmup_steps=0).filled_from(DEFAULTS)
    assert (filled.learning_rate, filled.base_learning_rate, filled.reference_batch) == (1e-3, None, None)
    assert (filled.warmup_steps, filled.warmup_ratio) == (0, None)
    assert Optimisation(base_learning_rate=1e-4).filled_from(filled).learning_rate is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": 1.0, "base_learning_rate": 1.0}, "learning_rate and base_learning_rate are both set"),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio are both set"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"clip_norm": math.inf}, "clip_norm is inf"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"reference_batch": 0}, "reference_batch is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_value(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Optimisation(**settings)  # type: ignore[arg-type]


def test_learning_rate_grows_with_the_effective_batch_and_says_how() -> None:
    schedule = make_schedule(DEFAULTS, effective_batch=512, max_steps=100)
    assert schedule.learning_rate == pytest.approx(3e-4)
    assert schedule.derivations[0] == (
        "learning rate 0.0003 = 0.00015 (base) x 512 (effective batch) / 256 (reference batch)"
    )
    assert "warm-up 10 steps = 0.1 x 100" in schedule.derivations[1]


def test_an_absolute_learning_rate_does_not_depend_on_the_batch() -> None:
    settings = Optimisation(learning_rate=1e-3)
    rates = {make_schedule(settings, effective_batch=batch, max_steps=9).learning_rate for batch in (1, 64)}
    assert rates == {1e-3}


def test_no_learning_rate_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="No learning rate follows"):
        make_schedule(Optimisation(base_learning_rate=1e-4), effective_batch=1, max_steps=1)


def test_schedule_warms_up_linearly_then_falls_as_a_cosine_to_zero() -> None:
    settings = Optimisation(learning_rate=1.0, warmup_steps=4)
    schedule = make_schedule(settings, effective_batch=1, max_steps=14)
    assert [schedule.learning_rate_at(step) for step in range(1, 5)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.learning_rate_at(5) == 1.0
    assert schedule.learning_rate_at(10) == pytest.approx(0.5)
    assert 0 < schedule.learning_rate_at(14) < 0.03
    assert schedule.learning_rate_at(15) == pytest.approx(0.0)


def test_a_run_shorter_than_its_warm_up_says_so_and_never_falls() -> None:
    schedule = make_schedule(Optimisation(learning_rate=1.0, warmup_steps=100), effective_batch=1, max_steps=2)
    assert [schedule.learning_rate_at(step) for step in (1, 2)] == [0.5, 1.0]
    assert "100 were asked for, but the run has only 2" in schedule.derivations[1]


def test_clip_norm_zero_switches_a_default_off() -> None:
    defaults = Optimisation(learning_rate=1.0, clip_norm=1.0)
    filled = Optimisation(clip_norm=0.0).filled_from(defaults)
    assert make_schedule(filled, effective_batch=1, max_steps=1).clip_norm == math.inf


def test_a_learning_rate_that_a_small_batch_scales_to_nothing_is_pointed_out() -> None:
    settings = Optimisation(base_learning_rate=1e-4, reference_batch=256)
    small, large = (make_schedule(settings, effective_batch=batch, max_steps=10) for batch in (2, 256))
    assert "next to nothing" in small.derivations[0]
    assert "next to nothing" not in large.derivations[0]


def test_a_frozen_beginning_has_a_rise_and_a_fall_of_its_own_before_the_warm_up_of_everything() -> None:
    settings = Optimisation(learning_rate=1.0, warmup_ratio=0.1)
    schedule = make_schedule(settings, effective_batch=1, max_steps=40, frozen_ratio=0.1)
    rates = [schedule.learning_rate_at(step) for step in range(1, 41)]
    assert (schedule.frozen_steps, schedule.warmup_steps) == (4, 4)
    assert rates[:8] == pytest.approx([0.5, 1, 1, 0.5, 0.25, 0.5, 0.75, 1])
    assert all(later < sooner for sooner, later in itertools.pairwise(rates[8:]))
    assert 0 < rates[-1] < 0.01
    assert "encoder frozen for 4 steps = 0.1 x 40" in schedule.derivations[1]


@pytest.mark.parametrize("max_steps", [1, 2, 3, 5, 9, 14])
def test_runs_of_any_length_have_a_rate_in_every_step(max_steps: int) -> None:
    settings = Optimisation(learning_rate=1.0, warmup_steps=99)
    schedule = make_schedule(settings, effective_batch=1, max_steps=max_steps, frozen_ratio=0.1)
    assert all(0 < schedule.learning_rate_at(step) <= 1 for step in range(1, max_steps + 1))


def test_without_a_frozen_beginning_rates_are_the_bits_they_were() -> None:
    schedule = make_schedule(Optimisation(learning_rate=3e-4, warmup_steps=3), effective_batch=1, max_steps=17)
    done = [(step - 4) / 14 for step in range(4, 18)]
    before = [3e-4 * step / 3 for step in (1, 2, 3)] + [3e-4 * 0.5 * (1 + math.cos(math.pi * part)) for part in done]
    assert [schedule.learning_rate_at(step) for step in range(1, 18)] == before


FLOORED = replace(DEFAULTS, least_learning_rate=1e-3)


def test_a_floor_holds_where_the_batch_gives_less_and_says_what_it_would_give() -> None:
    small = make_schedule(FLOORED, effective_batch=1, max_steps=10)
    assert small.learning_rate == 1e-3
    assert small.derivations[0] == (
        "learning rate 0.001 = floor for this network, since 0.00015 (base) x 1 (effective batch) / 256 (reference "
        "batch) = 5.86e-07 would be less"
    )
    assert small.rate_note == "floor for this network; by its batch 5.9e-07"
    large = make_schedule(FLOORED, effective_batch=2560, max_steps=10)
    assert large == make_schedule(DEFAULTS, effective_batch=2560, max_steps=10)
    assert (large.learning_rate, large.rate_note) == (pytest.approx(1.5e-3), "")


@pytest.mark.parametrize(
    ("own", "rate"),
    [
        ({}, 1e-3),
        ({"reference_batch": 128}, 1e-3),
        ({"base_learning_rate": 1e-4}, 1e-4 / 256),
        ({"least_learning_rate": 0.0}, 1.5e-4 / 256),
        ({"least_learning_rate": 2e-3}, 2e-3),
        ({"base_learning_rate": 1e-4, "least_learning_rate": 2e-3}, 2e-3),
        ({"learning_rate": 1e-6}, 1e-6),
    ],
)
def test_a_rate_of_ones_own_displaces_the_floor(own: dict[str, float], rate: float) -> None:
    settings = Optimisation(**own).filled_from(FLOORED)  # type: ignore[arg-type]
    assert make_schedule(settings, effective_batch=1, max_steps=10).learning_rate == pytest.approx(rate)
