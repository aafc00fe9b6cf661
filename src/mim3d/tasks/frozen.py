"""Encoders that are used as they are, so that only what is built on them learns."""

from mim3d.backbones.base import Encoder


def freeze(encoder: Encoder) -> Encoder:
    """The encoder without gradients, in evaluation mode: it stays as it is."""
    return encoder.requires_grad_(False).eval()
