"""The errors a user can meet: each carries the value at fault and the remedy."""


class Mim3dError(Exception):
    """Root of every error mim3d raises on purpose; the command line prints it as one line."""


class ConfigError(Mim3dError):
    """A setting that cannot work, found before any work begins."""


class DataError(Mim3dError):
    """A scan, label, folder or list that cannot be used as it is."""


class DamagedError(DataError):
    """What a cache stores of one scan is missing or damaged; its other scans can still be used."""


class CheckpointError(Mim3dError):
    """Weights or a run that cannot be read, or that do not fit."""
