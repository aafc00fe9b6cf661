"""Whether runs that stand side by side can be compared by their weights, or differ in settings besides."""

from collections.abc import Sequence

from mim3d.core.errors import listed
from mim3d.core.names import cut, printable
from mim3d.core.run_folder import recipe_differences
from mim3d.reporting.sources import FOLD_NAME, NamedRun

#: Most settings that a sentence names.
_MOST = 8


def comparisons(runs: Sequence[NamedRun]) -> dict[str, str]:
    """Name of a run -> a sentence on how it differs in more than weights from the first of its task and data set.

    Folds are compared with the same fold of other runs.

    Args:
        runs: Runs in the order that they are shown in.

    Returns:
        Nothing for runs of other commands, and for those that differ in nothing but weights, machine and display.
    """
    said = {}
    shown: list[NamedRun] = []
    for run in (run for run in runs if run.command == "finetune"):
        alike = [each for each in shown if (each.subject, each.data) == (run.subject, run.data)]
        same_fold = [each for each in alike if _fold_of(each) == _fold_of(run)]
        shown.append(run)
        # Folds of one set of runs are no comparison.
        is_fold = FOLD_NAME.fullmatch(run.record.path.name)
        first = next(iter(same_fold or ([] if is_fold else alike)), run)
        differences = recipe_differences(first.record.manifest, run.record.manifest)
        if differences:
            named = [
                printable(f"{cut(name)} {cut(str(one))} and {cut(str(other))}")
                for name, (one, other) in differences.items()
            ]
            said[run.name] = (
                f"{first.name} and {run.name} differ in more than weights: {listed(named, _MOST)}; scores may follow "
                "from these (mim3d finetune --like RUN takes all but weights from a run)."
            )
    return said


def _fold_of(run: NamedRun) -> object:
    return run.record.manifest["settings"].get("fold")
