"""The command that says what frozen features are worth."""

from typing import Any

from mim3d.core.command import command
from mim3d.workflows.probe.run import ProbeSettings, run_probe


@command(ProbeSettings)
def probe(settings: ProbeSettings) -> dict[str, Any]:
    """Score frozen features by a linear and a nearest-neighbour classifier, without training the encoder.

    With label maps the tokens that one label fills are told apart, with classes whole scans. Beside the weights stand
    an encoder of the same settings drawn at random, intensities (mean and deviation of each token or box), and the
    place of each token in its crop.

    With --features and --labels in place of weights and data, the rows of `mim3d embed` are told apart by a column of
    classes or fitted to one of numbers, each patient scored once over all folds, beside what other columns say alone.

    Returns:
        All scores and intervals, as in the file.

    Raises:
        ConfigError: Settings that cannot work, before any work begins.
        CheckpointError: Weights that cannot be read or do not fit.
        DataError: Scans that cannot be used, or nothing to tell apart.
    """
    return run_probe(settings)
