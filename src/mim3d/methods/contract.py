"""The contract that every pre-training method keeps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import nn

from mim3d.backbones import BACKBONES, Backbone
from mim3d.backbones.contract import Encoder
from mim3d.core.errors import ConfigError, listed
from mim3d.core.settings import to_named
from mim3d.core.types import Triple
from mim3d.loading.samples import Sampler
from mim3d.objective import Objective
from mim3d.training.schedule import Optimisation

#: What is learned by a loss that stays above this share of that of a guess has learned nothing.
IDLE_SHARE = 0.98

#: A guess whose loss is below this leaves nothing to be learned.
NOTHING_LEFT = 1e-4

#: Features that vary less than this, where 1 is as if drawn at random, have collapsed.
COLLAPSED_SPREAD = 0.01

#: Why nothing can be learned of voxels that are all the same.
ALL_CONSTANT = "what is to be predicted is the same everywhere; look at the scans and at how intensities are mapped"


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Settings of a pre-training method: what a user writes and YAML stores, with the paper's defaults.

    Attributes:
        needs: The contract that the encoder must keep. A method that is content with feature maps leaves it alone.
    """

    needs: ClassVar[type[nn.Module]] = Encoder

    @property
    @abstractmethod
    def optimisation(self) -> Optimisation:
        """The optimisation of the paper; a user's own settings come on top."""

    def least_learning_rate(self, backbone: Backbone) -> float | None:
        """The floor under a rate that grows with the batch, of what this backbone learns by; none by default."""
        return None

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse a backbone whose encoder cannot do what this method needs.

        Raises:
            ConfigError: The sentence names the method, the backbone and backbones that fit.
        """
        if not issubclass(backbone.encoder_class, self.needs):
            recipes = {name: found() if isinstance(found, type) else found for name, found in BACKBONES.items()}
            fitting = [name for name, recipe in recipes.items() if issubclass(recipe.encoder_class, self.needs)]
            remedy = f"use a backbone such as {listed(fitting)}, or another method" if fitting else "use another method"
            raise ConfigError(
                f"method {type(self).__name__} needs a {self.needs.__name__}, which the encoder of backbone "
                f"{to_named(backbone, BACKBONES)['name']} is not; {remedy}."
            )

    @abstractmethod
    def planned(self, backbone: Backbone, shapes: Sequence[Triple]) -> Self:
        """These settings with everything that depends on the data filled in.

        Args:
            backbone: The encoder's recipe.
            shapes: Voxels of every scan.

        Raises:
            ConfigError: They cannot work on these scans. The sentence names settings that do.
        """

    @abstractmethod
    def summary(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """Lines printed before training: what a sample is, and what one should know of it."""

    def details(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """Further lines, which the manifest has and ``verbose`` prints: what a sample costs; none by default."""
        return []

    @abstractmethod
    def sampler(self, backbone: Backbone) -> Sampler:
        """What decides, before anything is read, which places of a scan a sample needs."""

    @abstractmethod
    def build(self, backbone: Backbone) -> Objective:
        """The module that the loop trains."""

    def idle_parts(self, final_logs: dict[str, float]) -> list[str]:
        """Sentences about parts that learned nothing, judged by the mean logs of the last steps; none by default."""
        return []


def idle_part(
    logs: dict[str, float],
    name: str,
    part: str,
    *,
    nothing: str,
    guess: str = "a constant guess",
    remedy: str = "train longer, or raise the learning rate",
) -> list[str]:
    """A sentence where a loss is no better than that of a guess; none where it is, or where either was not logged.

    Args:
        logs: The mean logs of the last steps.
        name: Name of the loss in them (``loss/NAME`` beside ``guess/NAME``).
        part: What the sentence is about.
        nothing: Why there is nothing to be learned, where a guess is as good as anything.
        guess: What is guessed.
        remedy: What to do otherwise.
    """
    loss, of_guess = logs.get(f"loss/{name}"), logs.get(f"guess/{name}")
    if loss is None or of_guess is None:
        return []
    if of_guess < NOTHING_LEFT:
        return [f"{part} is idle: {nothing}"]
    if loss <= IDLE_SHARE * of_guess:
        return []
    return [f"{part} is idle: its loss ended at {loss:.3f}, and that of {guess} is {of_guess:.3f}; {remedy}"]
