"""The cells of each arm: settings of pre-training, probe and fine-tuning, which differ in what the arm begins with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mim3d.backbones import BACKBONES
from mim3d.core.files import csv_text, plain_text, write_text
from mim3d.core.names import name_digest
from mim3d.core.settings import build_settings, to_named
from mim3d.datasets.cases import Case
from mim3d.methods import METHODS
from mim3d.workflows.compare.arms import Arm
from mim3d.workflows.compare.cells import Cell
from mim3d.workflows.compare.plan import ComparisonPlan
from mim3d.workflows.compare.subsets import Amount, FoldPart
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.pretrain import PretrainSettings
from mim3d.workflows.probe.run import ProbeSettings
from mim3d.workflows.shared.held_out import list_rows

#: Settings that keep the folder of a cell small, where a recipe does not say otherwise.
_SMALL: Mapping[str, Any] = {"pictures_every": 0, "keep_checkpoints": 1}


def pretraining_of(plan: ComparisonPlan, arm: Arm, seed: int) -> PretrainSettings:
    """Pre-training of an arm, without its length and the cases that it leaves out.

    Raises:
        ConfigError: The recipe has a setting that cannot work.
    """
    recipe: dict[str, Any] = plan.settings.pretrain if isinstance(plan.settings.pretrain, dict) else {}
    own = {name: value for name, value in recipe.items() if name not in ("method", "max_steps", "max_epochs")}
    method = arm.created_method()
    assert method is not None
    shared = {"intensity": plan.finetune.intensity, "precision": plan.finetune.precision, "spacing_mm": None}
    values = {
        **_SMALL,
        **own,
        **shared,
        "data": plan.cache.path,
        "out": plan.settings.out,
        "method": to_named(method, METHODS),
        "backbone": to_named(arm.recipe(), BACKBONES),
        "accelerator": plan.settings.accelerator,
        "seed": seed,
        "resume": True,
    }
    return build_settings(PretrainSettings, values, "pretrain")


def finetuning_of(plan: ComparisonPlan, arm: Arm, seed: int) -> FinetuneSettings:
    """Fine-tuning of an arm from scratch or its own weights, without its length and the cases of its parts."""
    recipe: dict[str, Any] = plan.settings.finetune if isinstance(plan.settings.finetune, dict) else {}
    small = {name: value for name, value in _SMALL.items() if name not in recipe}
    backbone = to_named(arm.recipe(), BACKBONES) if arm.kind == "from scratch" else None
    # One schedule for all, unless it is asked for: what a schedule gives alone is easily taken for the weights' gain.
    # One that spares weights means nothing without any, and a frozen encoder has its own.
    freezes = getattr(plan.task, "freeze_encoder", False)
    asked = plan.finetune.schedule or (None if freezes else "default")
    schedule = "default" if arm.kind == "from scratch" and not freezes else asked
    changes: dict[str, Any] = {**small, "schedule": schedule, "backbone": backbone, "weights": arm.weights}
    if arm.weights is not None and arm.backbone is not None:
        changes["backbone"] = arm.backbone
    return replace(plan.finetune, seed=seed, resume=True, max_steps=None, max_epochs=None, **changes)


def with_cells(plan: ComparisonPlan, steps: Mapping[str, int]) -> ComparisonPlan:
    """The plan with its cells, and the lists of cases that they read written.

    Args:
        plan: The plan.
        steps: Steps of the fine-tuning (``finetune``) and pre-training (``pretrain``) of each arm, by ``KIND ARM``.
    """
    cells: list[Cell] = []
    identities = {arm.name: arm.identity() for arm in plan.arms}
    for seed in plan.settings.seeds:
        for fold in plan.folds:
            for arm in plan.arms:
                made = ArmCells(plan, arm, fold, identities[arm.name], steps).made(seed)
                known = {cell.id for cell in cells}
                cells += [cell for cell in made if cell.id not in known]
    return replace(plan, cells=tuple(cells))


@dataclass(frozen=True)
class ArmCells:
    """Makes the cells of one arm in one fold.

    Attributes:
        plan: The plan.
        arm: The arm.
        fold: The parts of the fold.
        identity: What tells the arm from others.
        steps: Steps of each kind and arm, see :func:`with_cells`.
    """

    plan: ComparisonPlan
    arm: Arm
    fold: FoldPart
    identity: Mapping[str, Any]
    steps: Mapping[str, int]

    def made(self, seed: int) -> list[Cell]:
        """Pre-training, probe and fine-tunings of a seed."""
        plan, arm = self.plan, self.arm
        first = plan.settings.seeds[0] if plan.settings.pretrain_once else seed
        cells = [self._pretraining(first)] if arm.method is not None else []
        needs = cells[0].id if cells else None
        if plan.settings.probe and arm.kind != "from scratch" and seed == first:
            cells.append(self._probe(first, needs))
        for amount in plan.amounts:
            cells.append(self._finetuning(amount, seed, needs))
        return cells

    def _pretraining(self, seed: int) -> Cell:
        settings = pretraining_of(self.plan, self.arm, seed)
        settings = replace(
            settings,
            max_steps=self.steps[f"pretrain {self.arm.name}"],
            held_out_list=self._list("not_pretrained", (*self.fold.choosing, *self.fold.test)),
        )
        cell = Cell(kind="pretrain", arm=self.arm.name, fold=self.fold.number, seed=seed, settings=settings)
        return self._finished(cell, {"learned": _ids(self.fold.learning)})

    def _probe(self, seed: int, needs: str | None) -> Cell:
        given = self.plan.settings
        settings = ProbeSettings(
            weights=self._weights(needs) or "",
            data=self.plan.cache.path,
            held_out_list=self._list("tested", self.fold.test),
            intensity=self.plan.finetune.intensity,
            target="classes" if self.plan.task.needs == "class" else "labels",
            accelerator=given.accelerator,
            num_bootstrap=0,
            seed=seed,
            num_workers=0,
        )
        cell = Cell(kind="probe", arm=self.arm.name, fold=self.fold.number, seed=seed, settings=settings, needs=needs)
        return self._finished(cell, {"tested": _ids(self.fold.test)})

    def _finetuning(self, amount: Amount, seed: int, needs: str | None) -> Cell:
        split = self.fold.labelled(amount, seed)
        name = f"{amount.text.replace('%', 'pct')}_seed{seed}"
        settings = replace(
            finetuning_of(self.plan, self.arm, seed),
            weights=self._weights(needs),
            max_steps=self.steps[f"finetune {self.arm.name}"],
            train_list=self._list(f"{name}_train", split.train),
            held_out_list=self._list(f"{name}_choose", split.val),
        )
        cell = Cell(
            kind="finetune",
            arm=self.arm.name,
            fold=self.fold.number,
            labels=amount.text,
            num_patients=amount.of_patients(self.fold.num_patients),
            seed=seed,
            settings=settings,
            needs=needs,
            test=self._table("tested", self.fold.test),
        )
        parts = {"train": _ids(split.train), "choose": _ids(split.val), "tested": _ids(self.fold.test)}
        return self._finished(cell, parts)

    def _finished(self, cell: Cell, parts: Mapping[str, Any]) -> Cell:
        named = cell.with_id({"arm": self.identity, "data": self.plan.cache.digest, **parts})
        name, content = self.plan.earlier.get(cell.key, ("", None))
        if content is not None and content == cell.content():
            # As it was called by a version of mim3d with other settings.
            named = replace(named, id=name)
        where = self.plan.out / "runs" / named.id
        out = where / "probe.json" if cell.kind == "probe" else where
        return replace(named, settings=replace(named.settings, out=str(out)))

    def _weights(self, needs: str | None) -> str | None:
        return self.arm.weights if needs is None else str(self.plan.out / "runs" / needs)

    def _list(self, name: str, cases: Sequence[Case]) -> str:
        return self._written(f"{name}.txt", "".join(f"{name}\n" for name in _ids(cases)))

    def _table(self, name: str, cases: Sequence[Case]) -> str:
        """A list that is DATA again, and a table of references."""
        columns = ["id", "image", "label", "class", "patient", "modality"]
        if any(case.labelled for case in cases):
            columns.append("labels")
        return self._written(f"{name}.csv", csv_text(columns, list_rows(cases, columns)))

    def _written(self, name: str, text: str) -> str:
        """The file of a list. One that is there stays, since cells at work read it; others are put beside it."""
        first = self.plan.out / "lists" / f"fold{self.fold.number}_{name}"
        for path in (first, first.with_name(f"{first.stem}_{name_digest(text)}{first.suffix}")):
            if not path.is_file():
                break
            if plain_text(path) == text:
                return str(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        return str(path)


def _ids(cases: Sequence[Case]) -> list[str]:
    return sorted(case.id for case in cases)
