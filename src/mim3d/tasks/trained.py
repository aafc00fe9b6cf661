"""A fine-tuned network as it comes back from disk, whatever its task: weights, settings, and how its input is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from mim3d.backbones import create_recipe
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import CheckpointError
from mim3d.core.settings import build_settings
from mim3d.core.types import Named
from mim3d.scans.intensity import Intensity
from mim3d.tasks import create_task
from mim3d.tasks.contract import Task
from mim3d.weights import load_into, read_card, weights_digest

Kind = TypeVar("Kind", bound=Task)
Made = TypeVar("Made", bound="Trained[Any]")


@dataclass(frozen=True, kw_only=True)
class Trained(Generic[Kind]):
    """A network with all it takes to use it.

    Attributes:
        network: the task's objective, in evaluation mode, on ``device``.
        settings: of the task it was trained for.
        labels: label value, or number of the class -> name.
        num_channels: images per scan.
        preprocessing: as in training.
        intensity: as in training.
        digest: SHA-256 of its weights.
        device: where it computes.
    """

    network: Any
    settings: Kind
    labels: dict[int, str]
    num_channels: int
    preprocessing: Preprocessing
    intensity: Intensity
    digest: str
    device: torch.device


def load_trained(
    path: str | Path,
    made: type[Made],
    kind: type[Task],
    *,
    device: torch.device | None = None,
    backbone: Named | None = None,
) -> Made:
    """Load a network with its card; nothing in its files can run code.

    Args:
        path: a run of ``mim3d finetune``, or a folder with an exported network.
        made: what to make of it.
        kind: the task it must have been trained for.
        device: where it shall compute; the CPU if not given.
        backbone: the encoder, where the card names a class that is not mim3d's own.
    Raises:
        CheckpointError: no network of this task, an unreadable card, or weights that do not fill the network.
        ConfigError: a card with names or settings that this mim3d does not know.
    """
    folders = (kind.network,)
    card = read_card(path, folders)
    if "task" not in card:
        raise CheckpointError(
            f"{path} holds no {kind.network} but an encoder; fine-tune it first (mim3d finetune --weights)."
        )
    try:
        labels = {int(value): str(name) for value, name in card["labels"].items()}
        recipe = create_recipe(backbone or card["backbone"], allow_import=backbone is not None)
        preprocessing = build_settings(Preprocessing, {"spacing_mm": card["spacing_mm"]}, "card")
        intensity = build_settings(Intensity, card["intensity"], "card intensity")
        settings = create_task(card["task"], allow_import=False)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the card of {path} is incomplete or damaged ({error!r}); export the run again."
        ) from None
    if not isinstance(settings, kind):
        raise CheckpointError(f"{path} was trained for another task than {kind.__name__.lower()}.")
    objective: Any = settings.build(recipe, labels)
    report = load_into(objective, path, networks=folders)
    if report.missing or report.mismatched:
        first = next(iter(report.mismatched or report.missing))
        raise CheckpointError(f"{path} does not fill its network ({report}; first: {first}); copy or export it again.")
    where = device or torch.device("cpu")
    return made(
        network=objective.to(where).eval(),
        settings=settings,
        labels=labels,
        num_channels=recipe.in_channels,
        preprocessing=preprocessing,
        intensity=intensity,
        digest=weights_digest(path, folders),
        device=where,
    )
