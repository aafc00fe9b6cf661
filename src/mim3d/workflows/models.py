"""What is there to choose from: backbones with their size, methods and tasks, as `mim3d models` lists them."""

import torch

from mim3d.backbones import BACKBONES
from mim3d.core.errors import ConfigError
from mim3d.core.progress import say
from mim3d.core.settings import find_named, resolve
from mim3d.methods import METHODS
from mim3d.tasks import TASKS

#: Columns of the list of backbones; widths and depths are those of the stages.
HEAD = ("name", "parameters", "widths", "depths", "tokens")


def say_models() -> None:
    """Print the lists; no weight is made."""
    rows = [HEAD, *(_size(name) for name in BACKBONES)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    say("backbones (--backbone NAME), each an encoder of one channel:")
    for row in rows:
        name, parameters, *others = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        say(f"  {name}  {parameters.strip():>{widths[1]}}  {'  '.join(others)}".rstrip())
    for title, registry in (("methods (pretrain --method NAME)", METHODS), ("tasks (finetune --task NAME)", TASKS)):
        say(f"{title}:")
        longest = max(map(len, registry))
        for name in registry:
            say(f"  {name:<{longest}}  {_first_line(find_named(name, registry, title))}")


def _size(name: str) -> tuple[str, ...]:
    """Row of a backbone: parameters of its encoder in millions, channels and blocks per stage, voxels of a token."""
    recipe = resolve(name, BACKBONES, "backbone")
    stages = [" ".join(map(str, getattr(recipe, key, ()))) for key in ("widths", "depths")]
    token = " x ".join(map(str, recipe.token_size))
    try:
        recipe.check_machine()
    except ConfigError as error:
        return name, "-", *stages, f"{token}; {error}"
    # On this device tensors have a shape alone.
    with torch.device("meta"):
        encoder = recipe.build()
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    return name, f"{millions:.3g} M", *stages, token


def _first_line(found: object) -> str:
    return (found.__doc__ or "").strip().splitlines()[0]
