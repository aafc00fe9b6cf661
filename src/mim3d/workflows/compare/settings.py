"""The settings of a comparison, as the user gives them, and what lies in its folder below them."""

import os
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mim3d.backbones import BACKBONES
from mim3d.core.errors import BothSetError, ConfigError
from mim3d.core.names import cut
from mim3d.core.own_code import own_code_in
from mim3d.core.settings import CONFIG_NAME, nearest, overlay, read_yaml, to_mapping
from mim3d.core.types import Named
from mim3d.methods import METHODS
from mim3d.metrics import Bootstrap
from mim3d.workflows.compare.arms import SCRATCH
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.pretrain import PretrainSettings

#: Settings that say how this call works, not what is compared.
OF_CALL = ("jobs", "dry_run", "table_only", "slurm", "cell")

#: Settings of fine-tuning and pre-training that the comparison decides itself; a recipe may hold those of the first
#: line, which are passed over.
_DECIDED = (
    *("data", "out", "weights", "fold", "num_folds", "split_seed", "resume", "cache", "max_time", "seed", "preset"),
    *("held_out_list", "train_fraction", "train_cases", "train_list", "train_seed", "like", "devices", "num_nodes"),
    *("accelerator", "modality", "patient_pattern", "probe", "probe_every", "strict"),
)


