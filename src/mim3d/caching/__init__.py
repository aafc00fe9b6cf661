"""The cache: scans preprocessed once, then read crop by crop."""
