"""The command that turns labels, with or without a pre-trained encoder, into a network for them."""

from mim3d.core.command import command
from mim3d.workflows.finetune.folds import finetune_folds
from mim3d.workflows.finetune.run import finetune_once
from mim3d.workflows.finetune.settings import FinetuneSettings


@command(FinetuneSettings)
def finetune(settings: FinetuneSettings) -> str:
    """Learn a task from labelled scans, from a pre-trained encoder or from scratch.

    The weights that validate best lie in OUT/segmenter or OUT/classifier, ready for `mim3d predict --weights OUT`; the
    held-out cases are listed in OUT/held_out.csv. A run that is stopped goes on with `--resume true`.
    """
    settings = settings.on_processes()
    return finetune_folds(settings) if settings.fold == "all" else str(finetune_once(settings).path)
