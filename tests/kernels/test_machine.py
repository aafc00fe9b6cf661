"""Keeping freed memory: asked of the C library where it can, and nothing elsewhere."""

import ctypes

import pytest

from mim3d.kernels.machine import keep_freed_memory


def test_options_are_set_where_the_c_library_has_them() -> None:
    assert keep_freed_memory() == hasattr(ctypes.CDLL(None), "mallopt")


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not keep_freed_memory()
