"""Sentences on runs that stand side by side."""

from pathlib import Path

import pytest

from mim3d.core.run_folder import RunRecord
from mim3d.reporting.comparison import comparisons
from mim3d.reporting.sources import NamedRun

SETTINGS = {
    "data": "/data/balls",
    "task": {"name": "segmentation", "patch_size": [16, 16, 16], "freeze_encoder": False},
    "intensity": {"kind": "zscore", "window": None},
    "weights": None,
    "spacing_mm": None,
    "batch_size": 2,
    "accumulation": 1,
    "devices": 1,
    "seed": 0,
}


def run(name: str, *, command: str = "finetune", derived: dict | None = None, **changes: object) -> NamedRun:
    settings = {**SETTINGS, **changes}
    manifest = {"command": command, "settings": settings, "inputs": {}, "derived": derived or {}}
    config = {"command": command, **settings}
    return NamedRun(name, "#000000", RunRecord(Path("/runs") / name, config, [], manifest, {}))


def test_runs_that_differ_in_their_weights_machine_and_display_alone_have_no_sentence() -> None:
    other = {"weights": "pre", "schedule": "sawtooth", "devices": 2, "batch_size": 1, "num_workers": 3, "like": "one"}
    assert comparisons([run("one", schedule="default"), run("other", **other)]) == {}


def test_what_differs_besides_is_named_with_both_values() -> None:
    said = comparisons([run("scratch"), run("pre", weights="pre", spacing_mm=[1, 1, 2], seed=4)])
    assert said.keys() == {"pre"}
    assert said["pre"].startswith(
        "scratch and pre differ in more than weights: spacing_mm None and [1, 1, 2], seed 0 and 4; "
    )


def test_intensities_and_steps_are_those_that_were_used() -> None:
    window = {"kind": "window", "window": [0.0, 9.0]}
    own = {"weights": "pre", "intensity": None}
    assert comparisons([run("a"), run("b", derived={"intensity": SETTINGS["intensity"]}, **own)]) == {}
    said = comparisons([run("a"), run("b", derived={"intensity": window, "max_steps": 9}, max_steps=None, **own)])
    assert "intensity.kind zscore and window" in said["b"] and "max_steps None and 9" in said["b"]
    # Not known of runs of earlier versions.
    assert comparisons([run("a"), run("b", **own)]) == {}


@pytest.mark.parametrize("weights", [("pre", "other"), ("pre", "pre")])
def test_schedules_of_two_runs_with_weights_are_a_difference(weights: tuple[str, str]) -> None:
    one, other = weights
    said = comparisons([run("a", weights=one, schedule="sawtooth"), run("b", weights=other)])
    assert "schedule sawtooth and default" in said["b"]


def test_only_runs_of_one_task_data_set_and_fold_are_compared() -> None:
    shown = [run("a"), run("b", data="/data/others", seed=1), run("c", task="classification", seed=2)]
    assert comparisons([run("pre", command="pretrain", seed=3), *shown]) == {}
    folds = [run(f"{name}/fold_{fold}", fold=fold, seed=seed) for name, seed in (("a", 0), ("b", 1)) for fold in (0, 1)]
    assert comparisons(folds).keys() == {"b/fold_0", "b/fold_1"}
    assert comparisons([folds[0], run("alone", fold=0, seed=2)]).keys() == {"alone"}
    assert "fold 0 and 1" in comparisons([run("c", fold=0), run("d", fold=1)])["d"]


@pytest.mark.parametrize("odd", ["many", -1, 10**30, {"a": 1}, [2], None])
def test_a_manifest_that_holds_anything_is_compared_without_an_error(odd: object) -> None:
    shown = [run("a"), run("b", batch_size=odd, accumulation=odd, intensity=odd, task=odd, derived={"plan": odd})]
    assert isinstance(comparisons(shown), dict)
