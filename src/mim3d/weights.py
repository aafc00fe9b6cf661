"""Weights on disk: our own export (safetensors and a card), foreign checkpoints in, and what of them fitted."""

import argparse
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mim3d.backbones import create_recipe
from mim3d.backbones.base import Encoder
from mim3d.errors import CheckpointError
from mim3d.nn.positions import sincos_positions

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "card.json"
CARD_FORMAT = 1

#: Folders of a run that hold a network, the one to prefer first.
RUN_NETWORKS = ("encoder", "segmenter", "classifier")

#: Keys under which foreign files hold their weights, in the order they are unwrapped.
WRAPPERS = ("model", "state_dict", "network_weights", "net", "teacher", "student")

#: Prefixes that wrappers of training frameworks leave on every key.
PREFIXES = ("module.", "_orig_mod.", "backbone.")

#: Share of an encoder's values that a file must fill before it counts as loaded.
MIN_COVERAGE = 0.9

#: What becomes of the layers that read the input where the number of channels differs, see :func:`adapt_input`.
InputLayers = Literal["mean", "repeat", "new"]


@dataclass(frozen=True)
class CoverageReport:
    """How a file's tensors met a module's.

    Attributes:
        matched: keys of the module that were filled.
        missing: keys of the module that the file lacks.
        mismatched: keys whose shapes differ, with both shapes.
        left_over: keys of the file that the module has no place for.
        coverage: filled share of the module's values, 0 to 1.
        adapted: keys among the matched whose tensors were made to fit another number of input channels.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    left_over: tuple[str, ...]
    coverage: float
    adapted: tuple[str, ...] = ()

    def __str__(self) -> str:
        adapted = f", {len(self.adapted)} of them adapted to the input's channels" if self.adapted else ""
        return (
            f"{len(self.matched)} tensors matched ({self.coverage:.1%} of the values{adapted}), "
            f"{len(self.missing)} missing, {len(self.mismatched)} of another shape, {len(self.left_over)} left over"
        )


def save_network(folder: Path, module: nn.Module, card: Mapping[str, Any], beside: Sequence[Path] = ()) -> None:
    """Write ``model.safetensors`` and ``card.json`` into ``folder``; an earlier export is replaced as a whole.

    Args:
        folder: where to; its parent must exist.
        module: whose state is stored, on any device.
        card: what a reader must know to use it; ``format`` is added.
        beside: files that belong with it; they must never be changed in place.
    """
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(
        {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()},
        new / WEIGHTS_NAME,
    )
    text = json.dumps({"format": CARD_FORMAT, **card}, indent=2)
    (new / CARD_NAME).write_text(text + "\n", encoding="utf-8")
    for path in beside:
        _lay(path, new / path.name)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _lay(path: Path, target: Path) -> None:
    """A second name for a file where the file system can, since it may be large and exports are frequent."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def locate(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> Path:
    """The export folder or weights file behind a run folder, an export folder or a file.

    Args:
        path: a run folder, an export folder or a file.
        networks: folders of a run to look for, the preferred first.
    Raises:
        CheckpointError: when there is none.
    """
    given = Path(path)
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
        CheckpointError: when there is none.
    """
    located = locate(path, networks)
    with open(located / WEIGHTS_NAME if located.is_dir() else located, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_card(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> dict[str, Any]:
    """The card beside our own weights; empty for a foreign file.

    Raises:
        CheckpointError: when it cannot be read or is of a newer format.
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


def read_state(path: str | Path, networks: tuple[str, ...] = RUN_NETWORKS) -> dict[str, Tensor]:
    """All tensors of a weights file by name, unwrapped and without framework prefixes; never runs code from the file.

    Raises:
        CheckpointError: when the file is damaged, holds no tensors, or would need arbitrary unpickling.
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
    return _unwrap(_read_torch(file), file)


def _read_torch(file: Path) -> Any:
    try:
        # Some published files carry their command line beside the weights: a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read as plain weights ({reason}); "
            "it is damaged, no torch file, or holds code that mim3d does not run."
        ) from None


def _unwrap(content: Any, file: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    state = (
        {key: value for key, value in content.items() if isinstance(value, Tensor)} if isinstance(content, dict) else {}
    )
    if not state:
        raise CheckpointError(f"{file} holds no tensors by name, at the top or under {', '.join(WRAPPERS)}.")
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def to_own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name the tensors of a published MiM checkpoint as ours: ``encoder.*``, ``decoder.*``; others stay as they are.

    Raises:
        CheckpointError: when its position embeddings are not the fixed ones that mim3d computes.
    """
    if "patch_embed1.proj.weight" not in state or "pos_embed" not in state:
        return dict(state)
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in ("pos_embed", "decoder_pos_embed"):
            _check_positions(key, value)
        elif key == "mask_token":
            named["decoder.mask_token"] = value
        elif key.startswith("decoder_"):
            named[f"decoder.{key.removeprefix('decoder_')}"] = value
        elif key.startswith("aggregate_"):
            named[key] = value
        else:
            named[f"encoder.{key}"] = value
    return named


def _check_positions(key: str, value: Tensor) -> None:
    edge = round(value.shape[1] ** (1 / 3))
    if not torch.allclose(value[0].float(), sincos_positions((edge, edge, edge), value.shape[2]), atol=1e-4):
        raise CheckpointError(
            f"{key} of the file is not the fixed sine-cosine embedding of a {edge}x{edge}x{edge} grid."
        )


