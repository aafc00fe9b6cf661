"""Masked depth-wise convolution on blocks of visible tokens: one operator, three implementations."""
