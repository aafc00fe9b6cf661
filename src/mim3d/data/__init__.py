"""Scans in and out, data sets, and the cache that training reads."""

from mim3d.data.cache import open_cache

__all__ = ["open_cache"]
