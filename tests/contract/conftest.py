"""The package ``my_lab`` of an outsider, found as one that is installed, and a data set beside it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.labelled import write_ball_set


def forget() -> None:
    """Other tests have packages of this name too."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def my_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the data set ``balls``, while Python finds ``my_lab``."""
    folder = tmp_path_factory.mktemp("lab")
    write_ball_set(folder / "balls")
    forget()
    sys.path.insert(0, str(Path(__file__).parent))
    yield folder
    sys.path.remove(str(Path(__file__).parent))
    forget()
