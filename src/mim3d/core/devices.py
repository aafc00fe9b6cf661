"""The device that a network computes on, by the name that a user gives it."""

from typing import TYPE_CHECKING

from mim3d.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

#: Name that a user gives -> kind of device.
KINDS = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "mps": "mps"}


def choose_accelerator(name: str) -> str:
    """The kind of device for an ``accelerator`` setting: ``cpu``, ``cuda`` or ``mps``.

    Args:
        name: One of :data:`KINDS`, or ``auto`` for the fastest kind that this machine has.
    """
    return next(kind for kind, there in _available().items() if there) if name == "auto" else KINDS[name]


def choose_device(name: str) -> "torch.device":
    """The device for an ``accelerator`` setting, once it is known to be there.

    Args:
        name: One of :data:`KINDS`, or ``auto`` for the fastest kind that this machine has.
    Raises:
        ConfigError: An unknown name, or a device that this machine lacks.
    """
    import torch

    if name not in ("auto", *KINDS):
        raise ConfigError(f"accelerator is '{name}'; use one of auto, {', '.join(KINDS)}.")
    kind, available = choose_accelerator(name), _available()
    if not available[kind]:
        there = " or ".join(other for other, found in reversed(available.items()) if found)
        raise ConfigError(
            f"accelerator is '{name}', but this machine shows no such device; use accelerator {there}, or auto."
        )
    return torch.device(kind)


def device_name(device: "torch.device") -> str:
    """The device in words, for people."""
    import torch

    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _available() -> dict[str, bool]:
    """Whether this machine has each kind of device, the fastest kinds first."""
    import torch

    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
