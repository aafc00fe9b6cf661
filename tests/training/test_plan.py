"""Numbers that follow from the settings, each with its derivation."""

import re

from mim3d.backbones import create_recipe
from mim3d.loading.loader import Loader
from mim3d.methods import create_method
from mim3d.methods.mim.hierarchy import Level
from mim3d.methods.mim.method import MiM
from mim3d.objective import Tokens, crop_tokens
from mim3d.scans.intensity import Intensity
from mim3d.training.meter import summary
from mim3d.training.plan import make_plan
from mim3d.training.schedule import Optimisation
from mim3d.training.settings import LoopSettings
from tests.array_scans import random_scan
from tests.training.toy_training import ToyObjective, ToySource

OPTIM = Optimisation(base_learning_rate=1e-2, reference_batch=16)
LOOP = LoopSettings(max_steps=50, accumulation=3, accelerator="cpu")


def test_every_derived_number_is_told_with_its_derivation() -> None:
    objective = ToyObjective()
    objective.tokens_per_sample = (Tokens("coarse", 1, 20, 7), Tokens("fine", 4, 5, 3))
    source = ToySource(batch_size=2)
    source.voxels_per_sample = 1000
    plan = make_plan(objective, source, LOOP, OPTIM, "cpu")
    assert plan.derived["effective_batch"] == 6
    assert plan.derived["samples"] == 300
    assert plan.derived["epochs"] == 15
    assert plan.derived["tokens_per_step"] == {"visible": 6 * 40, "hidden": 6 * 19}
    assert plan.derived["voxels_per_step"] == 6000
    told = "\n".join(plan.derivations)
    assert "effective batch 6 = 2 samples x 3 micro-batches x 1 process" in told
    assert "learning rate 0.00375 = 0.01 (base) x 6 (effective batch) / 16 (reference batch)" in told
    assert "steps per epoch 3.333 = 20 samples / 6; 50 steps = 15 epochs" in told
    assert "samples seen 300 = 50 steps x 6" in told
    assert (
        "tokens per step 354 (240 visible, 114 hidden) = 6 samples x "
        "(1 coarse x (20 visible + 7 hidden) + 4 fine x (5 visible + 3 hidden))"
    ) in told
    assert "voxels read per step 6,000 = 6 samples x 1,000" in told
    assert plan.derived["derivations"] == list(plan.derivations)
    assert plan.summary == (
        "training: 50 steps of 6 samples (2 samples x 3 micro-batches x 1 process), 15 passes over 20 samples; "
        "learning rate 0.00375",
        f"computing: {plan.derived['num_parameters']:,} parameters, all trained, on cpu in 32-true",
    )


def test_one_of_a_kind_is_told_in_the_singular() -> None:
    loop = LoopSettings(max_steps=1, accelerator="cpu")
    source = ToySource(batch_size=1)
    source.samples_per_epoch = 1
    plan = make_plan(ToyObjective(), source, loop, Optimisation(learning_rate=1e-3, warmup_ratio=0.05), "cpu")
    assert plan.summary[0] == "training: 1 step of 1 sample, 1 pass over 1 sample; learning rate 0.001"
    told = "\n".join((*plan.summary, *plan.derivations))
    assert "no warm-up, a cosine" in told
    assert not re.search(r"\b1 (?!pass\b|process\b)[a-z-]+s\b", told)


def test_what_nobody_counted_is_not_told() -> None:
    plan = make_plan(ToyObjective(), ToySource(), LOOP, OPTIM, "cpu")
    assert not {"tokens_per_step", "voxels_per_step"} & plan.derived.keys()
    assert "tokens per step" not in "\n".join(plan.derivations)


LEVELS = (
    Level(name="coarse", footprint=(32, 32, 32), size=(16, 16, 16), mask_ratio=0.5, num_children=3),
    Level(name="fine", footprint=(16, 16, 16), size=(16, 16, 16), mask_ratio=0.25),
)


def test_a_hierarchy_counts_its_tokens_and_the_voxels_that_are_read() -> None:
    recipe = create_recipe({"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2})
    method = create_method(MiM(levels=LEVELS))
    objective = method.build(recipe)
    assert objective.tokens_per_sample == (Tokens("coarse", 1, 32, 32), Tokens("fine", 3, 48, 16))
    loader = Loader([random_scan((40, 40, 40))], method.sampler(recipe), Intensity(), batch_size=1, seed=0)
    batch = next(loader.batches(0))
    for kind in objective.tokens_per_sample:
        hidden = batch[f"hidden/{kind.name}"].to("cpu")
        assert hidden.numel() == kind.num_volumes * (kind.visible + kind.hidden)
        assert int(hidden.sum()) == kind.num_volumes * kind.hidden
    # This scan has no reduced levels: the coarse volume is read in full and averaged.
    assert loader.voxels_per_sample == 32**3 + 3 * 16**3


def test_a_crop_is_shown_whole() -> None:
    assert crop_tokens((32, 16, 16), (8, 8, 8)) == (Tokens("crop", 1, 4 * 2 * 2, 0),)


def test_memory_stands_in_the_line_where_it_is_known() -> None:
    values = {"loss": 0.5, "learning_rate": 1e-3, "samples_per_s": 12.0, "data_wait_ratio": 0.25}
    assert summary(values).endswith("25% waiting for data")
    assert summary({**values, "memory_bytes": 3 * 2**30}).endswith("25% waiting for data  3.0 GiB held")
