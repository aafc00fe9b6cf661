"""Tensors by name out of weights files, our own and foreign ones; nothing in a file can run code."""

import argparse
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mim3d.core.errors import CheckpointError
from mim3d.nn.tokens import sincos_positions
from mim3d.weights.folders import RUN_NETWORKS, WEIGHTS_NAME, locate

#: Keys under which foreign files hold their weights, in the order they are unwrapped.
WRAPPERS = ("model", "state_dict", "network_weights", "net", "teacher", "student")

#: Prefixes that wrappers of training frameworks leave on every key.
PREFIXES = ("module.", "_orig_mod.", "backbone.")


def read_state(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> dict[str, Tensor]:
    """All tensors of a weights file by name, unwrapped and without framework prefixes; never runs code from the file.

    Raises:
        CheckpointError: The file is damaged, holds no tensors, or would need arbitrary unpickling.
    """
    located = locate(path, networks)
    file = located / WEIGHTS_NAME if located.is_dir() else located
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is no readable safetensors file ({error}); copy or export it again."
            ) from None
    try:
        # Some published files carry their command line beside the weights: a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files of before torch 1.6 are no zip archives, which alone can be mapped into memory.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # On bytes that are no pickle it depends on the bytes what torch raises.
        # Before its own reason torch advises to let the file run code.
        said = str(error).rpartition("WeightsUnpickler error:")[2]
        lines = [line.strip() for line in said.splitlines() if line.strip() and "weights_only" not in line]
        reason = lines[0] if lines else type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read as plain weights ({reason}); "
            "it is damaged, no torch file, or holds code that mim3d does not run."
        ) from None
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    items = content.items() if isinstance(content, dict) else ()
    state = {key: value for key, value in items if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{file} holds no tensors by name, at the top or under {', '.join(WRAPPERS)}.")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def to_own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of a published MiM checkpoint as ours: ``encoder.*``, ``decoder.*``; others stay as they are.

    Raises:
        CheckpointError: Its position embeddings are not the fixed ones that mim3d computes.
    """
    if "patch_embed1.proj.weight" not in state or "pos_embed" not in state:
        return dict(state)
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in ("pos_embed", "decoder_pos_embed"):
            edge = round(value.shape[1] ** (1 / 3))
            if not torch.allclose(value[0].float(), sincos_positions((edge, edge, edge), value.shape[2]), atol=1e-4):
                raise CheckpointError(
                    f"{key} of the file is not the fixed sine-cosine embedding of a {edge}x{edge}x{edge} grid."
                )
        elif key == "mask_token":
            named["decoder.mask_token"] = value
        elif key.startswith("decoder_"):
            named[f"decoder.{key.removeprefix('decoder_')}"] = value
        elif key.startswith("aggregate_"):
            named[key] = value
        else:
            named[f"encoder.{key}"] = value
    return named
