"""Our own weights: a folder with tensors (safetensors) and a card, written, and found again here or on Hugging Face."""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors.torch import save_file
from torch import nn

from mim3d.core.errors import CheckpointError
from mim3d.core.files import REMEDY, atomic_folder, write_json
from mim3d.datasets.mistaken import not_checkpoints, not_weights
from mim3d.weights.plain import INDEX_NAME, TORCH_INDEX_NAME, parts_of

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "card.json"
CARD_FORMAT = 1

#: Entry of a safetensors file's metadata that holds the card.
CARD_ENTRY = "mim3d_card"

#: Endings of files of weights.
_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz")

#: Folders of a run that hold a network, the one to prefer first.
RUN_NETWORKS = ("encoder", "segmenter", "classifier")

#: Files of a repository that are fetched; ``config.json`` is what Hugging Face counts downloads by.
WANTED = (WEIGHTS_NAME, INDEX_NAME, "model-*-of-*.safetensors", "card.json", "config.json", "seen.json")

#: ``owner/name`` or ``hf://owner/name``, either with ``@revision``. A path object makes one slash of two.
_ID = re.compile(r"(?P<scheme>hf:/{1,2})?(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")


def save_network(
    folder: Path,
    module: nn.Module,
    card: Mapping[str, Any],
    beside: Sequence[Path] = (),
    *,
    remedy: str | None = REMEDY,
) -> None:
    """Write ``model.safetensors`` and ``card.json`` into ``folder``; an earlier export is replaced as a whole.

    Args:
        folder: Folder to write to; its parent must exist.
        module: Whose state is stored, on any device.
        card: What a reader must know to use it; ``format`` is added.
        beside: Files that belong with it; they must never be changed in place.
        remedy: End of the sentence about a disk that fails. None passes the error on as it is.

    Raises:
        DataError: The folder cannot be written to, or the disk is full. Nothing was changed.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    with atomic_folder(folder, remedy=remedy) as new:
        write_json(new / CARD_NAME, {"format": CARD_FORMAT, **card})
        # Within the file as well, so that it still says what it is where somebody copies it alone.
        save_file(state, new / WEIGHTS_NAME, metadata={CARD_ENTRY: (new / CARD_NAME).read_text(encoding="utf-8")})
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
        path: A run folder, an export folder, a file, or what :func:`fetched` fetches.
        networks: Folders of a run to look for, the preferred first.
    Raises:
        CheckpointError: There is none.
    """
    given, for_task = fetched(path) or Path(path), "encoder" not in networks
    if (checkpoints := not_checkpoints(str(given), for_task=for_task)) is not None:
        raise CheckpointError(checkpoints)
    if given.is_file():
        return given
    for folder in (given, *(given / name for name in networks)):
        if any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME, TORCH_INDEX_NAME)):
            return folder
    if others := _other_weights(given):
        index = TORCH_INDEX_NAME if all(other.suffix == ".bin" for other in others) else INDEX_NAME
        several = f"{len(others)} files of weights; where they are pieces of one network, add their {index}, or"
        raise CheckpointError(
            f"{given} holds no {WEIGHTS_NAME}, but {several if len(others) > 1 else 'another file of weights;'} give "
            f"the file itself: {others[0]}."
        )
    mistaken = not_weights(str(path), for_task=for_task) if given.is_dir() else None
    if mistaken is not None:
        raise CheckpointError(mistaken)
    state = "is a folder without" if given.is_dir() else "does not exist; expected"
    raise CheckpointError(
        f"{given} {state} {WEIGHTS_NAME} (its own or in {', '.join(networks)}/); "
        "give a finished run, an exported folder or a weights file."
    )


def _other_weights(folder: Path) -> list[Path]:
    """Files of weights in a folder that are not ours, as of a published model."""
    with suppress(OSError):
        return sorted(path for path in folder.iterdir() if path.suffix in _ENDINGS and path.is_file())
    return []


def weights_file(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> Path:
    """The file of weights behind a run folder, an export folder, a file or the id of a repository.

    For a network in several files it is their index.

    Raises:
        CheckpointError: There is none.
    """
    located = locate(path, networks)
    if not located.is_dir():
        return located
    names = (WEIGHTS_NAME, INDEX_NAME, TORCH_INDEX_NAME)
    return located / next((name for name in names if (located / name).is_file()), INDEX_NAME)


def weights_digest(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> str:
    """SHA-256 of the weights file behind a run folder, an export folder or a file; of several, one after the other.

    Raises:
        CheckpointError: There is none.
    """
    file = weights_file(path, networks)
    digest = hashlib.sha256()
    # An index holds names and a size, which other weights may have too.
    for part in parts_of(file):
        with open(part, "rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def is_hub_id(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a repository of Hugging Face.

    ``hf://owner/name`` always does; ``owner/name`` where there is neither such a path nor a folder ``owner`` here, so
    that a mistyped path among one's own folders is never looked up elsewhere.
    """
    text = os.fspath(path)
    match = _ID.fullmatch(text)
    if match is None:
        return False
    return match["scheme"] is not None or not (os.path.lexists(text) or os.path.lexists(text.split("/")[0]))


def full_path(path: str | os.PathLike[str]) -> str:
    """A path so that it means the same in another folder: absolute, or the id of a repository as it is."""
    return os.fspath(path) if is_hub_id(path) else os.path.abspath(path)


def fetched(path: str | os.PathLike[str]) -> Path | None:
    """The local copy of a repository's weights, card and list of scans; None for a path that names no repository.

    A repository is looked up once per process, so that card and weights are of one revision.

    Raises:
        CheckpointError: The package huggingface_hub is not there, or the repository cannot be fetched.
    """
    match = _ID.fullmatch(os.fspath(path))
    if match is None or not is_hub_id(path):
        return None
    return _snapshot(match["repository"], match["revision"])


@cache
def _snapshot(repository: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{repository} is no path here, and to fetch it from Hugging Face needs the package huggingface_hub; "
            "correct the path, or install it with: pip install 'mim3d[hub]'."
        ) from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(WANTED)))
    # Its errors share no root: HTTP, validation, offline mode and the network's own all come as they are.
    except Exception as error:
        reason = shorten(str(error) or type(error).__name__, 120, placeholder=" ...")
        raise CheckpointError(
            f"{repository} is no path here, and could not be fetched from Hugging Face ({reason}); check the name, the "
            "revision, the network and, for a private repository, that you are logged in (hf auth login)."
        ) from None
