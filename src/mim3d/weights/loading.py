"""Weights into modules, with a report of what fitted; encoders ready to use."""

import warnings
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mim3d.backbones import BACKBONES, Backbone, Encoder, create_recipe
from mim3d.core.errors import CheckpointError, ConfigError, listed
from mim3d.core.names import cut, number_of, verb_of
from mim3d.core.own_code import is_dotted_path
from mim3d.core.progress import say
from mim3d.core.settings import find_named, update_settings
from mim3d.core.types import Named
from mim3d.core.warned import WeightsWarning
from mim3d.weights.cards import card_settings, require_described
from mim3d.weights.families import RecognisedWeights, unknown_layout
from mim3d.weights.families.mim import alike
from mim3d.weights.folders import RUN_NETWORKS
from mim3d.weights.opened import OpenedWeights
from mim3d.weights.states import HeldWeights, oddity, unlearned, without_prefix_of

#: Share of an encoder's values that a file must fill before it counts as loaded.
MIN_COVERAGE = 0.9

#: Settings of a backbone that change nothing of what it computes with given weights.
_OF_TRAINING = ("recompute", "drop_path", "in_channels", "layer_scale")

#: Settings that tensors may not show, in words.
_HIDDEN = {
    "num_heads": "the number of attention heads",
    "positions": "the positions of tokens (no pos_embed is there)",
}

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
            f"{number_of(len(self.matched), 'tensor')} matched ({self.coverage:.1%} of the values{adapted}), "
            f"{len(self.missing)} missing, {len(self.mismatched)} of another shape, {len(self.left_over)} left over"
        )


def require_share(min_coverage: float) -> None:
    """Refuse a share of the encoder to be filled that is none.

    Raises:
        ConfigError: It does not lie between 0 and 1.
    """
    if not 0 <= min_coverage <= 1:
        raise ConfigError(f"min_coverage is {min_coverage:g}; it must lie between 0 and 1, such as {MIN_COVERAGE}.")


def load_into(
    module: nn.Module,
    path: str | Path | OpenedWeights,
    *,
    networks: tuple[str, ...] = RUN_NETWORKS,
    input_layers: InputLayers = "new",
    min_coverage: float = MIN_COVERAGE,
) -> CoverageReport:
    """Fill a module with the tensors of a file that fit, and say which did.

    A warning names tensors of the encoder that the file does not fill.

    Args:
        module: An encoder, or a network with an ``encoder``.
        path: A run folder, an export folder, or a weights file (safetensors or torch); or weights that are opened.
        networks: Folders of a run to look for, the preferred first.
        input_layers: How the layers of an encoder that read the input are made to fit another number of channels.
        min_coverage: Share of the encoder's values (or of the module's, without an encoder) that must be filled, from
            0 to 1. 1 refuses every partial load, 0 none.

    Raises:
        CheckpointError: Less than ``min_coverage`` would be filled, or tensors hold values that are not finite, or one
            and the same value throughout; nothing is changed then.
        ConfigError: ``min_coverage`` is no share.
    """
    require_share(min_coverage)
    target = module.state_dict()
    judged = {key for key in target if isinstance(module, Encoder) or key.startswith("encoder.")} or set(target)
    weights = OpenedWeights.of(path, networks)
    held = weights.held
    renamed_by = known = weights.found
    state = _named_as_in(module, target, held, known)
    if known is not None and _filled(target, state, judged) < min_coverage:
        # A network of somebody's own may have the names of the file.
        plain = _named_as_in(module, target, held, None)
        if _filled(target, plain, judged) > _filled(target, state, judged):
            state, renamed_by = plain, None
    odd = {key: said for key in sorted(state.keys() & target.keys()) if (said := oddity(state[key], target[key]))}
    if odd:
        first = next(iter(odd))
        raise CheckpointError(
            f"{path} holds {odd[first]} in {len(odd)} of {len(state)} tensors (first: {first}), which are not the "
            "plain numbers that a network learns; save the network as it was trained, in single or half precision."
        )
    state, adapted = adapt_input(module, state, input_layers)
    fits, report = fitting(target, state, adapted)
    unfilled = sorted(judged - fits.keys())
    share = _filled(target, state, judged)
    if share < min_coverage:
        example = next(iter(report.mismatched or report.missing), "none")
        what = "" if known is None else f" It is {known.family.name}{f' with {known.size}' if known.size else ''}."
        raise CheckpointError(
            f"{path} fills only {share:.1%} of the encoder ({report}; first: {cut(example)}); it belongs to another "
            f"backbone or settings, or is not whole.{what} min_coverage is the share it must fill, now "
            f"{min_coverage:g}."
        )
    # As the module will hold them: what double precision holds may be too large.
    if said := unlearned({key: value.to(target[key].dtype) for key, value in fits.items()}):
        raise CheckpointError(f"{path} holds {said}.")
    if unfilled:
        warnings.warn(
            f"{path} fills {share:.1%} of the encoder; {len(unfilled)} of its {number_of(len(judged), 'tensor')} "
            f"{verb_of(len(unfilled), 'start')} anew: {listed(unfilled, 3)}.",
            category=WeightsWarning,
            stacklevel=2,
        )
    elif renamed_by is not None:
        _warn_of_settings(module, renamed_by, path, report.left_over)
    module.load_state_dict(fits, strict=False)
    return report