@dataclass(frozen=True)
class CompareSettings:
    """Settings of `mim3d compare`.

    Attributes:
        out: Folder of the comparison. With it alone, the command goes on with the comparison that it holds.
        data: Labelled scans in any form of DATA, or a cache.
        arms: What is compared: scratch, a method (MiM, MAE, SimMIM, VoCo, SwinUNETRSSL), either with :BACKBONE behind
            it, a backbone (from scratch), weights (a run, a folder or a file), or '{name: TEXT, method: ..., weights:
            ..., backbone: ...}'. The others are held against the first arm.
        labels: Amounts of labelled patients, as shares (25%) or numbers (12) of those to learn from in a fold.
        folds: Folds that are tested, from 0; all of them if not given, so that every patient is tested once.
        num_folds: Number of folds that patients are split into; a split or folds that the data set declares win.
        split_seed: Seed of folds and of the patients that choose checkpoints.
        seeds: Seeds of weights, order and crops; each takes label subsets of its own, the same for all arms.
        finetune: Recipe of fine-tuning: a file (recipes/NAME.yaml), settings as --finetune.batch_size 4, or both.
        pretrain: Recipe of pre-training, in the same way.
        backbone: Backbone of arms that name none; that of the recipes if not given, else hybrid_base.
        finetune_steps: Steps of every fine-tuning.
        finetune_minutes: Minutes of training on this machine instead, turned into steps once for each network.
        pretrain_steps: Steps of every pre-training.
        pretrain_minutes: Minutes of training on this machine instead, turned into steps once for each arm.
        pretrain_once: Pre-train with the first seed alone, in each fold; intervals then leave out how much pre-training
            varies.
        probe: Probe frozen features of every pre-trained arm.
        preset: Name of a published data set that DATA is; gives folds, and what the recipe does not.
        reference: Arm that the others are held against in the table; the first if not given.
        target_dice: Score of validation (Dice, or AUC of classes) to which steps are counted; the best of the reference
            if not given.
        num_bootstrap: How often patients and seeds are drawn anew for the intervals; 0 makes none.
        cache: Folder for the cache of prepared scans; OUT/cache if not given.
        accelerator: Kind of device: auto, cpu, cuda or mps.
        modality: What made the scans, such as CT or MR, where neither the data set nor a header says it.
        patient_pattern: Regular expression that finds the patient in the name of a case, such as "STS_[0-9]+".
        jobs: Processes on this machine that work on cells at the same time; 1 works in this process.
        dry_run: Print the cells and the time that they will take, and train none.
        table_only: Write the tables and the report anew from the results that are there, and run nothing.
        slurm: Write and print sbatch scripts, with one command for each cell, and run nothing.
        cell: Id of one cell to run, as a job of a cluster does.
    Raises:
        ConfigError: For a value that cannot work.
    """

    out: str
    _: KW_ONLY
    data: str | None = None
    arms: tuple[str | dict[str, Any], ...] = ()
    labels: tuple[int | str, ...] = ("100%",)
    folds: tuple[int, ...] | None = None
    num_folds: int = 5
    split_seed: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    finetune: Named | None = None
    pretrain: Named | None = None
    backbone: Named | None = None
    finetune_steps: int | None = None
    finetune_minutes: float | None = None
    pretrain_steps: int | None = None
    pretrain_minutes: float | None = None
    pretrain_once: bool = False
    probe: bool = True
    preset: str | None = None
    reference: str | None = None
    target_dice: float | None = None
    num_bootstrap: int = 2000
    cache: str | None = None
    accelerator: str = "auto"
    modality: str | None = None
    patient_pattern: str | None = None
    jobs: int = 1
    dry_run: bool = False
    table_only: bool = False
    slurm: bool = False
    cell: str | None = None

    def __post_init__(self) -> None:
        for name in ("labels", "seeds", "folds"):
            values = getattr(self, name)
            if values is not None and not values:
                raise ConfigError(f"{name} is empty; give at least one.")
            if values is not None and len(set(map(str, values))) < len(values):
                raise ConfigError(f"{name} names the same twice ({' '.join(map(str, values))}); name each once.")
        for name, numbers in (("seeds", self.seeds), ("folds", self.folds or (0,)), ("split_seed", (self.split_seed,))):
            if min(numbers) < 0:
                raise ConfigError(f"{name} has {min(numbers)}; it must be zero or more.")
        for kind in ("finetune", "pretrain"):
            steps, minutes = getattr(self, f"{kind}_steps"), getattr(self, f"{kind}_minutes")
            if steps is not None and minutes is not None:
                raise BothSetError(f"{kind}_steps ({steps})", f"{kind}_minutes ({minutes:g})")
            if steps is not None and steps < 1:
                raise ConfigError(f"{kind}_steps is {steps}; it must be at least 1.")
            if minutes is not None and not minutes > 0:
                raise ConfigError(f"{kind}_minutes is {minutes:g}; it must be above 0.")
        if self.target_dice is not None and not 0 < self.target_dice <= 1:
            raise ConfigError(f"target_dice is {self.target_dice:g}; it is a share above 0 and up to 1, such as 0.85.")
        Bootstrap(num_bootstrap=self.num_bootstrap)
        if self.jobs < 1:
            raise ConfigError(f"jobs is {self.jobs}; it must be at least 1.")
        asked = [name for name in ("dry_run", "table_only", "slurm", "cell") if getattr(self, name)]
        if len(asked) > 1:
            raise BothSetError(f"{asked[0]}", f"{asked[1]}")

    @staticmethod
    def below(given: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that lie below those given: those of the comparison in the folder, where there is one."""
        config = Path(str(given.get("out"))) / CONFIG_NAME
        if not config.is_file():
            return {}
        found = read_yaml(config)
        if found.pop("command", None) != "compare":
            raise ConfigError(f"{given.get('out')} holds no comparison, but other work; choose another --out.")
        for kind in ("finetune", "pretrain"):
            for pair in ((f"{kind}_steps", f"{kind}_minutes"), (f"{kind}_minutes", f"{kind}_steps")):
                if given.get(pair[0]) is not None:
                    found.pop(pair[1], None)
        return found

    def with_recipes(self) -> "CompareSettings":
        """These settings with the files of their recipes read, and paths that hold wherever they are read again.

        Raises:
            ConfigError: A recipe of another command, or with settings that the comparison decides.
        """
        recipes: dict[str, Any] = {
            "finetune": _recipe("finetune", self.finetune, FinetuneSettings),
            "pretrain": _recipe("pretrain", self.pretrain, PretrainSettings),
        }
        backbone = self.backbone
        for recipe in recipes.values():
            own = recipe.pop("backbone", None)
            backbone = own if backbone is None else backbone
        return replace(
            self,
            **recipes,
            data=_absolute(self.data),
            cache=_absolute(self.cache),
            arms=tuple(map(absolute_arm, self.arms)),
            backbone=backbone,
        )

    def to_config(self) -> dict[str, Any]:
        """What is compared, as the folder keeps it."""
        kept = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("out", *OF_CALL)}
        return {"command": "compare", **to_mapping(kept)}


def absolute_arm(arm: str | dict[str, Any]) -> str | dict[str, Any]:
    """An arm whose weights, where it has some, are found from any folder."""
    if isinstance(arm, dict):
        path = arm.get("weights")
        return {**arm, "weights": _absolute(path)} if isinstance(path, str) and os.path.exists(path) else arm
    names = (SCRATCH, *METHODS, *BACKBONES)
    return os.path.abspath(arm) if arm not in names and os.path.exists(arm) else arm


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(path)


def _recipe(kind: str, given: Named | None, settings: type) -> dict[str, Any]:
    """The settings of a recipe: those of its file below those that are given beside it."""
    above = {"name": given} if isinstance(given, str) else dict(given or {})
    path = above.pop("name", None)
    if path is None:
        below: dict[str, Any] = {}
    elif not isinstance(path, str) or not os.path.isfile(path):
        raise ConfigError(f"{kind} is {cut(str(path))}, which is no file; give a recipe, or settings as --{kind}.NAME.")
    else:
        below = _from_file(path, kind, above)
    known = [each.name for each in fields(settings)]
    for name in above:
        if name in _DECIDED:
            raise ConfigError(f"{kind}.{name} is for the comparison itself to decide; leave it out.")
    found: dict[str, Any] = overlay(below, above)
    for name in found:
        if name not in known:
            raise ConfigError(f"{kind} has no setting '{cut(name)}'.{nearest(name, known)}")
    return found


def _from_file(path: str, kind: str, above: Mapping[str, Any]) -> dict[str, Any]:
    content = read_yaml(path)
    command = content.pop("command", kind)
    if command != kind:
        raise ConfigError(f"{path} is a recipe of mim3d {command}, not of mim3d {kind}; give it as --{command}.")
    typed = own_code_in(above)
    for name, code in own_code_in(content).items():
        if typed.get(name) != code:
            raise ConfigError(
                f"{path} names the {name} '{code}', whose code is imported only when you name it; if you trust it, add "
                f"--{kind}.{name} {code}."
            )
    return {name: value for name, value in content.items() if name not in _DECIDED}
