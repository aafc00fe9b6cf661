"""Presets in fine-tuning: what they set below the user's own settings, and the whole path on sets in miniature."""

import csv
import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from mim3d.backbones import create_recipe
from mim3d.caching.build import build_cache
from mim3d.caching.cache import Cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.cli import main
from mim3d.commands.evaluate import evaluate
from mim3d.commands.finetune import finetune
from mim3d.commands.predict import predict
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.run_folder import read_run
from mim3d.core.settings import to_mapping
from mim3d.datasets.cases import read_cases
from mim3d.datasets.published.presets import published_presets
from mim3d.datasets.splits import Split
from mim3d.loading.loader import Loader
from mim3d.scans.intensity import Intensity
from mim3d.tasks import create_task
from mim3d.tasks.augmentation import Augmentation
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.training.schedule import Optimisation
from mim3d.weights import save_network
from mim3d.workflows.finetune.data import read_training_data
from mim3d.workflows.finetune.presets import describe_preset, with_own_folds, with_preset
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.shared.initialisation import asked_recipe, initialise
from tests.miniatures import MINIATURES, write_cc_ccii

PRESETS = published_presets()

#: An encoder and a task that take a step in no time; what they leave out comes from the preset.
SMALL = {"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2}
SHRUNK = {"name": "segmentation", "patch_size": [16, 16, 8], "feature_dim": 8}

pytestmark = pytest.mark.filterwarnings("ignore:.*not here, the first is:UserWarning")


def given(**changes) -> FinetuneSettings:
    """Settings in which nothing is asked for but what is given."""
    return FinetuneSettings("", "", **{"strict": False, **changes})


def applied(name: str, data: object, settings: FinetuneSettings):
    read = read_training_data(dataclasses.replace(settings, preset=name, data=str(data)))
    return read.settings, read.source, read.split


def task_of(name: str, token_edge: int) -> dict:
    return with_preset(given(), PRESETS[name], (token_edge, token_edge, token_edge)).task


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every miniature, written when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(key: str) -> Path:
        if key not in made:
            made[key] = tmp_path_factory.mktemp("set")
            if key == "CC-CCII":
                write_cc_ccii(made[key])
            else:
                MINIATURES[key].write(MINIATURES[key], made[key])
        return made[key]

    return folder


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_settings_that_its_task_accepts(name):
    preset = PRESETS[name]
    settings = with_preset(given(fold=1), preset, (16, 16, 16))
    recipe = create_recipe(settings.backbone)
    task = create_task(settings.task).checked(recipe)
    size = task.patch_size if isinstance(task, Segmentation) else task.size
    assert tuple(size) == preset.patch_size and recipe.in_channels == len(preset.channels)
    assert settings.spacing_mm == preset.spacing_mm and settings.intensity == preset.intensity
    assert settings.optim == Optimisation(
        base_learning_rate=3e-4, reference_batch=16, weight_decay=1e-5, warmup_ratio=50 / 300
    )
    assert settings.fold == 1 and settings.max_epochs == 300


def test_probabilities_are_as_published_along_every_axis_and_nothing_else_is_varied():
    task = create_task(task_of("BTCV", 16))
    augmentation = task.augmentation
    assert (augmentation.flip_prob, augmentation.rotate90_prob, augmentation.shift_prob) == (0.1, 0.1, 0.5)
    assert augmentation.flip_axes == (0, 1, 2) and augmentation.shift == 0.1
    others = ("affine_prob", "scale_prob", "noise_prob", "gamma_prob")
    assert [getattr(augmentation, name) for name in others] == [0, 0, 0, 0]
    covid = create_task(task_of("COVID-19-20", 16)).augmentation
    assert (covid.affine_prob, covid.noise_prob, covid.rotate90_prob) == (0.15, 0.15, 0)
    assert create_task(task_of("MM-WHS CT", 16)).augmentation == Augmentation()


SIDED = {
    "BTCV": "right kidney, left kidney, right adrenal gland, left adrenal gland, inferior vena cava",
    "AMOS22": "right kidney, left kidney, right adrenal gland, left adrenal gland, inferior vena cava",
    "FLARE22": "right kidney, right adrenal gland, left adrenal gland, left kidney, inferior vena cava",
}


@pytest.mark.parametrize("key", ["BTCV", "AMOS22", "FLARE22", "MSD Spleen", "MM-WHS CT", "BraTS", "COVID-19-20"])
def test_a_preset_that_mirrors_sided_labels_says_so_in_one_line_with_the_remedy(key, folders, capsys):
    applied(MINIATURES[key].name, folders(key), given(backbone="hybrid_nano"))
    told = [line for line in capsys.readouterr().out.splitlines() if "mirrored" in line]
    expected = (
        f"crops are mirrored along X, Y, Z, as published, although labels name a side ({SIDED.get(key)}); "
        "to keep the sides apart: --task.augmentation.flip_axes 1"
    )
    assert told == ([expected] if key in SIDED else [])


@pytest.mark.parametrize("changed", [{"flip_axes": [1]}, {"flip_prob": 0.0}])
def test_nothing_is_said_of_mirroring_once_the_remedy_is_taken(changed, folders, capsys):
    task = {"name": "segmentation", "augmentation": changed}
    merged, _, _ = applied("BTCV", folders("BTCV"), given(task=task))
    assert "mirrored" not in capsys.readouterr().out
    assert merged.task["augmentation"]["flip_prob"] == changed.get("flip_prob", 0.1)


def test_the_remedy_against_mirroring_is_understood_by_the_command_line(folders, tmp_path, capsys):
    words = ["finetune", "--preset", "BTCV", "--data", str(folders("BTCV")), "--out", str(tmp_path / "run")]
    words += ["--backbone", "hybrid_nano", "--task.patch_size", "16", "16", "16", "--task.augmentation.flip_axes", "1"]
    words += ["--max_steps", "1", "--batch_size", "1", "--num_workers", "0", "--strict", "false"]
    assert main(words) == 0
    assert read_run(tmp_path / "run").config["task"]["augmentation"]["flip_axes"] == [1]
    assert "as published, although" not in capsys.readouterr().out


def test_a_cache_of_scans_without_labels_is_refused_with_the_way_to_one_with_labels(folders, tmp_path):
    cases = read_cases(str(folders("BTCV") / "imagesTr"), recursive_images_only=True)
    build_cache(cases, tmp_path / "cache", Preprocessing(intensities="8-bit"))
    expected = (
        r"cache is a cache of scans without labels.*from the folder of BTCV first \(mim3d cache DATA --out CACHE\)"
    )
    with pytest.raises(DataError, match=expected):
        applied("BTCV", str(tmp_path / "cache"), given())


def test_a_patch_is_rounded_up_to_whole_tokens_and_the_run_says_so(folders, capsys):
    assert task_of("COVID-19-20", 40)["patch_size"] == [200, 200, 40]
    wide = {**SMALL, "widths": [4, 8, 16, 32, 64, 128], "depths": [1] * 6}
    merged, _, _ = applied("COVID-19-20", folders("COVID-19-20"), given(backbone=wide))
    assert create_recipe(wide).input_multiple == (64, 64, 64)
    assert merged.task["patch_size"] == [192, 192, 64]
    assert "crops of 192 x 192 x 32 voxels, as published, are rounded up to 192 x 192 x 64" in capsys.readouterr().out


def test_settings_of_the_backbone_without_a_name_change_that_of_the_weights_or_the_default(folders, tmp_path):
    changes = {"drop_path": 0.1}
    merged, _, _ = applied("BTCV", folders("BTCV"), given(backbone=changes))
    assert asked_recipe(merged.backbone, None)[0] == create_recipe({"name": "hybrid_base", **changes})
    recipe = create_recipe(SMALL)
    save_network(tmp_path / "encoder", recipe.build(), {"backbone": SMALL})
    weights = str(tmp_path / "encoder")
    merged, _, _ = applied("BraTS", folders("BraTS"), given(backbone=changes, weights=weights))
    with pytest.warns(UserWarning, match="learned from 1 channel, but the data have 4"):
        initial = initialise(merged.backbone, weights, 4)
    assert initial.recipe == dataclasses.replace(recipe, drop_path=0.1, in_channels=4)


def test_what_is_not_asked_for_comes_from_the_preset(folders, capsys):
    asked = given()
    merged, source, split = applied("btcv", str(folders("BTCV")), asked)
    assert asked == given()
    assert merged.backbone == {"name": "hybrid_base", "in_channels": 1}
    assert merged.spacing_mm == (1.5, 1.5, 2.0) and merged.intensity == Intensity(window=(-175, 250))
    assert merged.task["patch_size"] == [96, 96, 96] and merged.max_epochs == 300
    assert merged.optim.base_learning_rate == 3e-4
    assert {case.id for case in split.val} == {"img0035", "img0040"} and len(source.cases) == 6
    assert "preset BTCV (published folds): 4 cases to train on, 2 held out" in capsys.readouterr().out


def test_what_is_asked_for_wins(folders):
    task = {"name": "segmentation", "patch_size": [32, 32, 32], "augmentation": {"flip_prob": 0.9}}
    merged, _, split = applied(
        "BTCV",
        str(folders("BTCV")),
        given(
            task=task,
            spacing_mm=(3.0, 3.0, 3.0),
            intensity=Intensity(kind="zscore", window=None),
            max_steps=7,
            optim=Optimisation(learning_rate=1e-3),
            backbone="hybrid_nano",
            train_fraction=0.5,
        ),
    )
    assert merged.task["patch_size"] == [32, 32, 32] and merged.task["overlap"] == 0.5
    assert merged.task["augmentation"] == {
        **task_of("BTCV", 8)["augmentation"],
        "flip_prob": 0.9,
    }
    assert merged.spacing_mm == (3.0, 3.0, 3.0) and merged.intensity.kind == "zscore"
    assert (merged.max_steps, merged.max_epochs) == (7, None)
    assert merged.optim.learning_rate == 1e-3 and merged.optim.base_learning_rate is None
    assert merged.optim.weight_decay == 1e-5 and merged.optim.warmup_ratio == 50 / 300
    assert merged.backbone == {"name": "hybrid_nano", "in_channels": 1}
    assert len(split.train) == 2


def test_a_task_given_as_settings_keeps_what_differs_from_its_defaults(folders):
    merged, _, _ = applied("BTCV", folders("BTCV"), given(task=Segmentation(feature_dim=8, overlap=0.25)))
    assert (merged.task["feature_dim"], merged.task["overlap"]) == (8, 0.25)
    assert merged.task["patch_size"] == [96, 96, 96]


def test_warm_up_is_fifty_epochs_but_never_more_than_its_published_share(folders):
    shares = [applied("BTCV", folders("BTCV"), given(max_epochs=epochs))[0].optim.warmup_ratio for epochs in (1000, 20)]
    assert shares == [0.05, 50 / 300]


def test_merging_twice_changes_nothing(folders):
    once, _, _ = applied("BraTS", folders("BraTS"), given())
    twice, _, _ = applied("BraTS", folders("BraTS"), once)
    assert to_mapping(twice) == to_mapping(once)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_folds": 3}, "num_folds is 3, but the 5 folds of preset BTCV are fixed"),
        ({"split_seed": 1}, "split_seed is 1"),
        ({"fold": 5}, "folds 0 to 4, but fold is 5"),
        ({"task": "classification"}, "preset BTCV is for segmentation, but task is classification"),
    ],
)
def test_what_contradicts_a_preset_is_refused(folders, changes, message):
    with pytest.raises(ConfigError, match=message):
        applied("BTCV", folders("BTCV"), given(**changes))


