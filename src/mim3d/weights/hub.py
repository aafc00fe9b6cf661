"""Weights from Hugging Face: ids of repositories, and the few files of them that are wanted."""

import os
import re
from functools import cache
from pathlib import Path
from textwrap import shorten

from mim3d.core.errors import CheckpointError

#: Files of a repository that are fetched; ``config.json`` is what Hugging Face counts downloads by.
WANTED = ("model.safetensors", "card.json", "config.json", "seen.json")

#: ``owner/name`` or ``hf://owner/name``, either with ``@revision``. A path object makes one slash of two.
_ID = re.compile(r"(?P<scheme>hf:/{1,2})?(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")


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
