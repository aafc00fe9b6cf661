"""The command that turns scans into rows of features."""

from mim3d.core.command import command
from mim3d.workflows.embed.run import embed_scans
from mim3d.workflows.embed.settings import EmbedSettings
from mim3d.workflows.shared.feature_tables import FeatureTable


@command(EmbedSettings)
def embed(settings: EmbedSettings) -> FeatureTable:
    """Embed scans: one row of features for each scan, and for each label or box in it where masks or boxes are given.

    Features are the mean and the maximum over the tokens inside the body, air left out. Scans of any size are covered
    with windows; each token counts once. May be stopped and run again: what is finished is kept. A scan that cannot be
    used is listed in failed.csv beside the table and does not stop the others; OUT.json says how features were made.

    Returns:
        The features, also for pandas (``table.to_pandas()``) and pyarrow (``table.to_arrow()``).
    """
    return embed_scans(settings)
