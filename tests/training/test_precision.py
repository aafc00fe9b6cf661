"""How exactly a GPU computes in float32 is said, not left to the library's defaults."""

from collections.abc import Iterator

import pytest
import torch

from mim3d.training.launch import allow_tf32, launch
from mim3d.training.settings import LoopSettings


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_holds_for_products_and_convolutions_alike(allowed: bool) -> None:
    allow_tf32(allowed)
    assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.backends.cuda.matmul.allow_tf32 is allowed


def test_a_run_computes_in_full_float32_unless_told_otherwise() -> None:
    allow_tf32(True)
    launch(LoopSettings(max_steps=1, accelerator="cpu"))
    assert not torch.backends.cudnn.allow_tf32
