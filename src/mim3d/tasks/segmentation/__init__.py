"""Segmentation: the task, its network, losses, crops and prediction."""
