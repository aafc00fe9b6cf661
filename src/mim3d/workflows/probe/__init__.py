"""Probes: alone and beside pre-training."""
