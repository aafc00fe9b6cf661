"""Which metrics become which curves."""

from pathlib import Path

import numpy as np
import pytest

from mim3d.core.run_folder import RunRecord
from mim3d.metrics import Bootstrap, classification_scores
from mim3d.reporting.charts import curve_names, curves_chart, is_score, roc_of
from mim3d.reporting.rendering import LIGHT
from mim3d.reporting.sources import NamedRun, ScoreSet


def named_run(name, colour, metrics):
    return NamedRun(name, colour, RunRecord(Path(name), config={}, metrics=metrics, manifest={}, pictures={}))


def metrics(num_steps=80):
    for step in range(num_steps):
        yield {
            "step": step,
            "loss": 1 / (step + 1),
            "loss/coarse": 0.5 if step else None,
            "learning_rate": 1e-3,
            "time_s": float(step),
            "samples_per_s": 2.0,
        }
    yield {"step": num_steps, "val/dice": 0.8, "val/dice/liver": 0.7}


def test_losses_validation_and_learning_rate_come_first_and_nothing_is_dropped():
    main, others = curve_names([named_run("a", "#000000", list(metrics()))])
    assert main == ["loss", "loss/coarse", "val/dice", "learning_rate"]
    assert others == ["samples_per_s", "val/dice/liver"]


def test_values_that_are_no_numbers_are_left_out():
    run = named_run("a", "#000000", [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": "x"}])
    steps, values = run.series("loss")
    assert (steps.tolist(), values.tolist()) == ([2.0], [0.5])
    assert run.series("nothing")[0].size == 0


def test_runs_of_any_length_can_be_drawn():
    short = named_run("b", "#ff0000", [{"step": 1, "loss": 0.5}])
    html = curves_chart(
        [named_run("a", "#000000", list(metrics())), short], ["loss", "val/dice", "learning_rate", "no"]
    )
    assert html.count("base64,") == 2


def test_scores_of_validation_have_axes_from_0_to_1_and_losses_have_not():
    scores = ["val/dice", "val/dice/liver", "val/auc", "val/probe_knn"]
    assert all(is_score(key) for key in scores)
    assert not any(is_score(key) for key in ("loss/dice", "loss", "learning_rate", "val/hd95_mm", "val/feature_std"))


@pytest.mark.parametrize("by_patient", [False, True])
def test_the_area_under_a_roc_is_the_auc_of_the_scores(by_patient):
    rng = np.random.default_rng(0)
    # Rounded, so that there are ties.
    malign = rng.random(40).round(1)
    classes = (np.arange(40) // 2 % 2).tolist()
    patients = [f"p{number // 2}" for number in range(40)]
    probabilities = np.stack([1 - malign, malign], axis=1)
    found = classification_scores(
        probabilities, classes, patients=patients, by_patient=by_patient, bootstrap=Bootstrap(num_bootstrap=0)
    )
    rows = [
        {"id": str(n), "patient": patients[n], "true_class": "bm"[classes[n]], "probabilities": list(probabilities[n])}
        for n in range(40)
    ]
    content = {"kind": "classification", "classes": ["b", "m"], "positive": "m", "cases": rows}
    curves = roc_of(ScoreSet("s", "#000000", {**content, "settings": {"by_patient": by_patient}}))
    assert list(curves) == ["m"]
    across, up = curves["m"]
    assert np.trapezoid(up, across) == pytest.approx(found["mean"]["auc"])


def test_panels_are_three_side_by_side_and_steps_are_whole_numbers(monkeypatch):
    figures = []
    monkeypatch.setattr("mim3d.reporting.charts.chart", lambda draw, _: figures.append(draw(LIGHT)) or "")
    keys = ["loss", "val/dice", "val/nsd", "learning_rate"]
    curves_chart([named_run("a", "#000000", [{"step": 6, **dict.fromkeys(keys, 0.5)}])], keys)
    panels = [panel for panel in figures[0].axes if panel.get_visible()]
    assert [panel.get_title(loc="left") for panel in panels] == keys
    assert [bool(panel.get_xlabel()) for panel in panels] == [False, True, True, True]
    assert len(figures[0].axes) == 6 and {panel.get_subplotspec().rowspan.start for panel in panels} == {0, 1}
    assert all(float(tick).is_integer() for panel in panels for tick in panel.get_xticks())
