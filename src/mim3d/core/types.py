"""Names for the shapes and quantities that pass between rooms."""

from typing import Any, TypeAlias

#: Whole voxels along X, Y, Z.
Triple: TypeAlias = tuple[int, int, int]

#: Millimetres along X, Y, Z.
Spacing: TypeAlias = tuple[float, float, float]

#: Largest value of a label map.
LARGEST_LABEL = 65535

#: A registered name, a dotted path, or a mapping ``{"name": ..., setting: value, ...}``.
Named: TypeAlias = str | dict[str, Any]
