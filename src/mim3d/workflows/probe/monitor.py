"""The probe during pre-training: it is prepared once, scores the encoder every so often, and keeps the best one."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mim3d.backbones import Backbone, Encoder
from mim3d.caching.cache import Cache
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.left_out import LeftOutList
from mim3d.core.names import number_of
from mim3d.core.progress import say
from mim3d.core.resources import choose_accelerator
from mim3d.core.run_folder import GO_ON, LEFT_OUT_NAME, Run
from mim3d.core.types import Triple
from mim3d.core.warned import UnfinishedWarning, WarningRow, published
from mim3d.datasets.cases import Case, CaseSet
from mim3d.datasets.splits import Split, split_cases
from mim3d.objective import Objective
from mim3d.probing.items import LARGEST_PLANNED_EDGE, ProbeSet
from mim3d.probing.probe import Probed, probe_encoder, random_encoder, without_encoder
from mim3d.probing.settings import Probing
from mim3d.training.checkpoint import load_best
from mim3d.training.memory import SampleShapes
from mim3d.weights import save_network
from mim3d.workflows.probe.cases import PHANTOM, ProbeCases, labelled_cases, read_source
from mim3d.workflows.shared.held_out import FoldChoice, cases_by_task
from mim3d.workflows.shared.initialisation import Initialisation
from mim3d.workflows.shared.inputs import check_channels, unreadable_of
from mim3d.workflows.shared.leakage import SEEN_NAME
from mim3d.workflows.shared.memory import largest_image
from mim3d.workflows.shared.training import TrainingSettings

#: The score by which the best encoder is kept.
BEST_BY = "probe_linear"

#: Probings of a run where nothing else is asked for.
DEFAULT_PROBINGS = 10

#: How features are probed: few crops, so that one probing takes seconds.
PROBING = Probing(crops_per_scan=2)

#: Scans to learn from, and to score on, at most; more of them where each is one item alone.
MAX_SCANS = {"labels": (16, 8), "classes": (64, 32)}

#: One patient in three is scored on.
NUM_FOLDS = 3


@dataclass(frozen=True)
class ProbePlan:
    """A probe that was asked for, before the run begins.

    Attributes:
        data: Labelled scans, or ``phantom``.
        every: Steps between two probings; None for ten in all.
        cases: The cases of ``data``; None for phantoms, which are not made yet.
        folds: Folds of the pre-training.
        largest: Edges of the crops at most: those of the largest volume that pre-training shows the encoder.
        seed: Seed of the choice of scans and tokens.
    """

    data: str
    every: int | None
    cases: ProbeCases | None
    folds: FoldChoice
    largest: Triple
    seed: int

    @classmethod
    def of(
        cls,
        data: str | None,
        every: int | None,
        folds: FoldChoice,
        recipe: Backbone,
        sample: SampleShapes,
        seed: int,
    ) -> "ProbePlan | None":
        """From the settings of pre-training; None where no probe is asked for.

        Args:
            data: Labelled scans, or ``phantom``; None for no probe.
            every: Steps between two probings; None for ten in all.
            folds: Folds of the pre-training.
            recipe: Settings of the encoder.
            sample: Shapes of a sample of pre-training.
            seed: Seed of the choice of scans and tokens.
        Raises:
            ConfigError: Settings that cannot work.
            DataError: Labelled scans that cannot be used.
        """
        if data is None:
            return None
        plan = cls(data, every, None, folds, largest_image(sample) or (LARGEST_PLANNED_EDGE,) * 3, seed)
        if data == PHANTOM:
            if recipe.in_channels != 1:
                raise ConfigError(
                    f"probe is {PHANTOM}, which has one channel, but backbone.in_channels is {recipe.in_channels}; "
                    "give labelled scans of as many channels."
                )
            return plan
        cases = plan.choose(read_source(data, ""))
        check_channels(cases.cases, recipe)
        return replace(plan, cases=cases)

    def num_bytes(self, in_channels: int) -> int:
        """Bytes of the views that are kept in memory, at most."""
        voxels = in_channels * math.prod(self.largest)
        return 4 * voxels * sum(MAX_SCANS["labels"]) * PROBING.crops_per_scan

    def steps_between(self, num_steps: int) -> int:
        """Steps between two probings of a run of ``num_steps``; 0 for one at the end."""
        return -(-num_steps // DEFAULT_PROBINGS) if self.every is None else self.every

    def choose(self, source: CaseSet | Cache) -> ProbeCases:
        """A small part of the labelled cases, apart by patient.

        Cases that `mim3d finetune` would hold out are left out: the choice of the best encoder must not see them.

        Raises:
            DataError: No labelled cases, or those of one patient alone.
        """
        target, cases = labelled_cases(source, None, self.data)
        usable = [case for case in cases if case.split in (None, "train")]
        if self.data != PHANTOM:
            # By whichever task splits them; too few cases for the folds are never split.
            groups = cases_by_task([*source.cases, *unreadable_of(source)])
            large = [group for group in groups if len({case.patient for case in group}) >= self.folds.num_folds]
            held_out = self.folds.held_out_patients(large)
            usable = [case for case in usable if case.patient not in held_out]
        patients = {case.patient for case in usable}
        if len(patients) < 2:
            raise DataError(
                f"{self.data}: labelled scans of {number_of(len(patients), 'patient')} are left for the probe, beside "
                "those that fine-tuning holds out; two are needed."
            )
        # A split that is declared for fine-tuning is no split of this part.
        undeclared = [replace(case, split=None) for case in usable]
        split = split_cases(undeclared, fold=0, num_folds=min(NUM_FOLDS, len(patients)), seed=self.seed)
        num_train, num_val = MAX_SCANS[target]
        return ProbeCases(source, target, Split(self._some(split.train, num_train), self._some(split.val, num_val)))

    def _some(self, cases: Sequence[Case], number: int) -> tuple[Case, ...]:
        order = np.random.default_rng(self.seed).permutation(len(cases))[:number]
        in_order = sorted(cases, key=lambda case: case.id)
        return tuple(in_order[place] for place in sorted(order))

    def prepared(self, run: Run, training: TrainingSettings, encoder: Encoder, card: Mapping[str, Any]) -> ProbeSet:
        """Read the probe set once and keep it; references without learned weights are noted and printed.

        Args:
            run: Receives phantoms and cache, and the notes.
            training: The run's settings.
            encoder: The encoder before training.
            card: Card that is saved with its weights.
        Raises:
            DataError: Scans that cannot be used, or fewer than two classes.
        """
        folder = run.path / "probe"
        cases = self.cases or self.choose(read_source(self.data, folder / "phantom"))
        initial = Initialisation.of_card(encoder.recipe, encoder, card)
        scans = cases.prepared(
            folder / "cache",
            initial.spacing_mm(None, cases.source),
            num_workers=training.num_workers,
            strict=bool(training.strict),
        )
        run.bind_input("probe", scans.digest)
        left_out = LeftOutList(folder / LEFT_OUT_NAME, len(scans) + len(scans.failed), remedy=GO_ON)
        folder.mkdir(exist_ok=True)
        left_out.begin(scans.failed, ())
        left_out.note()
        mapping = initial.intensity(None, scans.subset(cases.split.train))
        items = cases.items(scans, encoder, mapping, PROBING, seed=self.seed, largest=self.largest).in_memory()
        random = random_encoder(encoder, self.seed).to(choose_accelerator(training.accelerator))
        references = {"random": probe_encoder(random, items, PROBING), **without_encoder(items, PROBING)}
        found = {name: scores_of(probed) for name, probed in references.items()}
        run.note({"probe": {**found, "names": items.names, "num_scans": items.num_scans, "view_size": items.size}})
        sizes = " x ".join(map(str, items.size))
        say(
            f"probe: {len(items.names)} {items.target} ({', '.join(items.names)}) in "
            f"{number_of(items.num_scans[0], 'scan')} to learn from and {items.num_scans[1]} to score on, "
            f"views of {sizes} voxels"
        )
        for name, scores in found.items():
            say(f"  {name}: linear {scores[BEST_BY]:.4f}, nearest neighbours {scores['probe_knn']:.4f}")
        return items


def scores_of(probed: Probed) -> dict[str, float]:
    """The scores that are logged: balanced accuracy of both classifiers, and measures of collapse."""
    linear, neighbours = (each.values()["balanced_accuracy"] for each in (probed.linear, probed.neighbours))
    scores = {BEST_BY: linear, "probe_knn": neighbours}
    if probed.collapse is not None:
        scores |= {"feature_std": probed.collapse.feature_std, "effective_rank": probed.collapse.effective_rank}
    return scores


@dataclass
class EncoderKeeper:
    """Keeps OUT/encoder at the last encoder; with a probe at the best one by its score, and OUT/encoder_last beside it.

    Attributes:
        run: The run.
        card: Card that is saved with the encoder's weights.
        items: The probe set; None without a probe, and in all but the first process, which alone probes.
        spare: Builds an objective like the one that is trained, to hold the best weights for a moment; None without a
            probe.
        best: The best score of this session.
        is_new: Whether a better encoder may have been found since the last export.
        num_steps: Steps of the run; before the last one cards say that it is not finished.
        said: Warnings that the last export holds.
    """

    run: Run
    card: Mapping[str, Any]
    items: ProbeSet | None = None
    spare: Callable[[], Objective] | None = None
    best: float = -math.inf
    is_new: bool = True
    num_steps: int = 0
    said: Sequence[WarningRow] | None = None

    def score(self, objective: Objective) -> dict[str, float]:
        """Scores of the encoder as it is; none of them a number where its features are not."""
        assert self.items is not None
        try:
            scores = scores_of(probe_encoder(objective.encoder, self.items, PROBING))
        except DataError as error:
            warnings.warn(f"no probe at this step: {error}", stacklevel=2)
            return dict.fromkeys((BEST_BY, "probe_knn", "feature_std", "effective_rank"), math.nan)
        self.is_new |= scores[BEST_BY] > self.best
        self.best = max(self.best, scores[BEST_BY])
        return scores

    def save(self, objective: Objective, step: int) -> None:
        """Export the encoder of this step, and with a probe the best one so far."""
        unfinished = [{"kind": UnfinishedWarning.kind, "text": ""}] if step < self.num_steps else []
        self.said = published([*self.run.warnings, *unfinished])
        if self.spare is None:
            self._export("encoder", objective.encoder, step)
            return
        self._export("encoder_last", objective.encoder, step)
        if not self.is_new:
            return
        with torch.random.fork_rng(devices=[]):
            spare = self.spare()
        found = load_best(self.run.checkpoints_dir, spare)
        if found is None:
            self._export("encoder", objective.encoder, step)
        else:
            self._export("encoder", spare.encoder, found["step"], found["values"])
            self.is_new = False

    def conclude(self, objective: Objective, step: int) -> None:
        """Export once more where more, or less, is to be said of the run than at its last checkpoint."""
        if self.said != published(self.run.warnings):
            self.num_steps, self.is_new = step, True
            self.save(objective, step)

    def _export(self, name: str, encoder: Encoder, step: int, scores: Mapping[str, float] | None = None) -> None:
        card = {**self.card, "step": step, **({"probe": dict(scores)} if scores else {})}
        card["warnings"] = self.said
        save_network(self.run.path / name, encoder, card, beside=[self.run.path / SEEN_NAME])

    def conclusion(self, best: Mapping[str, float] | None) -> str:
        """One line that says which encoder lies where."""
        where = f"encoder: {self.run.path / 'encoder'}"
        if self.spare is None:
            return where
        if best is None:
            return f"{where} (the last one; no probe has chosen one yet)"
        return (
            f"{where}, the best by the probe, of step {int(best['step'])} ({BEST_BY} {best[BEST_BY]:.4f}); "
            f"the last one is {self.run.path / 'encoder_last'}"
        )
