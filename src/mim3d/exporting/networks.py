"""A trained network as it is exported: a module with named outputs, its card, and the input that it takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn

from mim3d.backbones import BACKBONES
from mim3d.backbones.contract import Encoder, check_multiple
from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.core.settings import nearest, to_named
from mim3d.core.types import Triple
from mim3d.tasks import create_task
from mim3d.tasks.contract import Task
from mim3d.weights import RUN_NETWORKS, load_encoder, locate, read_card

#: What a run can hold.
Kind = Literal["encoder", "segmenter", "classifier"]

#: Edge of an encoder's input, or the next smaller one of whole tokens, where nothing else is known or asked for.
ENCODER_EDGE = 96

#: Entries of a card that speak of the task and say nothing of an encoder taken out of it.
OF_THE_TASK = ("task", "labels", "step", "scores")


@dataclass(frozen=True, kw_only=True, eq=False)
class Exported:
    """A network on its way out.

    Attributes:
        kind: what it is.
        module: whose tensors are stored.
        program: maps ``image`` ``(B, C, X, Y, Z)`` to its outputs: one tensor, or one for each feature map.
        outputs: names of what the program gives.
        channels: what the channels of logits stand for, in their order; empty for an encoder.
        activation: what turns logits into probabilities; None for an encoder.
        painted: label value that each channel gives in a label map; empty for all but a segmenter.
        task: settings of the task; None for an encoder.
        card: what a reader must know to use it.
        num_channels: images per scan.
        patch_size: voxels of a program's input.
        trained_size: voxels that it saw in training; None where that is not recorded.
        located: folder or file that the weights come from.
    """

    kind: Kind
    module: nn.Module
    program: nn.Module
    outputs: tuple[str, ...]
    channels: tuple[str, ...] = ()
    activation: str | None = None
    painted: tuple[int, ...] = ()
    task: Task | None = None
    card: Mapping[str, Any]
    num_channels: int
    patch_size: Triple
    trained_size: Triple | None
    located: Path


class EncoderProgram(nn.Module):
    """All feature maps of an encoder, as a tuple.

    Args:
        encoder: the encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Maps ``(B, widths[i], X / strides[i], ...)``, finest first."""
        return tuple(self.encoder.feature_maps(image))


class LogitsProgram(nn.Module):
    """Logits of a segmenter or classifier.

    Args:
        objective: the task's module.
    """

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective: Any = objective

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, K, X, Y, Z)`` or ``(B, K)``."""
        logits: Tensor = self.objective.logits(image)
        return logits


def load_exported(weights: str, kind: str | None = None, patch_size: Triple | None = None) -> Exported:
    """Load a network to be exported.

    Args:
        weights: a run, an exported folder, a weights file or a Hugging Face id.
        kind: encoder, segmenter or classifier; that of the weights if not given.
        patch_size: voxels of the input; those of training, or 96 along each axis of an encoder, if not given.
    Raises:
        CheckpointError: weights that cannot be read, or of another kind.
        ConfigError: an unknown kind, or a patch that does not fit the encoder's tokens.
    """
    if kind is not None and kind not in get_args(Kind):
        raise ConfigError(f"network is '{kind}'.{nearest(kind, get_args(Kind))}")
    card = read_card(weights, (kind,) if kind in ("segmenter", "classifier") else RUN_NETWORKS)
    chosen = kind or (_task_of(card, weights).network if "task" in card else "encoder")
    if chosen == "segmenter":
        return _segmenter(weights, patch_size)
    if chosen == "classifier":
        return _classifier(weights, patch_size)
    return _encoder(weights, card, patch_size)


def _task_of(card: Mapping[str, Any], weights: str) -> Task:
    try:
        return create_task(card["task"], allow_import=False)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the card of {weights} is incomplete or damaged ({error!r}); export the run again."
        ) from None


def _encoder(weights: str, card: Mapping[str, Any], patch_size: Triple | None) -> Exported:
    encoder = load_encoder(weights)
    edge = encoder.patch_size
    longest = max(edge, ENCODER_EDGE // edge * edge)
    own = {key: value for key, value in card.items() if key not in OF_THE_TASK}
    return Exported(
        kind="encoder",
        module=encoder,
        program=EncoderProgram(encoder).eval(),
        outputs=tuple(f"features_stride{stride}" for stride in encoder.strides),
        # A published checkpoint has no card: what its shapes tell is all that is known.
        card=own or {"backbone": to_named(encoder.recipe, BACKBONES), "patch_size": edge},
        num_channels=encoder.recipe.in_channels,
        patch_size=_checked(patch_size or _trained_patch(card) or (longest, longest, longest), edge),
        trained_size=_trained_patch(card),
        located=locate(weights),
    )


def _trained_patch(card: Mapping[str, Any]) -> Triple | None:
    """What a task's network saw, of a card with a task."""
    task = card.get("task")
    size = task.get("patch_size") if isinstance(task, dict) else None
    return None if size is None else (int(size[0]), int(size[1]), int(size[2]))


def _segmenter(weights: str, patch_size: Triple | None) -> Exported:
    from mim3d.tasks.segmentation.segmenter import load_segmenter

    loaded = load_segmenter(weights)
    targets = loaded.network.targets
    return Exported(
        kind="segmenter",
        module=loaded.network,
        program=LogitsProgram(loaded.network).eval(),
        outputs=("logits",),
        channels=targets.names,
        activation=targets.activation,
        painted=targets.painted,
        task=loaded.settings,
        card=read_card(weights, ("segmenter",)),
        num_channels=loaded.num_channels,
        patch_size=_checked(patch_size or loaded.settings.windows().patch_size, loaded.network.encoder.patch_size),
        trained_size=loaded.settings.windows().patch_size,
        located=locate(weights, ("segmenter",)),
    )


def _classifier(weights: str, patch_size: Triple | None) -> Exported:
    from mim3d.tasks.classification.classifier import load_classifier

    loaded = load_classifier(weights)
    return Exported(
        kind="classifier",
        module=loaded.network,
        program=LogitsProgram(loaded.network).eval(),
        outputs=("logits",),
        channels=loaded.classes,
        activation="softmax",
        task=loaded.settings,
        card=read_card(weights, ("classifier",)),
        num_channels=loaded.num_channels,
        patch_size=_checked(patch_size or loaded.settings.cube().size, loaded.network.encoder.patch_size),
        trained_size=loaded.settings.cube().size,
        located=locate(weights, ("classifier",)),
    )


def _checked(patch_size: Triple, edge: int) -> Triple:
    if len(patch_size) != 3:
        raise ConfigError(f"patch_size {list(patch_size)} must be three numbers of voxels, such as 96 96 96.")
    check_multiple(patch_size, edge, "patch_size")
    return patch_size


def require_segmenter(network: Exported, weights: str) -> None:
    """Refuse what has no label map as its output.

    Raises:
        CheckpointError: an encoder or a classifier.
    """
    if network.kind != "segmenter":
        raise CheckpointError(
            f"{weights} is exported as {network.kind}, but a MONAI bundle is made of a segmenter; use --format "
            "safetensors, onnx or torch-export, or give a run of mim3d finetune with the task segmentation."
        )
