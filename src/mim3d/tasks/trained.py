"""Trained networks as they come back from disk, whatever their task: weights, settings, and how their input is made."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.core.names import cut
from mim3d.core.own_code import is_dotted_path
from mim3d.core.settings import build_settings
from mim3d.core.types import Named
from mim3d.inference.input_range import InputRange
from mim3d.scans.intensity import Intensity
from mim3d.tasks import TASKS, create_task, find_task
from mim3d.tasks.contract import TrainedNetwork
from mim3d.weights import (
    card_settings,
    load_into,
    locate,
    read_card,
    recipe_of_card,
    require_described,
    weights_digest,
)

#: Folders of a run that hold a network of one of mim3d's own tasks.
TASK_NETWORKS = ("segmenter", "classifier")


def load_trained(
    path: str | Path,
    *,
    task: str | None = None,
    networks: tuple[str, ...] = TASK_NETWORKS,
    backbone: Named | None = None,
    device: torch.device | None = None,
) -> TrainedNetwork:
    """Load a trained network by its card. Nothing in its files can run code.

    Args:
        path: A run of `mim3d finetune`, an exported folder, or a Hugging Face id.
        task: Name or dotted path of the task, where the card names one that is not mim3d's own. It is imported since
            the user named it; its settings are those of the card.
        networks: Folders of a run to look for, where ``task`` does not say which.
        backbone: The encoder, where the card names a class that is not mim3d's own.
        device: Where the network computes; the CPU if not given.

    Raises:
        CheckpointError: There is no network of a task, its card is damaged, or its weights do not fill it.
        ConfigError: The card has names or settings that this mim3d does not know.
    """
    folders = networks if task is None else (find_task(task).network,)
    card = read_card(path, folders)
    if "task" not in card:
        raise CheckpointError(
            f"{path} holds no {' or '.join(folders)} but an encoder; fine-tune it first (mim3d finetune --weights)."
        )
    located = locate(path, folders)
    recipe, named = recipe_of_card(card, located, backbone), _task_of_card(card, path, task)
    with card_settings(located):
        labels = {int(value): str(name) for value, name in card["labels"].items()}
        preprocessing = build_settings(Preprocessing, {"spacing_mm": card["spacing_mm"]}, "card")
        intensity = build_settings(Intensity, card["intensity"], "intensity")
        known = card.get("input_range")
        input_range = None if known is None else build_settings(InputRange, known, "input_range")
        settings = create_task(named, allow_import=task is not None).checked(recipe)
        # Raises where settings that training fills in are missing.
        settings.sampler()
        if type(recipe).__module__.startswith("mim3d.") and type(settings).__module__.startswith("mim3d."):
            require_described(partial(settings.build, recipe, labels), located)
        module = settings.build(recipe, labels)
    with warnings.catch_warnings():
        # What would be warned of is refused below.
        warnings.simplefilter("ignore", UserWarning)
        report = load_into(module, path, networks=folders)
    if report.missing or report.mismatched:
        first = next(iter(report.mismatched or report.missing))
        raise CheckpointError(f"{path} does not fill its network ({report}; first: {first}); copy or export it again.")
    where = device or torch.device("cpu")
    return TrainedNetwork(
        path=str(path),
        card=card,
        module=module.to(where).eval(),
        task=settings,
        labels=labels,
        num_channels=recipe.in_channels,
        preprocessing=preprocessing,
        intensity=intensity,
        digest=weights_digest(path, folders),
        device=where,
        input_range=input_range,
    )


def _task_of_card(card: Mapping[str, Any], path: str | Path, task: str | None) -> dict[str, Any]:
    """What a card says of its task, of the class that the user named where that is given."""
    name = str(card["task"]["name"])
    if task is None and name not in TASKS:
        if not is_dotted_path(name):
            raise CheckpointError(f"{path} was trained for the task {cut(repr(name))}, which mim3d does not know.")
        raise ConfigError(
            f"{path} was trained for the task '{name}', which is none of mim3d's own and is imported only when you "
            f"name it; if you trust its code, use --task {name}."
        )
    if task is not None and name in TASKS and not issubclass(find_task(task), find_task(name)):
        raise CheckpointError(f"{path} was trained for another task ({name}) than {task}.")
    return {**find_task(task or name).former, **card["task"], "name": task or name}


def load_ensemble(
    paths: Sequence[str], *, task: str | None = None, backbone: Named | None = None, device: torch.device | None = None
) -> list[TrainedNetwork]:
    """Load one network, or several that are an ensemble, see :func:`load_trained`.

    Raises:
        ConfigError: There is no path.
        CheckpointError: A network is of another task than the first.
    """
    if not paths:
        raise ConfigError("--weights is empty; name a run of mim3d finetune, or several for an ensemble.")
    networks = [load_trained(path, task=task, backbone=backbone, device=device) for path in paths]
    first = type(networks[0].task)
    for network in networks[1:]:
        if type(network.task) is not first:
            raise CheckpointError(
                f"{network.path} was trained for another task ({type(network.task).__name__}) than {paths[0]} "
                f"({first.__name__}); name networks of one task."
            )
    return networks


def require_alike(networks: Sequence[TrainedNetwork], shared: Callable[[TrainedNetwork], Mapping[str, object]]) -> None:
    """Refuse networks whose probabilities cannot be averaged.

    Args:
        networks: The networks.
        shared: Gives what all of them must have in common, by a name for messages.

    Raises:
        ConfigError: The sentence names the first network that differs, and in what.
    """
    wanted = shared(networks[0])
    for network in networks[1:]:
        for what, theirs in shared(network).items():
            if theirs != wanted[what]:
                raise ConfigError(
                    f"{network.path} has other {what} ({theirs}) than {networks[0].path} ({wanted[what]}), so that "
                    "their probabilities cannot be averaged; name runs that differ in fold or seed alone."
                )
