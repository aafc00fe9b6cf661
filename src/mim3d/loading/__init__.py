"""From the cache to batches: samples are drawn first, then read."""
