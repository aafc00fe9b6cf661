"""Our own weights on disk: a folder with tensors (safetensors) and a card, written and found again."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from mim3d.core.errors import CheckpointError
from mim3d.core.files import atomic_folder, write_json
from mim3d.weights.hub import fetched

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "card.json"
CARD_FORMAT = 1

#: Folders of a run that hold a network, the one to prefer first.
RUN_NETWORKS = ("encoder", "segmenter", "classifier")


def save_network(folder: Path, module: nn.Module, card: Mapping[str, Any], beside: Sequence[Path] = ()) -> None:
    """Write ``model.safetensors`` and ``card.json`` into ``folder``; an earlier export is replaced as a whole.

    Args:
        folder: Folder to write to; its parent must exist.
        module: Whose state is stored, on any device.
        card: What a reader must know to use it; ``format`` is added.
        beside: Files that belong with it; they must never be changed in place.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    with atomic_folder(folder) as new:
        save_file(state, new / WEIGHTS_NAME)
        write_json(new / CARD_NAME, {"format": CARD_FORMAT, **card})
        # safetensors writes for the owner alone, whatever the user's umask says.
        shutil.copymode(new / CARD_NAME, new / WEIGHTS_NAME)
        for path in beside:
            # A second name where the file system can, since the file may be large and exports are frequent.
            try:
                os.link(path, new / path.name)
            except OSError:
                shutil.copyfile(path, new / path.name)


def locate(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> Path:
    """The export folder or weights file behind a run folder, an export folder, a file or a Hugging Face id.

    Args:
        path: A run folder, an export folder, a file, or what :func:`mim3d.weights.hub.fetched` fetches.
        networks: Folders of a run to look for, the preferred first.
    Raises:
        CheckpointError: There is none.
    """
    given = fetched(path) or Path(path)
    if given.is_file():
        return given
    for folder in (given, *(given / name for name in networks)):
        if (folder / WEIGHTS_NAME).is_file():
            return folder
    state = "is a folder without" if given.is_dir() else "does not exist; expected"
    raise CheckpointError(
        f"{given} {state} {WEIGHTS_NAME} (its own or in {', '.join(networks)}/); "
        "give a finished run, an exported folder or a weights file."
    )


def weights_digest(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> str:
    """SHA-256 of the weights file behind a run folder, an export folder or a file.

    Raises:
        CheckpointError: There is none.
    """
    located = locate(path, networks)
    with open(located / WEIGHTS_NAME if located.is_dir() else located, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_card(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> dict[str, Any]:
    """The card beside our own weights; empty for a foreign file.

    Raises:
        CheckpointError: It cannot be read or is of a newer format.
    """
    folder = locate(path, networks)
    card_path = (folder if folder.is_dir() else folder.parent) / CARD_NAME
    if not card_path.is_file() or (folder.is_file() and folder.name != WEIGHTS_NAME):
        return {}
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{card_path} cannot be read as JSON ({error}); export the weights again.") from None
    if not isinstance(card, dict) or card.get("format") != CARD_FORMAT:
        raise CheckpointError(f"{card_path} is not a card of format {CARD_FORMAT}; export again or update mim3d.")
    return card
