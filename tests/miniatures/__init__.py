"""Published data sets in miniature: their folders, file names and oddities, with tiny volumes in them."""

from tests.miniatures.sets import MINIATURES, Miniature, write_cc_ccii

__all__ = ["MINIATURES", "Miniature", "write_cc_ccii"]