def test_a_preset_of_two_folds_needs_no_number_of_folds():
    two = dataclasses.replace(PRESETS["BTCV"], folds=("1-15", "16-30"), num_folds=2)
    assert with_own_folds(two, given()).num_folds == with_own_folds(two, given(num_folds=2)).num_folds == 2
    with pytest.raises(ConfigError, match="num_folds is 3, but the 2 folds of preset BTCV are fixed"):
        with_own_folds(two, given(num_folds=3))


class Mine(Segmentation):
    """A task of a user's own."""


def test_a_task_of_the_users_own_stays_as_it_is():
    asked = {"name": "my_lab.tasks.Mine", "size": 3}
    assert with_preset(given(task=asked), PRESETS["BTCV"], (16, 16, 16)).task == asked
    lines = describe_preset(PRESETS["BTCV"], Split(train=(), val=()), Mine(), (16, 16, 16))
    assert f"those of the task {Mine.__module__}.Mine itself" in lines[-1]


def test_a_strict_run_refuses_a_fold_that_is_not_complete(folders):
    with pytest.raises(DataError, match="4 of the 6 cases that fold 0 of BTCV holds out"):
        applied("BTCV", folders("BTCV"), given(strict=True))


def test_a_label_on_another_grid_leaves_out_its_case_before_work(folders, tmp_path):
    shutil.copytree(folders("MSD Spleen"), tmp_path / "set")
    labels = tmp_path / "set" / "Task09_Spleen" / "labelsTr"
    shutil.copy(folders("MSD Liver") / "Task03_Liver" / "labelsTr" / "liver_0.nii.gz", labels / "spleen_2.nii.gz")
    with pytest.warns(UserWarning, match=r"labelsTr/spleen_2.*does not lie on the grid of .*imagesTr/spleen_2"):
        _, _, split = applied("MSD Spleen", tmp_path / "set", given())
    assert "spleen_2" not in {case.id for case in (*split.train, *split.val)}


