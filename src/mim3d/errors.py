"""The errors a user can meet: each carries the value at fault and the remedy."""


class Mim3dError(Exception):
    """Root of every error mim3d raises on purpose; the command line prints it as one line."""


class ConfigError(Mim3dError):
    """A setting that cannot work, found before any work begins."""


class DataError(Mim3dError):
    """A scan, label, folder or list that cannot be used as it is."""


class CheckpointError(Mim3dError):
    """Weights or a run that cannot be read, or that do not fit."""