def load_into(
    module: nn.Module,
    path: str | Path,
    *,
    networks: tuple[str, ...] = RUN_NETWORKS,
    input_layers: InputLayers = "new",
) -> CoverageReport:
    """Fill a module with the tensors of a file that fit, and say which did.

    Args:
        module: an encoder, or a network with an ``encoder``.
        path: a run folder, an export folder, or a weights file (safetensors or torch).
        networks: folders of a run to look for, the preferred first.
        input_layers: how the layers of an encoder that read the input are made to fit another number of channels.
    Raises:
        CheckpointError: when less than ``MIN_COVERAGE`` of the encoder's values (or of the module's, without an
            encoder) would be filled; nothing is changed then.
    """
    state = to_own_names(read_state(path, networks))
    target = module.state_dict()
    inside_encoder = isinstance(module, Encoder)
    if inside_encoder and any(key.startswith("encoder.") for key in state):
        state = {key.removeprefix("encoder."): value for key, value in state.items()}
    elif not inside_encoder and not any(key.startswith("encoder.") for key in state):
        state = {f"encoder.{key}": value for key, value in state.items()}
    state, adapted = adapt_input(module, state, input_layers)
    fits = {key: value for key, value in state.items() if key in target and target[key].shape == value.shape}
    report = replace(_coverage(target, state, fits), adapted=adapted)
    judged = {key for key in target if inside_encoder or key.startswith("encoder.")} or set(target)
    filled = sum(target[key].numel() for key in judged & fits.keys())
    share = filled / max(1, sum(target[key].numel() for key in judged))
    if share < MIN_COVERAGE:
        example = next(iter(report.mismatched or report.missing), "none")
        raise CheckpointError(
            f"{path} fills only {share:.1%} of the encoder ({report}; first: {example}); "
            "it belongs to another backbone or settings."
        )
    module.load_state_dict(fits, strict=False)
    return report


def adapt_input(
    module: nn.Module, state: Mapping[str, Tensor], how: InputLayers
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors with those that read the input made to fit the module's channels, and their names.

    Both ways scale by the channels of the file over those of the module, so that what such a layer gives stays about as
    large: exactly, with "mean", where all channels look alike.

    Args:
        module: an encoder, or a network with an ``encoder``.
        state: tensors by the names of the module.
        how: "mean", every channel gets the mean over the channels of the file; "repeat", theirs in turn; "new", none is
            changed, so that these layers start anew.
    """
    encoder = module if isinstance(module, Encoder) else getattr(module, "encoder", None)
    if how == "new" or not isinstance(encoder, Encoder):
        return dict(state), ()
    target, wanted = module.state_dict(), encoder.recipe.in_channels
    adapted = {}
    for key, value in state.items():
        if key in target and _differs_in_channels(value, target[key], wanted):
            given = value.shape[1]
            places = torch.arange(wanted) % given
            taken = value.mean(1, keepdim=True).expand_as(target[key]) if how == "mean" else value[:, places]
            adapted[key] = (taken * (given / wanted)).contiguous()
    return {**state, **adapted}, tuple(sorted(adapted))


def _differs_in_channels(value: Tensor, own: Tensor, in_channels: int) -> bool:
    """Whether a convolution's weight ``(D, C, ...)`` has another ``C`` than the input, and no other difference."""
    others = (value.shape[:1] + value.shape[2:], own.shape[:1] + own.shape[2:])
    return value.ndim > 2 and others[0] == others[1] and value.shape[1] != own.shape[1] == in_channels


def _coverage(target: Mapping[str, Tensor], state: Mapping[str, Tensor], fits: Mapping[str, Tensor]) -> CoverageReport:
    total = sum(value.numel() for value in target.values())
    mismatched = sorted(key for key in state if key in target and key not in fits)
    return CoverageReport(
        matched=tuple(sorted(fits)),
        missing=tuple(sorted(key for key in target if key not in state)),
        mismatched=tuple(f"{key}: {tuple(state[key].shape)} for {tuple(target[key].shape)}" for key in mismatched),
        left_over=tuple(sorted(key for key in state if key not in target)),
        coverage=sum(value.numel() for value in fits.values()) / max(1, total),
    )


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of a run, an export folder or a published MiM checkpoint, ready to use.

    Raises:
        CheckpointError: when the file is unreadable, or no recipe can be read from its card or its shapes.
    """
    card = read_card(path)
    named = card["backbone"] if card else _hybrid_recipe(to_own_names(read_state(path)), path)
    recipe = create_recipe(named, allow_import=False)
    encoder = recipe.build()
    load_into(encoder, path)
    return encoder.eval()


def _hybrid_recipe(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Any]:
    """The recipe of a published MiM encoder, read from its shapes; its heads are 32 wide."""
    widths: list[int] = []
    depths: list[int] = []
    while (weight := state.get(f"encoder.patch_embed{len(widths) + 1}.proj.weight")) is not None:
        widths.append(weight.shape[0])
        prefix = f"encoder.blocks{len(widths)}."
        depths.append(len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}))
    if not widths:
        raise CheckpointError(
            f"{path} has no card and is no published MiM checkpoint; the encoder it belongs to is unknown."
        )
    in_channels = state["encoder.patch_embed1.proj.weight"].shape[1]
    heads = widths[-1] // 32
    return {
        "name": "hybrid",
        "widths": widths,
        "depths": depths,
        "num_heads": heads,
        "in_channels": in_channels,
    }
