"""Encoders by name. A new backbone is one file and one line here; a user's own is named by dotted path."""

from typing import Any

from mim3d.backbones.contract import Backbone, Encoder
from mim3d.backbones.hybrid import Hybrid
from mim3d.core.settings import resolve
from mim3d.core.types import Named

#: Recipes by name: a settings class with its defaults, or a ready size.
BACKBONES: dict[str, type[Backbone] | Backbone] = {
    "hybrid": Hybrid,
    "hybrid_nano": Hybrid(
        widths=(24, 48, 96),
        depths=(1, 1, 4),
        num_heads=4,
        decoder_dim=96,
        decoder_depth=2,
        decoder_num_heads=4,
    ),
    "hybrid_tiny": Hybrid(widths=(12, 24, 48, 96), num_heads=3),
    "hybrid_small": Hybrid(widths=(24, 48, 96, 192), num_heads=6, decoder_dim=288, decoder_num_heads=8),
    "hybrid_base": Hybrid(),
    "hybrid_large": Hybrid(
        widths=(64, 128, 256, 512), depths=(2, 2, 4, 20), num_heads=16, decoder_dim=768, decoder_num_heads=16
    ),
    "hybrid_huge": Hybrid(
        widths=(96, 192, 384, 768), depths=(2, 2, 6, 28), num_heads=16, decoder_dim=1152, decoder_num_heads=16
    ),
}


def list_models() -> list[str]:
    """Names that :func:`create_model` knows."""
    return sorted(BACKBONES)


def create_model(backbone: Named = "hybrid_base", **settings: Any) -> Encoder:
    """Build an encoder.

    Args:
        backbone: a name of :func:`list_models`, a dotted path, or a mapping with ``name`` and settings.
        settings: changes to the named recipe, e.g. ``in_channels=4``.
    Raises:
        ConfigError: for an unknown name (the nearest is offered) or settings that cannot work.
    """
    named = {"name": backbone} if isinstance(backbone, str) else backbone
    return create_recipe({**named, **settings}).build()


def create_recipe(backbone: Named, *, allow_import: bool = True) -> Backbone:
    """The settings of an encoder by name, dotted path or mapping; raises ConfigError as :func:`create_model` does.

    Args:
        backbone: the name or mapping.
        allow_import: whether a dotted path may be imported; false for cards that somebody else may have written.
    """
    recipe = resolve(backbone, BACKBONES, "backbone", allow_import=allow_import)
    assert isinstance(recipe, Backbone)
    return recipe


__all__ = ["BACKBONES", "Backbone", "Encoder", "Hybrid", "create_model", "create_recipe", "list_models"]
