"""``mim3d report``: one HTML page on one or more runs."""

from mim3d.core.command import typed
from mim3d.reporting.page import write_report


@typed
def report(
    runs: list[str],
    out: str,
    *,
    scores: list[str] | None = None,
    cases: list[str] | None = None,
    overwrite: bool = False,
) -> str:
    """Write one self-contained HTML page: warnings, cohort, scores, segmentations, curves, images and settings.

    Several runs are shown side by side. The page loads nothing from elsewhere, so it can be sent as it is.

    Args:
        runs: Folders of runs, such as a pre-training and the fine-tunings to compare, or of all folds of one; the first
            is compared with. Folders of mim3d compare are shown as their tables.
        out: The page to write, ending in .html.
        scores: Files of scores by `mim3d evaluate`, beside the RUN/scores.json that are found.
        cases: Ids of the cases to show; seven from the worst to the best if not given.
        overwrite: Replace a report on other runs.

    Returns:
        Path of the page.

    Raises:
        ConfigError: A path is no run or no file of scores, no scores hold a case, or `out` cannot be written.
    """
    return write_report(runs, out, scores or [], cases or [], overwrite=overwrite)
