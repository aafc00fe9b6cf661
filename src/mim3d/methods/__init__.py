"""Pre-training methods by name. A new method is one file and one line here; a user's own is named by dotted path."""

from mim3d.core.settings import resolve
from mim3d.core.types import Named
from mim3d.methods.contract import Method

__all__ = ["METHODS", "Method", "create_method"]

#: Settings class of each method, imported when asked for.
METHODS: dict[str, str] = {"MiM": "mim3d.methods.mim.method:MiM"}


def create_method(method: Named) -> Method:
    """The settings of a method by name, dotted path or mapping; raises ConfigError with the nearest known name."""
    settings = resolve(method, METHODS, "method")
    assert isinstance(settings, Method)
    return settings
