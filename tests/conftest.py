"""Fixtures that every room's tests may take."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mim3d.training.precision import PrecisionChoice


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real scans: {folder} is absent")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _float32_unless_asked() -> Iterator[None]:
    """Every machine computes the same numbers, and none spends a second of a test on measuring itself."""
    with pytest.MonkeyPatch.context() as patch:
        choice = PrecisionChoice("32-true", "in tests always")
        for user in ("training.precision", "tasks.segmentation.prediction"):
            patch.setattr(f"mim3d.{user}.choose_precision", lambda accelerator: choice)
        yield
