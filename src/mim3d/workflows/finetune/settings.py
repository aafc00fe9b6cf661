"""The settings of fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from mim3d.core.errors import ConfigError
from mim3d.core.types import Named, Spacing
from mim3d.datasets.cases import Case
from mim3d.datasets.splits import Split, TrainPart, require_split_seed
from mim3d.scans.grids import require_spacing
from mim3d.scans.intensity import Intensity
from mim3d.weights import MIN_COVERAGE, InputLayers, require_share
from mim3d.workflows.finetune.like import settings_below
from mim3d.workflows.finetune.schedules import ScheduleName
from mim3d.workflows.shared.held_out import choose_split
from mim3d.workflows.shared.training import TrainingSettings


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
    """Settings of fine-tuning, as the user gives them or with a preset and a plan filled in.

    Attributes:
        data: MSD or nnU-Net raw folder, dataset.json, folder of images and labels, CSV or JSON list, or a cache.
        out: Folder of the run.
        task: What to learn; settings as --task.patch_size 96 96 96.
        weights: Pre-trained encoder: a run, an exported folder or a published checkpoint; from scratch if not given.
        backbone: Encoder, a name of list_models(); that of the weights (settings alone change it), else hybrid_base.
        input_layers: For another number of channels than the weights know: mean, repeat (in turn) or new.
        min_coverage: Share of the encoder that the weights must fill, from 0 to 1; 1 refuses every partial load.
        schedule: When the encoder learns: default (from the first step), warmup (after a longer warm-up), sawtooth
            (when the decoder has learned alone) or frozen (never); sawtooth with weights, else default, if not given.
        like: Run of fine-tuning whose recipe is taken, data and all: everything but weights and machine; flags win.
        preset: Name of a published data set; gives what is not given.
        plan: Plan to use instead of a new one: a plan.yaml of a run, edited or not.
        cache: Folder for the cache of preprocessed scans; OUT/cache if not given.
        spacing_mm: Voxel size along X, Y, Z in millimetres; that of the weights if not given, else planned.
        intensity: Mapping of intensities to network input; that of the weights if not given, else planned.
        fold: Which of the folds is held out, from 0; all for each in turn; null trains on all cases.
        held_out_list: File with the ids of cases or patients to validate on, one per line, in place of a fold.
        num_folds: Number of folds that patients are split into; a split or folds that the data set declares win.
        split_seed: Seed by which patients are split into folds.
        train_fraction: Share of the training patients that is used; smaller shares are part of larger ones.
        train_cases: Number of training patients instead of a share.
        train_list: File with the ids of cases or patients to train on, one per line; held-out ones stay held out.
        train_seed: Seed of which patients train_fraction and train_cases take.
        validate_every: Steps between two validations; ten in all if not given, 0 for one at the end.
        patience: Validations without a better one after which training ends; all steps are done if not given, or 0.
        max_steps: Optimiser steps; planned if neither these nor max_epochs are given.
        batch_size: Crops per micro-batch and device; planned if not given.
        seed: Seed of weights, order and crops; never of the folds.
        strict: With true, refuse scans that cannot be used or were learned from, instead of warning; with false, go on
            even where held-out cases of a published fold are missing.
    """

    data: str
    out: str
    _: KW_ONLY
    task: Named = "segmentation"
    weights: str | None = None
    backbone: Named | None = None
    input_layers: InputLayers = "mean"
    min_coverage: float = MIN_COVERAGE
    schedule: ScheduleName | None = None
    like: str | None = None
    preset: str | None = None
    plan: str | None = None
    cache: str | None = None
    spacing_mm: Spacing | None = None
    intensity: Intensity | None = None
    fold: int | Literal["all"] | None = 0
    held_out_list: str | None = None
    num_folds: int = 5
    split_seed: int = 0
    train_fraction: float = 1.0
    train_cases: int | None = None
    train_list: str | None = None
    train_seed: int = 0
    validate_every: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_spacing(self.spacing_mm)
        require_share(self.min_coverage)
        require_split_seed(self.split_seed)
        if self.held_out_list is not None and self.fold == "all":
            raise ConfigError("fold is all, but held_out_list names one part to validate on; give one of them.")

    @staticmethod
    def below(given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that lie below those given: the recipe of the run that this one is ``like``.

        Raises:
            ConfigError: That is no run of fine-tuning, or one that stopped before its plan was finished.
        """
        return settings_below(given)

    @property
    def single_fold(self) -> int | None:
        """The fold of one run; None where a list takes its place.

        Raises:
            AssertionError: For the settings of all folds, which are no run of their own.
        """
        assert self.fold != "all"
        return self.fold if self.held_out_list is None else None

    def split(self, cases: Sequence[Case], unreadable: Sequence[Case] = ()) -> Split:
        """The cases to train on and those that are held out.

        Args:
            cases: All cases of the data set that can be used.
            unreadable: Those whose files cannot be read, which folds count all the same.
        Raises:
            ConfigError: A fold that does not exist, or a negative seed.
            DataError: Cases that cannot be split, or a part of them that cannot be taken.
        """
        part = TrainPart(
            train_fraction=self.train_fraction,
            train_cases=self.train_cases,
            train_list=self.train_list,
            train_seed=self.train_seed,
        )
        return choose_split(
            cases,
            fold=self.single_fold,
            num_folds=self.num_folds,
            part=part,
            split_seed=self.split_seed,
            unreadable=unreadable,
            held_out_list=self.held_out_list,
        )
