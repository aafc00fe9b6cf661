"""What a file of weights is, as ``mim3d weights`` prints it."""

import json
from dataclasses import asdict, replace

from mim3d.core.names import number_of
from mim3d.core.progress import say
from mim3d.weights.description import WeightsDescription, describe
from mim3d.workflows.shared.leakage import read_seen


def say_weights(file: str, *, as_json: bool) -> WeightsDescription:
    """Print what a file of weights is, for people or for programs.

    Args:
        file: A run, an exported folder, a weights file or a Hugging Face id.
        as_json: Print one JSON object in place of lines.

    Raises:
        CheckpointError: It cannot be read.
    """
    described = describe(file)
    if described.card and (seen := read_seen(file)) is not None:
        more = "" if seen.complete else ", and others that the list beside the weights does not name"
        rows = {**described.rows, "learned from": f"{number_of(len(seen.scans), 'scan')}{more}"}
        described = replace(described, rows=rows)
    text = json.dumps(asdict(described), indent=2, default=str) if as_json else str(described)
    for line in text.splitlines():
        say(line)
    return described
