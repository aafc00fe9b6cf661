"""A trained network as it is exported: a module with named outputs, its card, and the input that it takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mim3d.backbones import BACKBONES
from mim3d.backbones.contract import Encoder, check_multiple, round_up
from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.core.settings import nearest, to_mapping, to_named
from mim3d.core.types import Named, Triple
from mim3d.tasks import find_task
from mim3d.tasks.contract import ExportForm
from mim3d.tasks.trained import load_trained
from mim3d.weights import (
    IN_CARD,
    RUN_NETWORKS,
    OpenedWeights,
    WeightsOrigin,
    load_encoder,
    locate,
    origin_of,
    read_card,
)
from mim3d.weights.cards import card_settings, seen_size

#: Edge of an encoder's input, or the next smaller one of whole tokens, where nothing else is known or asked for.
ENCODER_EDGE = 96

#: Entries of a card that speak of the task and say nothing of an encoder taken out of it.
OF_THE_TASK = ("task", "labels", "step", "scores", "evaluation")


@dataclass(frozen=True, kw_only=True, eq=False)
class Exported:
    """A network on its way out.

    Attributes:
        kind: What it is, by the folder of a run that holds it: ``encoder``, or the network of a task.
        module: The module whose tensors are stored.
        form: What other programs must know of it.
        card: What a reader must know to use it.
        num_channels: Number of images per scan.
        patch_size: Voxels of a program's input.
        located: Folder or file that the weights come from.
        license: Id of the licence of the weights; None names none.
        modality: What the scans are, in the user's words.
    """

    kind: str
    module: nn.Module
    form: ExportForm
    card: Mapping[str, Any]
    num_channels: int
    patch_size: Triple
    located: Path
    license: str | None = None
    modality: str | None = None


class EncoderProgram(nn.Module):
    """All feature maps of an encoder, as a tuple.

    Args:
        encoder: The encoder.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return maps ``(B, widths[i], X / strides[i], ...)``, finest first."""
        return tuple(self.encoder.feature_maps(image))


def load_exported(
    weights: str,
    kind: str | None = None,
    patch_size: Triple | None = None,
    *,
    task: str | None = None,
    backbone: Named | None = None,
) -> Exported:
    """Load a network to be exported.

    Args:
        weights: A run, an exported folder, a weights file or a Hugging Face id.
        kind: Folder of a run that holds the network: encoder, segmenter or classifier. That of the weights if None.
        patch_size: Voxels of the input; those of training, or 96 along each axis of an encoder, if not given.
        task: Name or dotted path of the task, where the card names one that is not mim3d's own.
        backbone: The encoder, where the card names a class that is not mim3d's own.

    Raises:
        CheckpointError: Weights that cannot be read, or of another kind.
        ConfigError: An unknown kind, or a patch that does not fit the encoder's tokens.
    """
    own = () if task is None else (find_task(task).network,)
    kinds = tuple(dict.fromkeys((*own, *RUN_NETWORKS)))
    if kind is not None and kind not in kinds:
        raise ConfigError(f"network is '{kind}'.{nearest(kind, kinds)}")
    folders = kinds if kind in (None, "encoder") else (str(kind),)
    located = locate(weights, folders)
    card = read_card(located)
    if kind == "encoder" or (kind is None and "task" not in card):
        return _encoder(located, card, patch_size, backbone)
    network = load_trained(weights, task=task, networks=folders, backbone=backbone)
    if kind not in (None, network.task.network):
        raise CheckpointError(f"{weights} was trained for another task than that of a {kind}; leave --network out.")
    form = network.task.export_form(network)
    return Exported(
        kind=network.task.network,
        module=network.module,
        form=form,
        card=card,
        num_channels=network.num_channels,
        patch_size=_checked(patch_size or form.input_size, network.module.encoder.input_multiple),
        located=located,
    )


def _encoder(located: Path, card: Mapping[str, Any], patch_size: Triple | None, backbone: Named | None) -> Exported:
    weights = OpenedWeights(located)
    encoder = load_encoder(weights, backbone)
    multiple = encoder.input_multiple
    usual = round_up((ENCODER_EDGE,) * 3, multiple, ENCODER_EDGE)
    own = {key: value for key, value in card.items() if key not in OF_THE_TASK}
    with card_settings(located):
        trained_size = seen_size(card)
    return Exported(
        kind="encoder",
        module=encoder,
        form=ExportForm(
            program=EncoderProgram(encoder).eval(),
            outputs=tuple(f"features_stride{stride}" for stride in encoder.strides),
            input_size=trained_size,
            purpose="An encoder for volumes: feature maps at several resolutions, for fine-tuning.",
            pipeline="image-feature-extraction",
        ),
        card=own or _card_of_family(encoder, weights),
        num_channels=encoder.recipe.in_channels,
        patch_size=_checked(patch_size or trained_size or usual, multiple),
        located=located,
    )


def _card_of_family(encoder: Encoder, weights: OpenedWeights) -> dict[str, Any]:
    """The card of an encoder whose weights have none: what shapes tell, and what is known of the family."""
    card = {"backbone": to_named(encoder.recipe, BACKBONES), "input_multiple": list(encoder.input_multiple)}
    origin = origin_of(weights)
    if origin is None:
        return card
    known = {"spacing_mm": origin.expects.spacing_mm, "intensity": origin.expects.intensity, IN_CARD: origin}
    return {**card, **{name: to_mapping(value) for name, value in known.items() if value is not None}}


def encoder_of(network: Exported) -> Encoder:
    """Return the encoder of a network, which may be one itself."""
    encoder = network.module if isinstance(network.module, Encoder) else network.module.encoder
    assert isinstance(encoder, Encoder)
    return encoder


def _checked(patch_size: Triple | None, multiple: Triple) -> Triple:
    if patch_size is None or len(patch_size) != 3:
        shown = "not known" if patch_size is None else list(patch_size)
        raise ConfigError(f"patch_size is {shown}; it must be three numbers of voxels, such as 96 96 96.")
    check_multiple(patch_size, multiple, "patch_size")
    return patch_size


def terms_of(network: Exported) -> str:
    """Return the terms of the weights in sentences: the licence named at export, and those of what they began with."""
    said = "No licence of the weights was named at export; ask whoever published them."
    if network.license:
        said = f"Licence of the weights: {network.license}."
    began = WeightsOrigin.in_card(network.card)
    if began is None:
        return said
    return f"{said} Training began with {began.terms or f'weights of {began.family} (licence: {began.licence})'}."


def millimetres(sizes: Sequence[float] | None, otherwise: str) -> str:
    """Return voxel sizes along X, Y, Z for people, or other words where there are none."""
    return otherwise if sizes is None else " x ".join(f"{size:.4g}" for size in sizes) + " mm"


def formula(intensity: Mapping[str, Any] | None) -> str:
    """Return the mapping of intensities in words that leave nothing open."""
    if intensity is None:
        return "not recorded"
    if intensity.get("kind") == "zscore" or intensity.get("window") is None:
        return (
            "(v - mean) / std for each channel, both over its foreground: voxels above darkest + 5 % of (99.5th "
            "percentile - darkest), or above -950 where the darkest voxel lies below -200; all voxels where that "
            "leaves less than one in a thousand"
        )
    low, high = intensity["window"]
    return f"(clip(v, {low:g}, {high:g}) - ({low:g})) / {high - low:g}"


def label_rule(network: Exported) -> str:
    """Return how probabilities become label values, as a formula."""
    if network.form.activation == "softmax":
        return "label_values[index of the largest logit]"
    return "0; then for each channel in order: its label value wherever sigmoid(logit) > 0.5"
