"""The command that turns a data set into a cache."""

from mim3d.core.command import command
from mim3d.workflows.cache import CacheSettings, cache_data_set


@command(CacheSettings)
def cache(settings: CacheSettings) -> str:
    """Preprocess a data set into a folder from which training reads single crops.

    May be stopped and run again at any moment: what is finished and unchanged is kept. Scans that cannot be used are
    left out and listed in OUT/failed.csv; the exit code is 2 then.
    """
    return cache_data_set(settings)