def _named_as_in(
    module: nn.Module, target: Mapping[str, Tensor], held: HeldWeights, known: RecognisedWeights | None
) -> dict[str, Tensor]:
    """The tensors of a file by the names of a module: by those of a known family, or as the file has them."""
    inside_encoder = isinstance(module, Encoder)
    own = {key if inside_encoder else key.removeprefix("encoder."): key for key in target}
    state = without_prefix_of(held.tensors, {*target, *own}) if known is None else known.tensors
    if inside_encoder:
        return {key.removeprefix("encoder."): value for key, value in state.items()}
    if any(key.startswith("encoder.") for key in state):
        return state
    return {own.get(key, key): value for key, value in state.items()}


def _filled(target: Mapping[str, Tensor], state: Mapping[str, Tensor], judged: Set[str]) -> float:
    """Share of the values of some of a module's tensors that others of the same names and shapes fill."""
    fits = {key for key in judged & state.keys() if state[key].shape == target[key].shape}
    return _num_values(target, fits) / max(1, _num_values(target, judged))


def fitting(
    target: Mapping[str, Tensor], state: Mapping[str, Tensor], adapted: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], CoverageReport]:
    """The tensors that a module has a place for, by name and shape, and the report on all of them.

    Args:
        target: The state of the module; tensors without values will do.
        state: Tensors by the names of the module.
        adapted: Names of those that were made to fit another number of input channels.
    """
    fits = {key: value for key, value in state.items() if key in target and target[key].shape == value.shape}
    return fits, CoverageReport(
        matched=tuple(sorted(fits)),
        missing=tuple(sorted(target.keys() - state.keys())),
        mismatched=tuple(
            f"{key}: {tuple(state[key].shape)} for {tuple(target[key].shape)}"
            for key in sorted(state.keys() & target.keys() - fits.keys())
        ),
        left_over=tuple(sorted(state.keys() - target.keys())),
        coverage=_num_values(target, fits.keys()) / max(1, _num_values(target, target.keys())),
        adapted=adapted,
    )


def _num_values(target: Mapping[str, Tensor], keys: Set[str]) -> int:
    return sum(target[key].numel() for key in keys)


def _warn_of_settings(
    module: nn.Module, known: RecognisedWeights, path: str | Path | OpenedWeights, left_over: tuple[str, ...]
) -> None:
    """Warn where weights fill a network that computes something else than theirs, by its settings or its parts."""
    encoder = module if isinstance(module, Encoder) else getattr(module, "encoder", None)
    recipe = getattr(encoder, "recipe", None)
    shown = ((name, value, getattr(recipe, name, value)) for name, value in known.shown.items())
    other = [
        f"{name} {own} where theirs is {value}"
        for name, value, own in shown
        if name not in _OF_TRAINING and own != (tuple(value) if isinstance(value, list) else value)
    ]
    if other:
        warnings.warn(
            f"{path} is {known.family.name}, but the encoder has {listed(other, 3)}; it computes something else than "
            "they learned.",
            category=WeightsWarning,
            stacklevel=3,
        )
    elif strangers := [name for name in known.encoder if f"encoder.{name}" in left_over or name in left_over]:
        warnings.warn(
            f"{path} is {known.family.name}, and {number_of(len(strangers), 'tensor')} of its encoder, the first "
            f"{cut(strangers[0])}, {verb_of(len(strangers), 'have')} no place in this one; it computes something else "
            "than they learned.",
            category=WeightsWarning,
            stacklevel=3,
        )


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


