"""Encoders by name. A new backbone is one file and one line here; a user's own is named by dotted path."""

from dataclasses import replace
from typing import Any

from mim3d.backbones.contract import Backbone, Encoder, MaskTokenEncoder, VisibleEncoder
from mim3d.backbones.hybrid import Hybrid
from mim3d.backbones.resenc import ResEnc
from mim3d.backbones.swin import Swin
from mim3d.backbones.vit import PRIMUS, ViT
from mim3d.core.run_folder import DECODER_SETTINGS
from mim3d.core.settings import require_kind, resolve
from mim3d.core.types import Named

#: Recipes by name: a settings class with its defaults, or a ready size.
BACKBONES: dict[str, type[Backbone] | Backbone] = {
    "hybrid": Hybrid,
    "hybrid_nano": Hybrid(widths=(24, 48, 96), depths=(1, 1, 4), num_heads=4),
    "hybrid_tiny": Hybrid(widths=(12, 24, 48, 96), num_heads=3),
    "hybrid_small": Hybrid(widths=(24, 48, 96, 192), num_heads=6),
    "hybrid_base": Hybrid(),
    "hybrid_large": Hybrid(widths=(64, 128, 256, 512), depths=(2, 2, 4, 20), num_heads=16),
    "hybrid_huge": Hybrid(widths=(96, 192, 384, 768), depths=(2, 2, 6, 28), num_heads=16),
    "swin": Swin,
    "swin_nano": Swin(feature_size=24, depths=(2, 2), num_heads=(3, 6)),
    "swin_tiny": Swin(feature_size=24),
    "swin_small": Swin(feature_size=48),
    "swin_base": Swin(feature_size=96),
    "swin_large": Swin(feature_size=192),
    "vit": ViT,
    "vit_nano": ViT(token_edge=8, width=96, depth=4, num_heads=4),
    "vit_tiny": ViT(width=192, num_heads=3),
    "vit_small": ViT(width=384, num_heads=6),
    "vit_base": ViT(),
    "vit_large": ViT(width=1024, depth=24, num_heads=16),
    "primus_nano": replace(PRIMUS, width=96, depth=4, num_heads=4),
    "primus_s": replace(PRIMUS, width=396, depth=12, num_heads=6),
    "primus_b": replace(PRIMUS, width=792, depth=12),
    "primus_m": PRIMUS,
    "primus_l": replace(PRIMUS, width=1056, depth=24, num_heads=16),
    # nnU-Net's presets as it plans them for crops of at least 32, 64 and 128 voxels along each axis.
    "resenc": ResEnc,
    "resenc_nano": ResEnc(widths=(16, 32, 64, 128), depths=(1, 2, 2, 2)),
    "resenc_s": ResEnc(widths=(32, 64, 128, 256), depths=(1, 3, 4, 6)),
    "resenc_m": ResEnc(widths=(32, 64, 128, 256, 320), depths=(1, 3, 4, 6, 6)),
    "resenc_l": ResEnc(),
}


def list_models() -> list[str]:
    """Names that :func:`create_model` knows."""
    return sorted(BACKBONES)


def create_model(backbone: Named = "hybrid_base", **settings: Any) -> Encoder:
    """Build an encoder.

    Args:
        backbone: A name of :func:`list_models`, a dotted path, or a mapping with ``name`` and settings.
        settings: Changes to the named recipe, e.g. ``in_channels=4``.

    Raises:
        ConfigError: The name is unknown (the nearest known one is offered), or settings cannot work.
    """
    named = {"name": backbone} if isinstance(backbone, str) else backbone
    return create_recipe({**named, **settings}).build()


def create_recipe(backbone: Named, *, allow_import: bool = True) -> Backbone:
    """Find the settings of an encoder.

    Args:
        backbone: A name, a dotted path, or a mapping with ``name`` and settings. A decoder's settings in it are passed
            over, see :func:`former_decoder`.
        allow_import: Whether a dotted path may be imported; false for cards that somebody else may have written.

    Raises:
        ConfigError: As :func:`create_model` does, or a package that the encoder needs is missing.
    """
    if isinstance(backbone, dict):
        backbone = {key: value for key, value in backbone.items() if key not in DECODER_SETTINGS}
    found = resolve(backbone, BACKBONES, "backbone", allow_import=allow_import)
    recipe: Backbone = require_kind(found, Backbone, "backbone")
    recipe.check_machine()
    return recipe


def former_decoder(backbone: Named) -> dict[str, Any]:
    """The settings of a decoder in the mapping of a backbone, as cards and runs hold them that were made before they
    belonged to the method.
    """
    return {key: backbone[key] for key in DECODER_SETTINGS if key in backbone} if isinstance(backbone, dict) else {}


__all__ = [
    "BACKBONES",
    "Backbone",
    "Encoder",
    "Hybrid",
    "MaskTokenEncoder",
    "ResEnc",
    "Swin",
    "ViT",
    "VisibleEncoder",
    "create_model",
    "create_recipe",
    "former_decoder",
    "list_models",
]
