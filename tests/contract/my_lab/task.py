"""Tasks of a laboratory: one that changes segmentation a little, and one of a new kind."""

from dataclasses import dataclass

import torch

from mim3d.objective import Objective, StepOutput
from mim3d.tasks.contract import ExportForm, LogitsProgram, Predictor, Task
from mim3d.tasks.evaluation import Scores
from mim3d.tasks.segmentation.crops import CropSampler
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.training.schedule import Optimisation


@dataclass(frozen=True, kw_only=True)
class MySeg(Segmentation):
    """Segmentation with a setting more, in a folder of its own name."""

    weight: float = 1.0

    network = "my_segmenter"


class VolumeObjective(Objective):
    """The share of labelled voxels in a crop, from the mean of the coarsest map."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.widths[-1], 1)

    def logits(self, volume):
        return self.head(self.encoder.feature_maps(volume)[-1].mean((2, 3, 4)))

    def forward(self, batch, progress):
        share = (batch["label"][:, 0] > 0).float().mean((1, 2, 3))
        loss = (self.logits(batch["image"].flatten(0, 1))[:, 0].sigmoid() - share).square().mean()
        return StepOutput(loss, {"loss/share": loss.detach()})


class VolumePredictor(Predictor):
    """One number per scan, in a list."""

    done = "measured"
    list_name = "shares.json"
    failures_name = "shares.json"

    @property
    def identity(self):
        return {"weights_digests": [network.digest for network in self.networks]}

    def predict(self, cases, inputs, folder, on_windows):
        return [{"share": 0.25} for _ in cases]


@dataclass(frozen=True, kw_only=True)
class Volume(Task):
    """How much of a crop is labelled."""

    size: int = 16

    best_by = "closeness"

    @property
    def optimisation(self):
        return Optimisation(learning_rate=1e-3)

    def checked(self, backbone):
        return self

    def planned(self, backbone, scans, labels):
        return self

    def summary(self):
        return ["crops, and how much of them is labelled"]

    def sampler(self):
        return CropSampler((self.size,) * 3, 0.5)

    def augment(self):
        return None

    def build(self, backbone, labels):
        return VolumeObjective(backbone.build())

    def validate(self, objective, scans, intensity, labels):
        return {"closeness": 1.0}

    def predictor(self, networks, settings):
        return VolumePredictor(networks, settings)

    @classmethod
    def score(cls, settings):
        rows = [["a", 0.5]]
        content = {"kind": "shares", "predictions": settings.predictions}
        return Scores(content=content, num_cases=1, csv_tables={".csv": (["id", "error"], rows)})

    def export_form(self, network):
        return ExportForm(
            program=LogitsProgram(network.module).eval(),
            channels=("share",),
            activation="sigmoid",
            input_size=(self.size,) * 3,
            purpose="The share of a crop that is labelled.",
            pipeline="other",
        )


@dataclass(frozen=True, kw_only=True)
class OnlyTrains(Volume):
    """Says neither how to predict, nor how to score, nor how to export."""

    predictor = Task.predictor
    score = Task.score
    export_form = Task.export_form


@dataclass(frozen=True)
class NoTask:
    """A dataclass that is no task."""
