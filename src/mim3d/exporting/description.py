"""What a user outside Python must know of a network's input and outputs: plain JSON, and sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

from mim3d.exporting.networks import Exported
from mim3d.exporting.programs import Parity


def described(
    network: Exported, parity: Mapping[str, Parity], output_shapes: Mapping[str, list[Any]]
) -> dict[str, Any]:
    """Return the content of ``metadata.json`` beside a program.

    Args:
        network: The network.
        parity: Differences between network and program that were measured at export, by the name of the input.
        output_shapes: Shape of each output by its name.
    """
    card, form = network.card, network.form
    meaning = f"logits of the channels; {form.activation} gives probabilities"
    if form.activation is None:
        meaning = "feature map, one voxel for every {stride} of the input along each axis"
    content: dict[str, Any] = {
        "format": 1,
        "network": network.kind,
        "license": network.license,
        "modality": network.modality,
        "input": {
            "name": "image",
            "dtype": "float32",
            "shape": ["batch", network.num_channels, *network.patch_size],
            "axes": "samples, channels, then X (to the right), Y (to the front), Z (to the head): RAS+ voxel order",
        },
        "preprocessing": preprocessing_of(network),
        "outputs": [
            {
                "name": name,
                "dtype": "float32",
                "shape": output_shapes[name],
                "meaning": meaning.format(stride=name.removeprefix("features_stride")),
            }
            for name in form.outputs
        ],
        "parity": {name: {"absolute": value.absolute, "relative": value.relative} for name, value in parity.items()},
        "card": {key: card[key] for key in ("backbone", "data_digest", "mim3d_version", "scores") if key in card},
    }
    if form.channels:
        content["channels"] = list(form.channels)
        content["activation"] = form.activation
    if form.label_values:
        content["label_values"] = list(form.label_values)
        content["label_map"] = label_rule(network)
    return content


def preprocessing_of(network: Exported) -> dict[str, Any]:
    """Return how a scan becomes input: orientation, voxel size, intensities, and padding."""
    intensity = network.card.get("intensity")
    steps: dict[str, Any] = {
        "orientation": network.card.get("orientation", "RAS+"),
        "spacing_mm": network.card.get("spacing_mm"),
        "intensity": intensity,
        "intensity_formula": formula(intensity),
        "padding": "each channel's darkest value (of CT at least -1024 HU), mapped like all others",
    }
    return steps if network.form.box is None else {**steps, "box": dict(network.form.box)}


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