@pytest.mark.parametrize("key", MINIATURES)
def test_a_network_learns_from_a_published_folder_with_the_settings_of_its_preset(key, folders, tmp_path):
    name = MINIATURES[key].name
    merged, source, split = applied(name, folders(key), given(backbone=SMALL, task=SHRUNK))
    recipe = create_recipe(merged.backbone)
    scans = build_cache(source, tmp_path / "cache", Preprocessing(spacing_mm=merged.spacing_mm))
    assert not scans.failed
    learned = scans.subset(split.train)
    task = create_task(merged.task).checked(recipe).planned(recipe, learned, scans.labels)
    loader = Loader(learned, task.sampler(), merged.intensity, batch_size=2, seed=0, augment=task.augment())
    torch.manual_seed(0)
    objective = task.build(recipe, scans.labels)
    batches = loader.batches(0)
    loss = objective(next(batches), 0.0).loss
    batches.close()
    loss.backward()
    gradients = [value.grad for value in objective.encoder.parameters() if value.grad is not None]
    assert bool(torch.isfinite(loss)) and any(bool(gradient.any()) for gradient in gradients)
    assert merged.task["overlap"] == 0.5 and recipe.in_channels == len(PRESETS[name].channels)


def test_a_cache_of_a_published_folder_stands_where_the_folder_stood(folders, tmp_path):
    _, source, split = applied("AMOS22", folders("AMOS22"), given())
    build_cache(source, tmp_path / "cache", Preprocessing(spacing_mm=(1.5, 1.5, 2.0)))
    _, again, cached = applied("AMOS22", str(tmp_path / "cache"), given())
    assert isinstance(again, Cache)
    assert [case.id for case in cached.val] == [case.id for case in split.val]
    assert {case.id for case in cached.train} == {case.id for case in split.train}


