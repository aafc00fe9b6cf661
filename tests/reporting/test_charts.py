"""Which metrics become which curves."""

from pathlib import Path

from mim3d.core.run_folder import RunRecord
from mim3d.reporting.charts import curve_names, curves_chart
from mim3d.reporting.sources import NamedRun


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
