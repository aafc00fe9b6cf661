"""Evaluation: scores of label maps and of classes."""
