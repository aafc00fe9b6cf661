"""The command that compares pre-training methods, weights and networks on one data set."""

from mim3d.core.command import command
from mim3d.workflows.compare.running import run_comparison
from mim3d.workflows.compare.settings import CompareSettings


@command(CompareSettings)
def compare(settings: CompareSettings) -> str:
    """Compare arms (from scratch, pre-trained by a method, weights, networks) on one data set, and write one table.

    Every arm is pre-trained or loaded, fine-tuned with the same budget, recipe and label subsets, and tested on
    patients that nothing of it has seen. May be stopped and run again at any moment: what is finished is kept. A run
    that fails stands in the table as missing.
    """
    return run_comparison(settings)
