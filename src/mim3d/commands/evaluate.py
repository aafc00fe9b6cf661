"""The command that scores predictions against references, on the scan's own grid."""

from mim3d.core.command import command
from mim3d.tasks.evaluation import EvaluationSettings
from mim3d.workflows.evaluate import evaluate_predictions


@command(EvaluationSettings)
def evaluate(settings: EvaluationSettings) -> str:
    """Score predictions of any tool against references: label maps per label, or classes.

    Label maps: Dice, 95 % Hausdorff distance, normalised surface distance and volume error, in millimetres and
    millilitres on the scan's own grid, and the detection of lesions. Files are matched by name without suffix.
    Classes: a table predictions.csv against a table of references, matched by id.
    Means have 95 % bootstrap intervals over patients. The file of scores states its conventions.
    """
    return evaluate_predictions(settings)
