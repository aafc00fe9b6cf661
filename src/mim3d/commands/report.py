"""``mim3d report``: one HTML page on one or more runs."""

import os
from datetime import datetime

from mim3d.core.errors import ConfigError
from mim3d.core.files import write_text


def report(runs: list[str], out: str, scores: list[str] | None = None) -> str:
    """Write one self-contained HTML page: scores, segmentations, curves, reconstructions and settings.

    Several runs are shown side by side. The page loads nothing from elsewhere, so it can be sent as it is.

    Args:
        runs: folders of runs, such as a pre-training and the fine-tunings to compare; the first is compared with.
        out: the page to write, ending in .html.
        scores: files of scores by `mim3d evaluate`, beside the RUN/scores.json that are found.

    Returns:
        Path of the page.

    Raises:
        ConfigError: a path is no run or no file of scores, or `out` cannot be written.
    """
    _check_settings(runs, out)
    from mim3d.reporting.page import report_page
    from mim3d.reporting.sources import read_sources

    content = report_page(read_sources(runs, scores or []), datetime.now())
    path = os.path.abspath(out)
    write_text(path, content)
    print(f"Report: {path}")
    return path


def _check_settings(runs: list[str], out: str) -> None:
    if not runs:
        raise ConfigError("runs is empty; name at least one run folder.")
    if not out.lower().endswith((".html", ".htm")):
        raise ConfigError(f"out is {out}, but a report ends in .html; use {out.rstrip('/')}.html.")
    if os.path.isdir(out):
        raise ConfigError(f"out is {out}, which is a folder; give the name of a file.")
