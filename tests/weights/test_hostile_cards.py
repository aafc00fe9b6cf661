"""A card of weights that somebody else has written is used, or refused in one sentence; it never harms."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mim3d.backbones import BACKBONES, create_recipe
from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.core.settings import to_named
from mim3d.exporting.hub_folder import model_card
from mim3d.exporting.networks import load_exported
from mim3d.tasks import TASKS
from mim3d.tasks.classification.task import Classification
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.tasks.trained import load_trained
from mim3d.weights import load_encoder, read_card, save_network
from mim3d.workflows.shared.initialisation import Initialisation, asked_recipe
from tests.hostile_values import outcome, places, values_at, with_value, without

RECIPE = create_recipe({"name": "hybrid", "widths": [12, 24], "depths": [1, 1], "num_heads": 2})
LABELS = {0: "background", 2: "ball", 5: "core"}
ENCODER = {
    "backbone": to_named(RECIPE, BACKBONES),
    "input_multiple": [4, 4, 4],
    "orientation": "RAS+",
    "spacing_mm": [1.5, 1.5, 2.0],
    "intensity": {"kind": "window", "window": [-175.0, 250.0]},
    "data_digest": "87bf8ccaa02bea4f676abfa4c3c7a71bd29077b69fdafb1e4265c8f25695ab14",
    "mim3d_version": "0.1.0",
    "step": 3,
}
SEGMENTATION = Segmentation(
    patch_size=(16, 16, 16),
    feature_dim=4,
    spacing_mm=(1.5, 1.5, 2.0),
    regions={"whole": (2, 5), "core": (5,)},
    class_weights={"core": 2.0},
    mirror_axes=(0, 1),
    partial_labels=LABELS,
)
CLASSIFICATION = Classification(
    cube_mm=(48.0, 48.0, 48.0),
    size=(16, 16, 16),
    centre="scan",
    class_weights=(1.0, 2.0),
    class_counts={"a": 2, "b": 1},
)


def written(folder: Path, network: str, module: torch.nn.Module, more: Mapping[str, Any]) -> Path:
    save_network(folder / network, module, {**ENCODER, **more})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    of_task = {"scores": {"dice": 0.5, "dice/ball": float("nan")}}
    segmenter = {"task": to_named(SEGMENTATION, TASKS), "labels": {str(k): name for k, name in LABELS.items()}}
    classifier = {"task": to_named(CLASSIFICATION, TASKS), "labels": {"0": "a", "1": "b"}}
    return {
        "encoder": written(folder / "e", "encoder", RECIPE.build(), {"probe": {"auc": 0.5}}),
        "segmenter": written(folder / "s", "segmenter", SEGMENTATION.build(RECIPE, LABELS), {**of_task, **segmenter}),
        "classifier": written(
            folder / "c", "classifier", CLASSIFICATION.build(RECIPE, {0: "a", 1: "b"}), {**of_task, **classifier}
        ),
    }


def use_encoder(run: Path) -> None:
    """All that a command does with an encoder before it reads scans."""
    load_encoder(run)
    recipe, _ = asked_recipe(None, str(run))
    Initialisation.of_card(recipe, None, read_card(run))
    json.dumps(model_card(load_exported(str(run), "encoder"), listed=None))


def use_network(run: Path) -> None:
    """All that a command does with a trained network before it reads scans, and one call of it."""
    network = load_exported(str(run))
    json.dumps(model_card(network, listed=None))
    call = network.module if network.kind == "encoder" else network.module.logits
    with torch.inference_mode():
        call(torch.zeros(1, network.num_channels, 16, 16, 16))


USES: dict[str, Callable[[Path], None]] = {
    "encoder": use_encoder,
    "segmenter": use_network,
    "classifier": use_network,
}


@pytest.mark.parametrize("every", [36, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", USES)
def test_every_value_of_a_card_may_be_anything(runs: dict[str, Path], kind: str, every: int) -> None:
    run = runs[kind]
    path = run / kind / "card.json"
    good = path.read_text()
    content = json.loads(good)
    USES[kind](run)
    wrong = []
    try:
        # How crops were varied means nothing to a trained network, but is most of its card.
        tried = [place for place in places(content) if every == 1 or "augmentation" not in place]
        for number, place in enumerate(tried):
            several = [(value, with_value(content, place, value)) for value in values_at(number, every)]
            if every == 1 or number % 3 == 0:
                several.append(("nothing", without(content, place)))
            for value, hostile in several:
                path.write_text(json.dumps(hostile))
                found = outcome(lambda: USES[kind](run), names=str(run))
                if found is not None:
                    wrong.append(f"{'.'.join(map(str, place))} = {str(value)[:60]}: {found}")
    finally:
        path.write_text(good)
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        (
            "backbone.depths",
            [10**12, 1],
            "backbone depths 1000000000000, 1 must be at most 8 numbers, each from 0 to 1000",
        ),
        ("backbone.widths", [-12, 24], "backbone widths -12, 24 must be at most 8 numbers, each from 1 to 65536"),
        ("backbone.widths", [12, 2**16], "describes a network of .* values, but model.safetensors holds"),
        ("backbone.num_heads", 0, "backbone num_heads 0 must be"),
        (
            "backbone.mlp_ratio",
            float("nan"),
            "backbone.mlp_ratio is nan, but it must be a number that a setting can have",
        ),
        ("backbone.in_channels", [1], r"backbone.in_channels is \[1\], but it takes a whole number"),
        ("backbone.colour", "red", "backbone has no setting 'colour'"),
        ("backbone.name", "unknown", "has an encoder of the backbone 'unknown', which mim3d does not know"),
        ("spacing_mm", [1, 1, 1e-300, 1], r"spacing_mm is \[1, 1, 1e-300, 1\], but it must be null, or three numbers"),
        ("spacing_mm", [1, 1, -1], "spacing_mm is"),
        ("intensity.window", [3, 3], r"intensity window \(3.0, 3.0\) must be two rising numbers"),
        ("task.patch_size", [4096, 4096, 4096], r"patch_size \[4096, 4096, 4096\] has 68,719,476,736 voxels"),
        ("task.overlap", 0.999999, "overlap is 0.999999; it must lie between 0 and 0.9"),
        ("task.mirror_axes", [0] * 60, "must name axes among 0 .X., 1 .Y. and 2 .Z., each of them once"),
        ("labels", {"70000": "a"}, "labels is {'70000': 'a'}, but it must be a mapping of label values, whole numbers"),
        ("scores", {"dice": "1"}, "scores is {'dice': '1'}, but it must be a mapping of names to numbers"),
    ],
)
def test_a_refusal_names_the_card_the_value_and_what_must_stand_there(
    runs: dict[str, Path], entry: str, value: Any, said: str
) -> None:
    path = runs["segmenter"] / "segmenter" / "card.json"
    good = path.read_text()
    try:
        path.write_text(json.dumps(with_value(json.loads(good), tuple(entry.split(".")), value)))
        with pytest.raises(CheckpointError, match=said) as refused:
            load_trained(runs["segmenter"])
        assert str(runs["segmenter"]) in str(refused.value)
    finally:
        path.write_text(good)


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, '{"format": 1' + "0" * 5000 + "}", "\x00", '{"format": true}', "[1]"]
)
def test_a_card_that_is_no_card_is_refused(runs: dict[str, Path], tmp_path: Path, text: str) -> None:
    save_network(tmp_path / "encoder", RECIPE.build(), ENCODER)
    (tmp_path / "encoder" / "card.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"card\.json holds (no readable card|no card of format 1)"):
        read_card(tmp_path)


def test_entries_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    more = {"modality": ["CT"], "ranges": [[-1024, 3071, 0.5]], "note": None}
    save_network(tmp_path / "encoder", RECIPE.build(), {**ENCODER, **more})
    assert read_card(tmp_path) == {"format": 1, **ENCODER, **more}
    load_encoder(tmp_path)


def test_a_setting_that_is_no_number_is_refused_wherever_it_is_given() -> None:
    with pytest.raises(ConfigError, match="mlp_ratio is nan, but it takes a finite number"):
        create_recipe({"name": "hybrid_nano", "mlp_ratio": float("nan")})
    with pytest.raises(ConfigError, match="but it takes a whole number"):
        create_recipe({"name": "hybrid_nano", "num_heads": 10**400})
