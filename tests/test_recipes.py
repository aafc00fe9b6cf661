"""Every shipped recipe is parsed, built and trained for two steps, at reduced width."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mim3d.cli import main
from mim3d.core.run_folder import read_run
from mim3d.core.settings import read_yaml
from mim3d.methods.mim.hierarchy import Hierarchy
from mim3d.workflows.compare.running import planned
from mim3d.workflows.compare.settings import CompareSettings

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
COMPARISONS = [path for path in RECIPES if path.stem.startswith("compare_")]

#: The same number of stages at a width that any machine trains.
REDUCED = ["--backbone.num_heads", "2"]
DECODER = ["--method.decoder_dim", "12", "--method.decoder_depth", "1", "--method.decoder_num_heads", "2"]
WIDTHS = {
    "hybrid_base": (["6", "6", "12", "12"], ["1", "1", "1", "1"]),
    "hybrid_nano": (["6", "6", "12"], ["1", "1", "1"]),
}


def data_set(folder: Path, size: tuple[int, int, int], num_cases: int) -> Path:
    """Noise with a bright box in it, labelled 1 and 2."""
    rng = np.random.default_rng(0)
    for index in range(num_cases):
        image = rng.normal(0, 30, size).astype(np.int16)
        image[0] = -1000
        label = np.zeros(size, dtype=np.uint8)
        label[4:12, 4:12, 4:12], label[12:20, 4:12, 4:12] = 1, 2
        image[label > 0] += 200
        for name, voxels in (("imagesTr", image), ("labelsTr", label)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / name / f"case_{index}.nii")
    return folder


def list_of_classes(folder: Path) -> Path:
    """The same data set as a list, its cases of two classes in turn."""
    rows = ["image,label,class"]
    for index, path in enumerate(sorted((folder / "imagesTr").iterdir())):
        rows.append(f"imagesTr/{path.name},labelsTr/{path.name},{('one', 'other')[index % 2]}")
    (folder / "list.csv").write_text("\n".join(rows))
    return folder / "list.csv"


def reduced(recipe: dict) -> list[str]:
    backbone = recipe.get("backbone", "hybrid_nano")
    has_decoder = recipe["command"] == "pretrain" and recipe["method"]["name"] not in ("SimMIM", "SwinUNETRSSL")
    decoder = DECODER if has_decoder else []
    if str(backbone).startswith("resenc"):
        return ["--backbone.widths", "4", "6", "8", "--backbone.depths", "1", "1", "1", "--method.dim", "16"]
    if str(backbone).startswith("vit"):
        return ["--backbone.width", "12", "--backbone.depth", "1", *REDUCED, *decoder]
    if str(backbone).startswith("swin"):
        return ["--backbone.feature_size", "6", "--backbone.depths", "1", "1", "--backbone.num_heads", "1", "2"]
    if isinstance(backbone, dict):
        widths, depths = ["6", "12"], ["1", "1"]
    else:
        widths, depths = WIDTHS[backbone]
    return ["--backbone.widths", *widths, "--backbone.depths", *depths, *REDUCED, *decoder]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_recipe_of_a_comparison_is_planned(path: Path, tmp_path: Path) -> None:
    data = data_set(tmp_path / "data", (36, 48, 36), num_cases=40)
    recipe = {name: value for name, value in read_yaml(path).items() if name != "command"}
    # Nothing is measured of memory, which takes a second for each arm.
    for kind in ("finetune", "pretrain"):
        recipe[kind] = {**recipe[kind], "memory_limit": 0, "precision": "32-true", "num_workers": 0}
    plan = planned(
        CompareSettings(str(tmp_path / "out"), **{**recipe, "data": str(data), "seeds": (0,)}).with_recipes()
    )
    named = [each["name"] if isinstance(each, dict) else each for each in recipe["arms"]]
    assert {cell.arm for cell in plan.cells} == set(named)
    assert sum(cell.kind == "finetune" for cell in plan.cells) == len(named) * len(plan.folds) * len(recipe["labels"])


@pytest.mark.parametrize("path", [path for path in RECIPES if path not in COMPARISONS], ids=lambda path: path.stem)
def test_recipe_trains_two_steps(path: Path, tmp_path: Path) -> None:
    recipe = read_yaml(path)
    levels = recipe.get("method", {}).get("levels") if isinstance(recipe.get("method"), dict) else None
    edge = 64 if levels is None else max(levels[0]["footprint"])
    data = data_set(tmp_path / "data", (edge, edge, edge), num_cases=5)
    task = recipe.get("task") if isinstance(recipe.get("task"), dict) else {}
    if task.get("name") == "classification":
        data = list_of_classes(data)
    if task.get("class_weights"):
        names = dict(enumerate(["background", *task["class_weights"]]))
        files = sorted(path.name for path in (data / "imagesTr").iterdir())
        training = [{"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"} for name in files]
        (data / "dataset.json").write_text(json.dumps({"labels": names, "training": training}))
    words = [recipe["command"], "--config", str(path), "--data", str(data), "--out", str(tmp_path / "run")]
    words += ["--max_steps", "2", "--batch_size", "1", "--accumulation", "1", "--log_every", "1", "--num_workers", "0"]
    words += ["--precision", "32-true", *reduced(recipe)]
    if "max_epochs" in recipe:
        words += ["--max_epochs", "null"]
    assert main(words) == 0
    record = read_run(tmp_path / "run")
    assert [line["step"] for line in record.metrics if "loss" in line] == [1, 2]
    assert all(np.isfinite(line["loss"]) for line in record.metrics if "loss" in line)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_pre_training_recipes_have_four_tokens_per_axis_and_two_alignment_terms(path: Path) -> None:
    from mim3d.backbones import create_recipe
    from mim3d.methods import create_method

    recipe = read_yaml(path)
    if recipe["command"] != "pretrain" or recipe["method"]["name"] != "MiM":
        pytest.skip("fine-tunes, or by a method without levels")
    backbone = create_recipe(recipe["backbone"])
    hierarchy: Hierarchy = create_method(recipe["method"]).hierarchy(backbone)
    assert len(hierarchy.levels) == 3
    assert all(min(geometry.token_grid) >= 4 for geometry in hierarchy.levels)
    assert all(geometry.num_hidden_units >= 2 for geometry in hierarchy.levels[:-1])


@pytest.mark.slow
def test_the_base_recipe_takes_real_steps_at_full_size(tmp_path: Path) -> None:
    data = data_set(tmp_path / "data", (200, 192, 192), num_cases=1)
    recipe = Path(__file__).parents[1] / "recipes" / "mim_base.yaml"
    words = ["pretrain", "--config", str(recipe), "--data", str(data), "--out", str(tmp_path / "run")]
    words += ["--max_epochs", "null", "--max_steps", "2", "--accumulation", "1", "--log_every", "1"]
    words += ["--backbone.recompute", "true", "--method.chunk_size", "2"]
    assert main(words) == 0
    losses = [line["loss"] for line in read_run(tmp_path / "run").metrics]
    assert len(losses) == 2
    assert all(1.0 < loss < 10.0 for loss in losses)
