"""Prediction: label maps and class tables."""
