"""The command that turns unlabelled scans into an encoder."""

from mim3d.core.command import command
from mim3d.workflows.pretrain import PretrainSettings, run_pretraining


@command(PretrainSettings)
def pretrain(settings: PretrainSettings) -> str:
    """Pre-train an encoder on unlabelled scans.

    Labels in the data are never read. The encoder lies in OUT/encoder with its card, ready for `mim3d finetune
    --weights OUT`; a run that is stopped goes on with `--resume true`.
    """
    return run_pretraining(settings)
