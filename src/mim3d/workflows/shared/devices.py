"""The device a network computes on, by the name a user gives it."""

import torch

from mim3d.core.errors import ConfigError

#: Name that a user gives -> kind of device.
KINDS = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "mps": "mps"}


def choose_device(accelerator: str) -> torch.device:
    """The device behind `auto`, `cpu`, `cuda` (or `gpu`) or `mps`; `auto` takes the fastest that is there.

    Raises:
        ConfigError: An unknown name, or a device that this machine lacks.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if accelerator == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if accelerator not in KINDS:
        raise ConfigError(f"accelerator is '{accelerator}'; use one of auto, {', '.join(KINDS)}.")
    if not available[KINDS[accelerator]]:
        raise ConfigError(f"accelerator '{accelerator}' is not there on this machine; use auto or cpu.")
    return torch.device(KINDS[accelerator])
