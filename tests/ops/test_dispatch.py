# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs, on what: forced backends, layouts, and what is told of a fallback."""

from __future__ import annotations

import sys
import threading
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcache
from fastcache.ops import dispatch, reference
from fastcache.ops.backends.table import BACKENDS, Backend

TAKEN = "kernel"
OPS = ("residual_l1", "residual_store", "residual_magnitude", "guided_sums", "quantize_store")


class Told:
    """Who watches for ops that run on the reference."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def fell_back(self, op: str, why: str) -> None:
        self.said.append((op, why))


@pytest.fixture
def own(monkeypatch: Any) -> Any:
    """A backend with kernels for `OPS`, taken for one of GPUs, that reads CPU tensors."""
    module: Any = types.ModuleType("watched_kernels")
    for op in OPS:
        setattr(module, op, lambda *args, op=op: op)
    module.takes_dtypes = lambda op, dtypes: op == "residual_store"
    monkeypatch.setitem(sys.modules, "watched_kernels", module)
    row = Backend(TAKEN, "watched_kernels", ("cpu",), ("cuda",), lambda: True)
    monkeypatch.setitem(BACKENDS, TAKEN, row)
    for known in (dispatch.function, dispatch._kernel, dispatch._preferred, dispatch.at_once):
        known.cache_clear()
    with fastcache.backend(TAKEN):
        yield module
    for known in (dispatch.function, dispatch._kernel, dispatch._preferred, dispatch.at_once):
        known.cache_clear()


@pytest.fixture
def told(monkeypatch: Any) -> Told:
    monkeypatch.setattr(dispatch, "LARGE", 0)
    watcher = Told()
    dispatch.watchers.add(watcher)
    return watcher


def three(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 6, 8).to(dtype) for _ in range(3)]


# --- who runs ------------------------------------------------------------------------------------


def test_a_forced_backend_holds_inside_its_block_and_blocks_nest(own):
    assert dispatch.active() == TAKEN
    with fastcache.backend("reference"):
        assert dispatch.active() == "reference"
        with fastcache.backend(TAKEN):
            assert dispatch.active() == TAKEN
        assert dispatch.active() == "reference"
    with pytest.raises(RuntimeError, match="out"), fastcache.backend("reference"):
        raise RuntimeError("out")
    assert dispatch.active() == TAKEN


def test_a_forced_backend_is_that_of_one_thread(own):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(dispatch.active()))
    thread.start()
    thread.join()
    assert len(seen) == 1 and seen != [TAKEN] and dispatch.active() == TAKEN


def test_the_reference_gets_tensors_as_they_are(own):
    given = [t.transpose(1, 2) for t in three()]
    with fastcache.backend("reference"):
        run, views = dispatch.resolve("residual_l1", given)
    assert run is reference.residual_l1 and views is given


@pytest.mark.parametrize("name", ["none", 3, None, ["cpp"]])
def test_an_unknown_backend_is_refused_by_name(name):
    with pytest.raises(ValueError, match=r"backend is .*must be one of"), fastcache.backend(name):
        pass


def test_an_op_that_nobody_has_is_named(own):
    with pytest.raises(AttributeError, match="'no_such_op' has no reference"):
        dispatch.resolve("no_such_op", three())


def test_shapes_are_compared_before_a_kernel_reads(own):
    y, x, prev = three()
    with pytest.raises(ValueError, match=r"residual_l1: shapes \(2, 6, 8\) and \(2, 5, 8\) differ"):
        dispatch.resolve("residual_l1", [y, x, prev[:, :5]])


# --- in which layout -----------------------------------------------------------------------------


def kernel_for(op: str, given: list[Tensor], outputs: int = 0) -> list[Tensor]:
    run, views = dispatch.resolve(op, given, outputs)
    assert run() == op
    return views


def test_dense_tensors_are_not_even_looked_at(own):
    given = three()
    assert kernel_for("residual_l1", given) is given


def test_a_token_range_is_taken_as_it_is(own):
    whole = torch.randn(2, 9, 8)
    y, x, prev = (whole[:, i : i + 6] for i in range(3))
    assert all(
        v.data_ptr() == t.data_ptr() and v.stride() == t.stride()
        for v, t in zip(kernel_for("residual_l1", [y, x, prev]), [y, x, prev], strict=True)
    )


@pytest.mark.parametrize("op, copied", [("residual_l1", True), ("guided_sums", False)])
def test_only_ops_that_say_so_read_every_other_token(own, op, copied):
    given = [torch.randn(2, 12, 8)[:, ::2] for _ in range(3)]
    views = kernel_for(op, given)
    assert [v.data_ptr() != t.data_ptr() for v, t in zip(views, given, strict=True)] == 3 * [copied]
    assert all(torch.equal(v, t) for v, t in zip(views, given, strict=True))


def test_ops_that_know_one_order_get_copies_in_it(own):
    given = [t.transpose(1, 2) for t in three()]
    assert all(v.is_contiguous() and v.shape == (2, 6, 8) for v in kernel_for("residual_l1", given))
    views = kernel_for("quantize_store", given)
    assert all(v.is_contiguous() and v.shape == (2, 8, 6) for v in views)
    assert all(torch.equal(v, t) for v, t in zip(views, given, strict=True))


def test_what_is_written_to_is_never_copied(own, told):
    y, x, _ = three()
    every_other = torch.empty(2, 12, 8)[:, ::2]
    run, views = dispatch.resolve("residual_store", [y, x, every_other], 1)
    assert run is reference.residual_store and views[2] is every_other
    ((op, why),) = told.said
    assert op == "residual_store" and "no kernel that writes to this layout" in why


# --- and what is told of the rest ----------------------------------------------------------------


def test_a_mix_of_dtypes_is_the_backends_own_choice(own, told):
    mixed = [*three()[:2], torch.randn(2, 6, 8).bfloat16()]
    assert kernel_for("residual_store", mixed, 1) is mixed and not told.said
    run, _ = dispatch.resolve("residual_l1", mixed)
    assert run is reference.residual_l1
    assert [op for op, _ in told.said] == ["residual_l1"]
    assert "no kernel for this mix of dtypes" in told.said[0][1] and TAKEN in told.said[0][1]


def test_float64_runs_on_the_reference_whatever_a_backend_says(own, told):
    run, _ = dispatch.resolve("residual_store", three(torch.float64), 1)
    assert run is reference.residual_store and "dtypes" in told.said[0][1]


def test_an_op_that_a_backend_lacks_runs_on_the_reference_and_is_told(own, told):
    run, _ = dispatch.resolve("residual_apply", three(), 1)
    assert run is reference.residual_apply
    assert told.said[0][0] == "residual_apply" and "has no kernel for it" in told.said[0][1]
    assert "torch.float32 with strides (48, 8, 1)" in told.said[0][1]


def test_small_tensors_are_not_worth_a_word(own, told, monkeypatch):
    size = three()[0].numel() * 4
    monkeypatch.setattr(dispatch, "LARGE", size)
    dispatch.resolve("residual_apply", three(), 1)
    assert not told.said
    monkeypatch.setattr(dispatch, "LARGE", size - 1)
    dispatch.resolve("residual_apply", three(), 1)
    assert told.said


def test_a_backend_of_processors_says_nothing(own, told, monkeypatch):
    row = Backend(TAKEN, "watched_kernels", ("cpu",), ("cpu",), lambda: True)
    monkeypatch.setitem(BACKENDS, TAKEN, row)
    dispatch.resolve("residual_apply", three(), 1)
    assert not told.said


def test_who_is_gone_is_not_told(own, told):
    gone = Told()
    dispatch.watchers.add(gone)
    said = gone.said
    del gone
    dispatch.resolve("residual_apply", three(), 1)
    assert told.said and not said
