"""Compiled blocks compute what the plain ones do."""

import copy

import pytest
import torch
from torch import nn

from mim3d.core.errors import ConfigError
from mim3d.kernels.machine import find_compiler
from mim3d.nn.blocks import TransformerBlock
from mim3d.training import launch
from mim3d.training.launch import check_machine, compile_blocks
from mim3d.training.settings import LoopSettings


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_compiled_blocks_give_the_same_numbers_and_gradients_under_the_same_names() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(TransformerBlock(16, 2, 2.0), TransformerBlock(16, 2, 2.0))
    compiled = copy.deepcopy(plain)
    assert compile_blocks(compiled) == 2
    assert list(compiled.state_dict()) == list(plain.state_dict())
    tokens = torch.rand(2, 9, 16)
    for network in (plain, compiled):
        network(tokens).square().sum().backward()
    torch.testing.assert_close(compiled(tokens), plain(tokens))
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5)


def test_a_network_without_such_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="no blocks that mim3d compiles"):
        compile_blocks(nn.Linear(2, 2))


def test_a_cpu_without_a_compiler_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_compiler", lambda: None)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler"):
        check_machine(LoopSettings(max_steps=1, accelerator="cpu", compile=True))
