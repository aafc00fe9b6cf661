"""The encoder that training and probing begin with: from scratch, or pre-trained and compared with the data."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from mim3d.backbones import BACKBONES, Backbone, Encoder, create_recipe
from mim3d.caching.cache import Cache
from mim3d.core.names import number_of
from mim3d.core.progress import say
from mim3d.core.settings import build_settings, to_mapping, update_settings
from mim3d.core.types import Named, Spacing
from mim3d.core.warned import LicenceWarning, UnlikeWeightsWarning
from mim3d.datasets.cases import CaseSet
from mim3d.planning.plan import plan_intensity
from mim3d.scans.intensity import Intensity
from mim3d.scans.volumes import read_grid
from mim3d.weights import (
    IN_CARD,
    MIN_COVERAGE,
    InputLayers,
    OpenedWeights,
    WeightsOrigin,
    load_into,
    origin_of,
    recipe_of,
    recipe_of_card,
)

#: Backbone where neither a name nor weights are given.
DEFAULT_BACKBONE = "hybrid_base"

#: Modality of scans that a kind of intensities never suits.
_NOT_OF = {"window": "MR", "zscore": "CT"}

#: Scans whose headers tell how large their voxels are.
MOST_HEADERS = 10

#: Times that voxels may be larger or smaller than those an encoder learned at, without a word.
FAR_OFF = 2.5

#: What each way of adapting them does to the layers that read the input.
_ADAPTED: dict[InputLayers, str] = {
    "mean": "take the mean over the channels they knew for each",
    "repeat": "take the channels they knew in turn",
    "new": "start anew",
}


@dataclass(frozen=True)
class Initialisation:
    """What training begins with.

    Attributes:
        recipe: The encoder's settings.
        encoder: The pre-trained encoder; None from scratch.
        own_spacing_mm: Voxel size that the encoder learned from; None where its weights do not say it.
        own_intensity: Mapping of intensities that it learned from; None where its weights do not say it.
        gives_way: Whether its voxel size counts for nothing, since the recipe of another run is followed.
        origin: Where foreign weights come from; None for our own, for unknown ones and from scratch.
        filled: Names of the encoder's tensors that the weights fill.
        began_with: The foreign weights that all began with: these, or those that the card of our own names.
    """

    recipe: Backbone
    encoder: Encoder | None = None
    own_spacing_mm: Spacing | None = None
    own_intensity: Intensity | None = None
    gives_way: bool = False
    origin: WeightsOrigin | None = None
    filled: tuple[str, ...] = ()
    began_with: WeightsOrigin | None = None

    @classmethod
    def of_card(cls, recipe: Backbone, encoder: Encoder | None, card: Mapping[str, Any]) -> "Initialisation":
        """A pre-trained encoder with what the card of its weights says; foreign weights have an empty one.

        Raises:
            ConfigError: The card's intensity is no mapping of intensities.
        """
        spacing_mm, intensity = card.get("spacing_mm"), card.get("intensity")
        return cls(
            recipe,
            encoder,
            None if spacing_mm is None else (float(spacing_mm[0]), float(spacing_mm[1]), float(spacing_mm[2])),
            None if intensity is None else build_settings(Intensity, intensity, "intensity of the weights' card"),
        )

    def fill(self, encoder: Encoder) -> None:
        """Give an encoder of the same settings what the weights hold; all else stays as it was drawn."""
        if self.encoder is not None:
            state = self.encoder.state_dict()
            encoder.load_state_dict({name: state[name] for name in self.filled}, strict=False)

    def noted(self) -> dict[str, Any]:
        """What manifests and cards keep of the foreign weights that all began with."""
        return {} if self.began_with is None else {IN_CARD: to_mapping(self.began_with)}

    def spacing_mm(self, asked: Spacing | None, source: CaseSet | Cache) -> Spacing | None:
        """Voxel size to prepare the data with: as asked, else the encoder's; a cache has its own.

        Warns when it is not the one the encoder learned from.
        """
        own = self.own_spacing_mm
        if isinstance(source, Cache):
            used, chosen = source.preprocessing.spacing_mm, asked
        else:
            used = chosen = asked or (None if self.gives_way else own)
        if own is not None and used != own:
            warnings.warn(
                f"the encoder learned at spacing_mm {_plain(own)}, but the scans are prepared at {_plain(used)}; its "
                "features see structures at another size.",
                category=UnlikeWeightsWarning,
                stacklevel=2,
            )
        elif own is not None and self.origin is not None and isinstance(source, CaseSet):
            _warn_of_other_voxels(own, source)
        return chosen

    def intensity(self, asked: Intensity | None, scans: Cache) -> Intensity:
        """Mapping of intensities: as asked, else the encoder's, else planned.

        Warns when another one was asked for, or another kind suits the scans, as where an encoder of CT meets MRI.
        """
        planned, own = plan_intensity(scans), self.own_intensity
        if own is None:
            values = "unknown" if self.origin is None else self.origin.expects.values
            if values != "unknown":
                warnings.warn(
                    f"the encoder learned from intensities as {values}, which mim3d does not map so; "
                    f"{_described(asked or planned)} is used.",
                    category=UnlikeWeightsWarning,
                    stacklevel=2,
                )
            elif self.origin is not None and self.origin.expects.modality[:2] == _NOT_OF[planned.kind]:
                warnings.warn(
                    f"the encoder learned from {self.origin.expects.modality}, but {_described(planned)} suits these "
                    "scans, as it does those of another modality; its features may say little of them.",
                    category=UnlikeWeightsWarning,
                    stacklevel=2,
                )
            return asked or planned
        if asked not in (None, own) or (asked is None and planned.kind != own.kind):
            other = f"{_described(asked)} was asked for" if asked else f"{_described(planned)} suits these scans"
            remedy = "" if asked or self.origin is None else f" --intensity.kind {planned.kind} maps them so."
            warnings.warn(
                f"the encoder learned from intensities mapped by {_described(own)}, but {other}; "
                f"{_described(asked or own)} is used.{remedy}",
                category=UnlikeWeightsWarning,
                stacklevel=2,
            )
        return asked or own


def initialise(
    backbone: Named | None,
    weights: str | OpenedWeights | None,
    num_channels: int,
    input_layers: InputLayers = "mean",
    min_coverage: float = MIN_COVERAGE,
) -> Initialisation:
    """The encoder to start from, loaded and its coverage printed, before any data are read.

    Args:
        backbone: The backbone asked for; None takes that of the weights, and settings without a name change it.
        weights: A run, an exported folder or a file, or weights that are opened; None starts from scratch.
        num_channels: Channels of the data; an encoder known by its weights alone is adapted to them.
        input_layers: How the layers that read the input are made to fit another number of channels.
        min_coverage: Share of the encoder's values that the weights must fill, from 0 to 1.
    Raises:
        ConfigError: An unknown backbone or setting.
        CheckpointError: Weights that cannot be read or do not fit.
    """
    if weights is None:
        return Initialisation(asked_recipe(backbone, None)[0])
    weights = OpenedWeights.of(weights)
    recipe, learned = asked_recipe(backbone, weights)
    if learned is not None and learned != num_channels:
        warnings.warn(
            f"the encoder learned from {number_of(learned, 'channel')}, but the data have {num_channels}; the layers "
            f"that read the input {_ADAPTED[input_layers]} (input_layers {input_layers}).",
            category=UnlikeWeightsWarning,
            stacklevel=2,
        )
        if recipe.in_channels == learned:
            recipe = replace(recipe, in_channels=num_channels)
    encoder = recipe.build()
    report = load_into(encoder, weights, input_layers=input_layers, min_coverage=min_coverage)
    say(f"{weights}: {report}")
    origin = origin_of(weights)
    began_with = origin or WeightsOrigin.in_card(weights.card)
    initial = Initialisation.of_card(recipe, encoder, weights.card)
    initial = replace(initial, filled=report.matched, began_with=began_with)
    if initial.began_with is not None and initial.began_with.terms:
        warnings.warn(f"{weights}: {initial.began_with.terms}.", category=LicenceWarning, stacklevel=2)
    if origin is None:
        return initial
    say(f"{weights}: {origin}; the plan follows what is known, flags such as --spacing_mm change it")
    if origin.remark:
        say(f"note: {origin.remark}")
    expects = origin.expects
    return replace(initial, own_spacing_mm=expects.spacing_mm, own_intensity=expects.intensity, origin=origin)


def asked_recipe(backbone: Named | None, weights: str | OpenedWeights | None) -> tuple[Backbone, int | None]:
    """The backbone's settings: as named; else those of the weights or the default, changed by settings without a name.

    Returns:
        The settings, and the number of channels that the weights learned from where the settings are theirs.
    Raises:
        ConfigError: An unknown backbone or setting.
        CheckpointError: Weights from which no settings can be read.
    """
    named = {"name": backbone} if isinstance(backbone, str) else dict(backbone or {})
    if weights is None:
        return create_recipe({"name": DEFAULT_BACKBONE, **named}), None
    weights = OpenedWeights.of(weights)
    card, name = weights.card, named.pop("name", None)
    # A backbone of the user's own is named to have its code imported: its settings are those of the weights.
    if name in BACKBONES or (name is not None and not card):
        return create_recipe({"name": name, **named}), None
    if not card:
        own = recipe_of(weights, named)
        return own, own.in_channels
    own = recipe_of_card(card, weights.path, name)
    return update_settings(own, named, "backbone of the weights"), own.in_channels


def _warn_of_other_voxels(own: Spacing, source: CaseSet) -> None:
    """Warn where scans must be resampled far from their own voxel size to the one that an encoder learned at."""
    sizes = [read_grid(case.images[0]).spacing_mm for case in source.cases[:MOST_HEADERS]]
    x, y, z = (median(axis) for axis in zip(*sizes, strict=True))
    if any(max(have / want, want / have) > FAR_OFF for have, want in zip((x, y, z), own, strict=True)):
        warnings.warn(
            f"the encoder learned at spacing_mm {_plain(own)}, but the scans have {_plain((x, y, z))} (median); they "
            "are resampled that far, unless --spacing_mm says otherwise.",
            category=UnlikeWeightsWarning,
            stacklevel=4,
        )


def _plain(spacing_mm: Spacing | None) -> str:
    return "each scan's own" if spacing_mm is None else " ".join(f"{value:g}" for value in spacing_mm)


def _described(intensity: Intensity) -> str:
    if intensity.window is None or intensity.kind == "zscore":
        return "z-score"
    return f"the window {intensity.window[0]:g} to {intensity.window[1]:g}"
