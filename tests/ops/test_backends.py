# SPDX-License-Identifier: Apache-2.0
"""A backend is one row: who it is, where it works, and what it has."""

from __future__ import annotations

import sys
import types
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

import fastcache
from fastcache.ops import dispatch, reference
from fastcache.ops.backends.table import BACKENDS, ROWS, Backend


@pytest.fixture
def own(monkeypatch) -> Any:
    """A module with one op and a choice of dtypes, and its row."""
    module: Any = types.ModuleType("own_kernels")
    module.ran = []

    def residual_apply(out: Any, x: Any, r: Any) -> None:
        module.ran.append(x.dtype)
        reference.residual_apply(out, x, r)

    module.residual_apply = residual_apply
    module.takes_dtypes = lambda op, dtypes: False
    monkeypatch.setitem(sys.modules, "own_kernels", module)
    row = Backend("own", "own_kernels", ("cpu",), ("cpu",), lambda: True)
    monkeypatch.setitem(BACKENDS, "own", row)
    cached = (dispatch.function, dispatch._kernel, dispatch._preferred, dispatch.at_once)
    for known in cached:
        known.cache_clear()
    yield module
    for known in cached:
        known.cache_clear()


def applied() -> torch.Tensor:
    return fastcache.ops.residual_apply(torch.ones(2, 3, 4), torch.ones(2, 3, 4))


def test_a_row_is_all_that_a_backend_takes(own):
    assert fastcache.backends()["own"] is True
    with fastcache.backend("own"):
        assert applied().eq(2).all() and own.ran == [torch.float32]
        x = torch.randn(2, 3, 4)
        one = fastcache.ops.linear_combine([x, x], [0.5, 0.5])  # which it lacks
        torch.testing.assert_close(one, x)
        mixed = [torch.ones(2, 3, 4, dtype=d) for d in (torch.float32, torch.bfloat16)]
        run, _ = dispatch.resolve("residual_apply", mixed)
        assert run is reference.residual_apply  # for a mix that it does not take
    assert own.ran == [torch.float32]


def test_the_first_row_that_works_is_taken(own, monkeypatch):
    others = {name: row for name, row in BACKENDS.items() if name != "own"}
    for name in others:
        monkeypatch.delitem(BACKENDS, name)
    BACKENDS.update(others)  # behind it
    dispatch._preferred.cache_clear()
    dispatch.at_once.cache_clear()
    assert dispatch.active("cpu") == "own" and applied().eq(2).all() and own.ran
    assert dispatch.active("mps") == "reference"


def test_a_backend_says_where_it_cannot_run_and_why(own, monkeypatch):
    with fastcache.backend("own"), pytest.raises(ValueError, match="cannot run on cuda tensors"):
        dispatch.active("cuda")
    row = Backend("absent", "nowhere", ("cpu",), ("cpu",), lambda: "its parts are missing")
    monkeypatch.setitem(BACKENDS, "absent", row)
    assert fastcache.backends()["absent"] == "its parts are missing"
    with pytest.raises(ValueError, match="'absent' does not work here: its parts are missing"):
        dispatch.check_backend("absent")


def test_rows_do_not_change_and_have_names_of_their_own():
    assert [row.name for row in ROWS] == list(BACKENDS)
    with pytest.raises(FrozenInstanceError):
        ROWS[0].name = "other"  # type: ignore[misc]
