"""Labelled synthetic CT bodies, the data that come with mim3d."""