@pytest.mark.parametrize("key", MINIATURES)
def test_a_published_folder_goes_from_its_preset_to_scores(key, folders, tmp_path):
    mini = MINIATURES[key]
    preset = mini.preset
    out = finetune(
        str(folders(key)),
        str(tmp_path / "run"),
        preset=preset.name,
        task=SHRUNK,
        backbone=SMALL,
        max_steps=2,
        batch_size=1,
        num_workers=0,
        validate_every=2,
        pictures_every=None,
        strict=False,
    )
    record = read_run(out)
    split = json.loads((Path(out) / "split.json").read_text())
    assert len(split["val"]) == len(mini.val) and len(split["train"]) == len(mini.train)
    assert record.config["preset"] == preset.name and record.config["task"]["patch_size"] == SHRUNK["patch_size"]
    assert record.config["spacing_mm"] == list(preset.spacing_mm)
    assert any("val/dice" in line for line in record.metrics)
    card = json.loads((Path(out) / "segmenter" / "card.json").read_text())
    assert {int(value): name for value, name in card["labels"].items()} == preset.labels
    predictions = predict(weights=out, out=str(tmp_path / "predictions"))
    path = evaluate(predictions, f"{out}/held_out.csv", str(tmp_path / "scores.json"), num_workers=1, num_bootstrap=0)
    scores = json.loads(Path(path).read_text())
    assert len(scores["cases"]) == len(mini.val)
    named = preset.regions or {name: (value,) for value, name in preset.labels.items() if value != 0}
    assert set(scores["per_label"]) == set(named)


def test_the_command_refuses_a_published_fold_whose_held_out_cases_are_missing(folders, tmp_path):
    with pytest.raises(DataError, match="fold 0"):
        finetune(str(folders("BTCV")), str(tmp_path / "run"), preset="BTCV", task=SHRUNK, backbone=SMALL, max_steps=1)
    assert not (tmp_path / "run").exists()


def test_the_command_classifies_scans_published_as_slices(folders, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = finetune(
            str(folders("CC-CCII")),
            str(tmp_path / "run"),
            preset="CC-CCII",
            task={"name": "classification", "size": [16, 16, 8]},
            backbone=SMALL,
            max_steps=2,
            batch_size=2,
            num_workers=0,
            pictures_every=None,
        )
    with open(Path(out) / "held_out.csv", encoding="utf-8", newline="") as rows:
        held_out = list(csv.DictReader(rows))
    assert {row["class"] for row in held_out} == set(PRESETS["CC-CCII"].classes)
    assert read_run(out).config["task"]["fit"] == "scan"
