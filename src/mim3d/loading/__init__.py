"""From the cache to batches: samples drawn first, then read."""
