"""``mim3d weights``: what a file of weights is."""

from mim3d.core.command import typed
from mim3d.weights.description import WeightsDescription
from mim3d.workflows.weights import say_weights


@typed
def weights(file: str, *, json: bool = False) -> WeightsDescription:
    """Print what a file of weights is: family, network, size, coverage, expected input and licence.

    Our own weights say it by their card; others are known by the names and shapes of their tensors. Nothing in a file
    is run.

    Args:
        file: A run, an exported folder, a weights file or a Hugging Face id.
        json: Print one JSON object in place of lines.

    Returns:
        The same as an object.

    Raises:
        CheckpointError: The weights cannot be read.
    """
    return say_weights(file, as_json=json)
