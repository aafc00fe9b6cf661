"""Comparing arms: pre-training methods, weights and networks, on one data set under one contract."""