def load_encoder(
    path: str | Path | OpenedWeights, backbone: Named | None = None, *, min_coverage: float = MIN_COVERAGE
) -> Encoder:
    """Load the encoder of a run, an export folder, a Hugging Face id or a published MiM checkpoint, ready to use.

    What of it was filled is printed, see :func:`load_into` for what is warned of and refused.

    Args:
        path: A run, an export folder or a weights file; ``owner/name`` that is no local path, or
            ``hf://owner/name@revision``, is fetched from Hugging Face (extra ``hub``).
        backbone: The backbone, where the card names one that is not mim3d's own, whose code is imported then; or where
            there is no card, by its name, or by those of its settings that the tensors do not show.
        min_coverage: Share of the encoder's values that the file must fill, from 0 to 1.

    Raises:
        CheckpointError: The file is unreadable, or fills too little of the encoder, or neither its card nor its shapes
            say which encoder it is of.
        ConfigError: The card names a backbone that is not mim3d's own, and none is given.
    """
    weights = OpenedWeights.of(path)
    encoder = recipe_of(weights, backbone).build()
    say(f"{path}: {load_into(encoder, weights, min_coverage=min_coverage)}")
    return encoder.eval()


def recipe_of(path: str | Path | OpenedWeights, backbone: Named | None = None) -> Backbone:
    """The settings of the encoder that weights are of, by their card or, without one, by their shapes.

    Args:
        path: A run, an export folder, a weights file or a Hugging Face id; or weights that are opened.
        backbone: The backbone as the user named it, or changes to its settings.

    Raises:
        CheckpointError: Neither the card nor the shapes say which encoder it is of.
        ConfigError: The card names a backbone that is not mim3d's own, and the user named none.
    """
    weights = OpenedWeights.of(path)
    if weights.card:
        return recipe_of_card(weights.card, weights.path, backbone)
    changes = {"name": backbone} if isinstance(backbone, str) else dict(backbone or {})
    if "name" in changes:
        return create_recipe(changes)
    return _recipe_of_family(weights, changes)


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


def _recipe_of_family(path: OpenedWeights, changes: Mapping[str, Any]) -> Backbone:
    """The settings of an encoder without a card: what shapes show, what its family fixes, and what the user says.

    Neither shows the number of attention heads of a transformer, which changes what is computed, nor whether blocks at
    the end were lost. Both are known for the sizes that were published.
    """
    found = path.found
    if found is None:
        raise CheckpointError(
            f"{path} has no card and no names of tensors that mim3d knows ({unknown_layout(path.held)}); say which "
            "backbone it belongs to with --backbone."
        )
    family, shown = found.family, found.shown
    if unfit := found.unfit:
        raise CheckpointError(f"{path} is {family.name}{unfit}.")
    unknown = [name for name in found.open if name not in changes]
    if unknown:
        names = alike(shown) if family.backbone == "hybrid" else []
        flags = " and ".join(f"--backbone.{name}" for name in unknown)
        named = f"--backbone {names[0]}, whose shapes these are" if names else flags
        hidden = " and ".join(_HIDDEN.get(name, name) for name in unknown)
        raise CheckpointError(
            f"{path} has no card, and its tensors ({found.size}) do not show {hidden}, which "
            f"{'change' if len(unknown) > 1 else 'changes'} what the encoder computes; give {named}."
        )
    if any(name not in shown for name in family.open):
        warnings.warn(
            f"{path} has no card; its tensors show {found.size}, and blocks that the file may have lost at the end "
            "cannot be known.",
            category=WeightsWarning,
            stacklevel=2,
        )
    return create_recipe({"name": family.backbone, **shown, **changes})
