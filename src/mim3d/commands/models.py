"""``mim3d models``: what --backbone, --method and --task may name."""

from mim3d.core.command import typed
from mim3d.workflows.models import say_models


@typed
def models() -> None:
    """List the backbones with their size, the pre-training methods and the tasks.

    Each is a name for --backbone, --method or --task; `mim3d finetune --backbone NAME --help` lists its settings.
    """
    say_models()
