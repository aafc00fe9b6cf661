"""Pre-training without flags learns: the rate, the levels and the length are planned, said, and kept on resuming."""

from pathlib import Path

import pytest

from mim3d import pretrain
from mim3d.backbones import create_recipe
from mim3d.core.files import read_json, write_json
from mim3d.core.run_folder import read_run
from mim3d.core.settings import read_yaml, write_yaml
from mim3d.methods import create_method
from mim3d.methods.mim.method import MiM
from mim3d.training.schedule import Optimisation
from mim3d.workflows.shared.begun import Begun
from tests.commands.conftest import BACKBONE, DECODER


def learn(data: Path, out: Path, **changes: object) -> Path:
    settings = {"backbone": BACKBONE, "method": {"name": "MiM", **DECODER}, "max_steps": 2}
    settings |= {"num_workers": 0, "log_every": 1}
    return Path(pretrain(str(data), str(out), **{**settings, **changes}))


def test_a_run_without_flags_has_a_rate_that_learns_and_the_papers_rule_by_its_name(ball_set, tmp_path, capsys):
    derived = read_run(learn(ball_set, tmp_path / "run")).manifest["derived"]
    assert derived["learning_rate"] == 1e-3
    shown = capsys.readouterr()
    assert "learning rate 0.001 (floor for this network; by its batch 3.9e-07)" in shown.err
    assert any("floor for this network, since 0.0001 (base) x 1" in line for line in derived["derivations"])
    assert "planned 2 levels, not 3" in shown.out
    assert any(line.startswith("planned 2 levels, not 3") for line in derived["summary"])
    manifest = read_json(tmp_path / "run" / "manifest.json")
    manifest["settings"]["optim"]["least_learning_rate"] = 5e-4
    write_json(tmp_path / "run" / "manifest.json", manifest)
    begun, asked = Begun.of(str(tmp_path / "run"), resume=True), (Optimisation(), MiM(), create_recipe("hybrid_nano"))
    assert begun.optimisation(*asked).least_learning_rate == 5e-4
    assert Begun().optimisation(*asked).least_learning_rate == 1e-3
    with pytest.warns(UserWarning, match="next to nothing"):
        paper = learn(ball_set, tmp_path / "paper", optim={"base_learning_rate": 1e-4})
    assert read_run(paper).manifest["derived"]["learning_rate"] == pytest.approx(1e-4 / 256)


def aged(run: Path) -> None:
    """Make a run look as one of before the floor: its settings lack it, and its levels and length are other ones."""
    for read, write, name in ((read_json, write_json, "manifest.json"), (read_yaml, write_yaml, "config.yaml")):
        content = read(run / name)
        settings = content.get("settings", content)
        del settings["optim"]["least_learning_rate"]
        settings["method"]["levels"] = settings["method"]["levels"][:1]
        settings["method"]["levels"][0]["num_children"] = 0
        settings["max_steps"] = None
        write(run / name, content)


@pytest.mark.filterwarnings("ignore:The learning rate")
def test_a_run_of_before_goes_on_with_the_rate_levels_and_length_it_was_started_with(ball_set, tmp_path):
    run = learn(ball_set, tmp_path / "run", max_steps=1)
    aged(run)
    (run / "metrics.jsonl").write_text("")
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    manifest = read_json(run / "manifest.json")
    manifest["derived"]["max_steps"] = 3
    write_json(run / "manifest.json", manifest)
    learn(ball_set, run, max_steps=None, resume=True)
    derived = read_run(run).manifest["derived"]
    assert derived["max_steps"] == 3
    assert derived["learning_rate"] == pytest.approx(1e-4 / 256)
    assert [row["name"] for row in read_yaml(run / "config.yaml")["method"]["levels"]] == ["coarse"]


@pytest.mark.parametrize(
    ("steps_of_passes", "num_scans", "steps", "words"),
    [
        (20_000, 25, 20_000, "length: 20,000 steps, 800 passes over 25 scans (the paper's 800 passes)"),
        (
            800,
            1,
            5_000,
            "5,000 steps, 5000 passes over 1 scan (the paper's 800 passes would take 800, planned are 5,000",
        ),
        (8_000_000, 10_000, 100_000, "100,000 steps, 10 passes over 10,000 scans"),
    ],
)
def test_the_length_follows_from_the_number_of_scans(steps_of_passes, num_scans, steps, words):
    planned, line = Begun().num_steps(steps_of_passes, num_scans)
    assert planned == steps and words in line


def test_what_the_user_gives_is_not_taken_from_the_run_before():
    begun = Begun(written={"name": "MiM", "decoder_dim": 24, "max_air": 0.25})
    assert begun.method(create_method({"name": "MiM", "decoder_dim": 48})).decoder_dim == 48
    assert begun.method(create_method({"name": "MiM", "max_air": None})).max_air is None
    assert begun.method(create_method("MiM")).decoder_dim == 24
    assert begun.num_steps(6_000, 3)[0] == 6_000
