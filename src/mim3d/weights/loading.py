"""Weights into modules, with a report of what fitted; encoders ready to use."""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mim3d.backbones import BACKBONES, Backbone, Encoder, create_recipe
from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.core.names import cut
from mim3d.core.own_code import is_dotted_path
from mim3d.core.settings import find_named, update_settings
from mim3d.core.types import Named
from mim3d.weights.cards import card_settings, read_card, require_described
from mim3d.weights.folders import RUN_NETWORKS
from mim3d.weights.states import read_state, to_own_names

#: Share of an encoder's values that a file must fill before it counts as loaded.
MIN_COVERAGE = 0.9

#: What becomes of the layers that read the input where the number of channels differs, see :func:`adapt_input`.
InputLayers = Literal["mean", "repeat", "new"]


@dataclass(frozen=True)
class CoverageReport:
    """How a file's tensors met a module's.

    Attributes:
        matched: Keys of the module that were filled.
        missing: Keys of the module that the file lacks.
        mismatched: Keys whose shapes differ, with both shapes.
        left_over: Keys of the file that the module has no place for.
        coverage: Filled share of the module's values, 0 to 1.
        adapted: Keys among the matched whose tensors were made to fit another number of input channels.
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


def load_into(
    module: nn.Module,
    path: str | Path,
    *,
    networks: tuple[str, ...] = RUN_NETWORKS,
    input_layers: InputLayers = "new",
) -> CoverageReport:
    """Fill a module with the tensors of a file that fit, and say which did.

    Args:
        module: An encoder, or a network with an ``encoder``.
        path: A run folder, an export folder, or a weights file (safetensors or torch).
        networks: Folders of a run to look for, the preferred first.
        input_layers: How the layers of an encoder that read the input are made to fit another number of channels.
    Raises:
        CheckpointError: Less than ``MIN_COVERAGE`` of the encoder's values (or of the module's, without an
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

    def num_values(keys: Set[str]) -> int:
        return sum(target[key].numel() for key in keys)

    report = CoverageReport(
        matched=tuple(sorted(fits)),
        missing=tuple(sorted(target.keys() - state.keys())),
        mismatched=tuple(
            f"{key}: {tuple(state[key].shape)} for {tuple(target[key].shape)}"
            for key in sorted(state.keys() & target.keys() - fits.keys())
        ),
        left_over=tuple(sorted(state.keys() - target.keys())),
        coverage=num_values(fits.keys()) / max(1, num_values(target.keys())),
        adapted=adapted,
    )
    judged = {key for key in target if inside_encoder or key.startswith("encoder.")} or set(target)
    share = num_values(judged & fits.keys()) / max(1, num_values(judged))
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
        module: An encoder, or a network with an ``encoder``.
        state: Tensors by the names of the module.
        how: "mean", every channel gets the mean over the channels of the file; "repeat", theirs in turn; "new", none is
            changed, so that these layers start anew.
    """
    encoder = module if isinstance(module, Encoder) else getattr(module, "encoder", None)
    if how == "new" or not isinstance(encoder, Encoder):
        return dict(state), ()
    target, wanted = module.state_dict(), encoder.recipe.in_channels
    adapted = {}
    for key in state.keys() & target.keys():
        value, own = state[key], target[key]
        # A convolution's weight ``(D, C, ...)`` that differs in nothing but C, which is the number of input channels.
        others_agree = value.ndim > 2 and value.shape[:1] + value.shape[2:] == own.shape[:1] + own.shape[2:]
        if others_agree and value.shape[1] != own.shape[1] == wanted:
            given = value.shape[1]
            places = torch.arange(wanted) % given
            taken = value.mean(1, keepdim=True).expand_as(own) if how == "mean" else value[:, places]
            adapted[key] = (taken * (given / wanted)).contiguous()
    return {**state, **adapted}, tuple(sorted(adapted))


def load_encoder(path: str | Path, backbone: Named | None = None) -> Encoder:
    """Load the encoder of a run, an export folder, a Hugging Face id or a published MiM checkpoint, ready to use.

    Args:
        path: A run, an export folder or a weights file; ``owner/name`` that is no local path, or
            ``hf://owner/name@revision``, is fetched from Hugging Face (extra ``hub``).
        backbone: Name of the backbone, where the card names one that is not mim3d's own; its code is imported.

    Raises:
        CheckpointError: The file is unreadable, or no recipe can be read from its card or its shapes.
        ConfigError: The card names a backbone that is not mim3d's own, and none is given.
    """
    card = read_card(path)
    if card:
        recipe = recipe_of_card(card, path, backbone)
    else:
        recipe = create_recipe(_hybrid_recipe(to_own_names(read_state(path)), path))
    encoder = recipe.build()
    load_into(encoder, path)
    return encoder.eval()


def recipe_of_card(card: Mapping[str, Any], path: str | Path, backbone: Named | None = None) -> Backbone:
    """Create the settings of the encoder that a card describes.

    Args:
        card: A card.
        path: Where it was read, for messages.
        backbone: The backbone as the user named it, or changes to its settings. Where it has the name of the card, all
            else is the card's.

    Raises:
        ConfigError: The card names a backbone that is not mim3d's own, and the user named none.
        CheckpointError: The card holds settings that cannot be, or describes another network than its file holds.
    """
    saved = dict(card["backbone"])
    changes = {"name": backbone} if isinstance(backbone, str) else dict(backbone or {})
    name = changes.pop("name", None)
    if name is None and saved["name"] not in BACKBONES:
        if not is_dotted_path(saved["name"]):
            raise CheckpointError(
                f"{path} has an encoder of the backbone {cut(repr(saved['name']))}, which mim3d does not know."
            )
        raise ConfigError(
            f"{path} has an encoder of the backbone '{saved['name']}', which is none of mim3d's own and is imported "
            f"only when you name it; if you trust its code, use --backbone {saved['name']}."
        )
    if name not in (None, saved["name"]):
        return create_recipe({"name": name, **changes})
    if name is not None:
        # Whether it can be imported is the user's matter, what stands in the card is not.
        find_named(name, BACKBONES, "backbone")
    with card_settings(path):
        own = create_recipe(saved, allow_import=name is not None)
    if saved["name"] in BACKBONES:
        require_described(own.build, path)
    return update_settings(own, changes, "backbone of the weights")


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
    heads = max(1, widths[-1] // 32)
    return {"name": "hybrid", "widths": widths, "depths": depths, "num_heads": heads, "in_channels": in_channels}
