"""Ready sizes of the hybrid backbone, and random hierarchies of MiM or crops of MAE for networks, without scans."""

from dataclasses import replace

import numpy as np
import torch

from mim3d.backbones import Backbone, Hybrid, create_recipe
from mim3d.core.types import Triple
from mim3d.methods.masked_crop import MaskedCropMethod
from mim3d.methods.mim.hierarchy import full_levels
from mim3d.methods.mim.method import MiM
from mim3d.methods.mim.sampler import relative_corners
from mim3d.objective import Batch


def hybrid(size: str) -> Hybrid:
    """Settings of the hybrid backbone in a ready size, such as ``base``."""
    recipe = create_recipe(f"hybrid_{size}")
    assert isinstance(recipe, Hybrid)
    return recipe


def mim_with_children(token_size: Triple, num_children: int) -> MiM:
    """MiM with the paper's levels, and this many children of each volume above the last level."""
    *parents, last = full_levels(token_size)
    return MiM(levels=(*(replace(level, num_children=num_children) for level in parents), last))


def random_batch(method: MiM | MaskedCropMethod, recipe: Backbone, batch_size: int, seed: int = 0) -> Batch:
    """Noise, and masks and children drawn as in training; as the loader would collate them."""
    rng = np.random.default_rng(seed)
    hierarchy = method.hierarchy(recipe)
    batch: dict[str, list[np.ndarray]] = {}
    for _ in range(batch_size):
        drawn = hierarchy.draw(rng)
        for geometry, level in zip(hierarchy.levels, drawn, strict=True):
            name = geometry.level.name
            batch.setdefault(f"hidden/{name}", []).append(level.hidden)
            batch.setdefault(f"place/{name}", []).append(level.places)
            if geometry.source is None:
                shape = (geometry.num_volumes, recipe.in_channels, *geometry.level.size)
                batch.setdefault(name, []).append(rng.random(shape, dtype=np.float32))
            else:
                batch.setdefault(f"corner/{name}", []).append(relative_corners(level, drawn[geometry.source]))
    return {name: torch.from_numpy(np.stack(arrays)) for name, arrays in batch.items()}
