"""The command that turns labels, with or without a pre-trained encoder, into a network for it."""

from typing import Literal

from mim3d.core.types import Named, Spacing
from mim3d.scans.intensity import Intensity
from mim3d.tracking import Tracking
from mim3d.training.optimisation import Optimisation
from mim3d.weights import InputLayers
from mim3d.workflows.finetune.folds import tune_folds
from mim3d.workflows.finetune.run import tune
from mim3d.workflows.shared.training import with_processes


def finetune(
    data: str,
    out: str,
    task: Named = "segmentation",
    weights: str | None = None,
    backbone: Named | None = None,
    input_layers: InputLayers = "mean",
    preset: str | None = None,
    plan: str | None = None,
    cache: str | None = None,
    spacing_mm: Spacing | None = None,
    intensity: Intensity | None = None,
    fold: int | Literal["all"] | None = 0,
    num_folds: int = 5,
    split_seed: int = 0,
    train_fraction: float = 1.0,
    train_cases: int | None = None,
    train_list: str | None = None,
    train_seed: int = 0,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    max_time: str | None = None,
    batch_size: int | None = None,
    accumulation: int = 1,
    optim: Optimisation = Optimisation(),
    precision: str = "32-true",
    tf32: bool = False,
    compile: bool = False,
    devices: int | None = None,
    num_nodes: int | None = None,
    strategy: str = "auto",
    accelerator: str = "auto",
    num_workers: int | None = None,
    read_timeout: float = 10.0,
    memory_limit: float | None = None,
    log_every: int = 10,
    validate_every: int | None = None,
    patience: int | None = None,
    checkpoint_every: int = 200,
    pictures_every: int | None = 500,
    keep_checkpoints: int = 2,
    max_bad_steps: int = 3,
    tracking: Tracking = Tracking(),
    seed: int = 0,
    strict: bool | None = None,
    resume: bool = False,
) -> str:
    """Learn a task from labelled scans, from a pre-trained encoder or from scratch.

    The weights that validate best lie in OUT/segmenter or OUT/classifier, ready for `mim3d predict --weights OUT`; the
    held-out cases are listed in OUT/held_out.csv. A run that is stopped goes on with `--resume true`.

    Args:
        data: MSD or nnU-Net raw folder, dataset.json, folder of images and labels, CSV or JSON list, or a cache.
        out: Folder of the run.
        task: What to learn; settings as --task.patch_size 96 96 96.
        weights: Pre-trained encoder: a run, an exported folder or a published checkpoint; from scratch if not given.
        backbone: Encoder, a name of list_models(); that of the weights (settings alone change it), else hybrid_base.
        input_layers: For another number of channels than the weights know: mean, repeat (in turn) or new.
        preset: Name of a published data set; gives what is not given.
        plan: Plan to use instead of a new one: a plan.yaml of a run, edited or not.
        cache: Folder for the cache of preprocessed scans; OUT/cache if not given.
        spacing_mm: Voxel size along X, Y, Z in millimetres; that of the weights if not given, else planned.
        intensity: Mapping of intensities to network input; that of the weights if not given, else planned.
        fold: Which of the folds is held out, from 0; all for each in turn; null trains on all cases.
        num_folds: Folds the patients are dealt out to; a declared split wins over folds.
        split_seed: Of how patients are dealt out to folds.
        train_fraction: Share of the training patients that is used; smaller shares are part of larger ones.
        train_cases: Number of training patients instead of a share.
        train_list: File with the ids of cases or patients to train on, one per line; held-out ones stay held out.
        train_seed: Of which patients train_fraction and train_cases take.
        max_steps: Optimiser steps; planned if neither these nor max_epochs are given.
        max_epochs: Passes over the training scans, instead of max_steps.
        max_time: Longest time of this session, HH:MM or HH:MM:SS; the run can be resumed.
        batch_size: Crops per micro-batch and device; planned if not given.
        accumulation: Micro-batches whose gradients are averaged into one step.
        optim: Optimiser; what is not given is the task's own.
        precision: 32-true, bf16-mixed or 16-mixed.
        tf32: Let a GPU round the factors of float32 products to TF32: several times as fast, 10 bits instead of 23.
        compile: Compile the blocks of the network (torch.compile); a minute at the start.
        devices: Processes, one per device, on each node; as torchrun or srun started them, or 1, if not given.
        num_nodes: Machines; as torchrun or srun started the processes, or 1, if not given.
        strategy: ddp (every process has all weights) or auto (ddp).
        accelerator: auto, cpu, cuda or mps.
        num_workers: Reading processes; none on a CPU and most cores beside a GPU if not given.
        read_timeout: Minutes that a reading process may take over a batch before the run stops; 0 waits for ever.
        memory_limit: GiB that training may use (on a GPU: of each); what is free if not given, 0 for no check.
        log_every: Steps between two lines of metrics.
        validate_every: Steps between two validations; ten in all if not given.
        patience: Validations without a better one after which training ends; all steps are done if not given.
        checkpoint_every: Steps between two checkpoints.
        pictures_every: Steps between two sets of pictures.
        keep_checkpoints: Newest checkpoints kept.
        max_bad_steps: Steps of the whole run that may go wrong: not finite, and skipped, or out of memory, and taken
            once more; a run with more of them stops.
        tracking: TensorBoard, Weights & Biases or MLflow beside metrics.jsonl.
        seed: Of weights, order and crops; never of the folds.
        strict: true refuses scans that cannot be used or were learned from, instead of warning; false goes on even
            where held-out cases of a published fold are missing.
        resume: Go on with the run in OUT, or start it.
    """
    arguments = with_processes(dict(locals()))
    return tune_folds(arguments, tune) if fold == "all" else str(tune(arguments).path)
