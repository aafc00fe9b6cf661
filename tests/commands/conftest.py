"""A small data set and a segmenter that knows it, made once for all tests of commands."""

from pathlib import Path

import pytest

from mim3d.commands.finetune import finetune
from mim3d.training.schedule import Optimisation
from tests.labelled import write_ball_set

BACKBONE = {"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2}
#: Of a MiM that is as small as the backbone; the method's own has 32 million weights, 390 MB in each checkpoint.
DECODER = {"decoder_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2}
TASK = {"name": "segmentation", "patch_size": [16, 16, 16], "feature_dim": 8}


@pytest.fixture(scope="session")
def ball_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Decathlon folder of six scans."""
    return write_ball_set(tmp_path_factory.mktemp("data") / "balls")


@pytest.fixture(scope="session")
def segmenter_run(ball_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned to find balls and cores."""
    out = tmp_path_factory.mktemp("runs") / "segmenter"
    finetune(
        str(ball_set),
        str(out),
        task=TASK,
        backbone=BACKBONE,
        num_folds=3,
        max_steps=40,
        optim=Optimisation(learning_rate=5e-3),
        num_workers=0,
        pictures_every=20,
    )
    return out
