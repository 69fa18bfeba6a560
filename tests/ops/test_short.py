# SPDX-License-Identifier: Apache-2.0
"""The short way of an op to its kernel on CPUs: the same numbers, and the general way for all that is unusual."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache
from fastcache.ops import dispatch
from fastcache.ops.short import SHORT, change_against, sum_over
from fastcache.sync import relative_change as of_sums

pytestmark = pytest.mark.skipif(
    fastcache.backends()["cpp"] is not True, reason="needs the C++ kernels"
)
SHAPE = (2, 6, 8)


def relative_change(y: Tensor, x: Tensor, prev: Tensor) -> float | None:
    return change_against(prev)(y, x)


class General:
    """The general way, which says that it was taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __call__(self, *args: object) -> None:
        self.taken += 1


def three(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(SHAPE).to(dtype) for _ in range(3)]


def result(name: str, tensors: list[Tensor]) -> Tensor:
    """What the short way gives."""
    call = SHORT[name](General())
    if name == "residual_l1":
        return call(*tensors)
    out = torch.empty_like(tensors[0])
    call(out, tensors, [0.5, -1.0, 2.0])
    return out


def taken(name: str, tensors: list[Tensor]) -> int:
    """How often the general way was taken."""
    general = General()
    call = SHORT[name](general)
    if name == "residual_l1":
        call(*tensors)
    else:
        call(torch.empty_like(tensors[0]), tensors, [0.5, -1.0, 2.0])
    return general.taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHORT)
def test_the_short_way_gives_the_bits_of_the_general_one(name, dtype):
    tensors = three(dtype)
    assert not taken(name, tensors)
    found = result(name, tensors)
    if name == "residual_l1":
        expected = fastcache.ops.residual_l1(*tensors)
    else:
        expected = fastcache.ops.linear_combine(tensors, [0.5, -1.0, 2.0])
    assert torch.equal(found, expected)


def test_sums_of_each_sample():
    tensors = three()
    found = SHORT["residual_l1"](General())(*tensors, True)
    assert torch.equal(found, fastcache.ops.residual_l1(*tensors, per_sample=True))


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Kind(Tensor):
    """A subclass."""


UNUSUAL = {
    "another dtype": lambda: [*three()[:2], three(torch.bfloat16)[2]],
    "a dtype without kernels": lambda: three(torch.float64),
    "not contiguous": lambda: [*three()[:2], torch.randn(2, 8, 6).transpose(1, 2)],
    "empty": lambda: [torch.randn(0, 6, 8) for _ in range(3)],
    "a subclass": lambda: [three()[0].as_subclass(Kind), *three()[1:]],
    "another device": lambda: [t.to("meta") for t in three()],
}


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_unusual_goes_the_general_way(name, what):
    assert taken(name, UNUSUAL[what]()) == 1


@pytest.mark.parametrize("name", SHORT)
def test_a_forced_backend_and_whoever_watches_get_the_general_way(name):
    with fastcache.backend("reference"):
        assert taken(name, three()) == 1
    with Watching():
        assert taken(name, three()) == 1
    assert not taken(name, three())


REFUSED = {
    "another shape": lambda: torch.randn(2, 6, 9),
    "as many elements": lambda: torch.randn(2, 8, 6),
    "a subclass": lambda: torch.randn(SHAPE).as_subclass(Kind),
    "another device": lambda: torch.randn(SHAPE, device="meta"),
    "weights": lambda: torch.randn(SHAPE),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_general_way_refuses_goes_there_before_anything_is_read(what):
    """What is called by address looks at nothing itself."""
    bad = REFUSED[what]()
    for place in range(3):
        tensors = three()
        tensors[place] = bad
        if what != "weights":
            assert relative_change(*tensors) is None and taken("residual_l1", tensors) == 1
        general, weights = General(), [1.0] * (3 + (what == "weights"))
        SHORT["linear_combine_"](general)(three()[0], tensors, weights)
        assert general.taken == 1
    with pytest.raises(ValueError, match="shape"):
        fastcache.ops.direct("residual_l1")(*three()[:2], torch.randn(2, 6, 9))


def test_more_terms_than_a_kernel_takes_go_the_general_way():
    general, out = General(), torch.empty(SHAPE)
    for count in (1, 8, 9):
        terms, weights = [torch.randn(SHAPE) for _ in range(count)], [0.5] * count
        SHORT["linear_combine_"](general)(out, terms, weights)
        if count < 9:
            torch.testing.assert_close(out, sum(0.5 * t for t in terms))
    assert general.taken == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 6, 8), (3, 700, 131)])  # of one chunk, and of several
def test_the_number_of_a_change_is_that_of_its_sums(dtype, shape):
    y, x, prev = (torch.randn(shape).to(dtype) for _ in range(3))
    assert relative_change(y, x, prev) == of_sums(fastcache.ops.residual_l1(y, x, prev))


def test_the_number_of_a_change_against_nothing():
    y, x, nothing = torch.ones(SHAPE), torch.zeros(SHAPE), torch.zeros(SHAPE)
    assert relative_change(y, x, nothing) == math.inf
    for case in (nothing, nothing, nothing), (y * math.nan, x, y), (y, x, x * math.nan):
        assert math.isnan(relative_change(*case)) and math.isnan(
            of_sums(fastcache.ops.residual_l1(*case))
        )


@pytest.mark.parametrize("what", UNUSUAL)
def test_a_change_that_is_unusual_has_no_number_at_once(what):
    assert relative_change(*UNUSUAL[what]()) is None
    with fastcache.backend("reference"):
        assert relative_change(*three()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_and_the_rows_of_a_buffer_add_up_as_the_op_has_it(dtype):
    base, buffer = torch.randn(SHAPE).to(dtype), torch.randn(3, *SHAPE).to(dtype)
    rows = list(buffer.unbind())
    found = sum_over(rows, dtype)(base, (2, 0), (0.5, -2.0))
    expected = fastcache.ops.linear_combine([base, rows[2], rows[0]], [1.0, 0.5, -2.0])
    assert torch.equal(found, expected) and found.data_ptr() != base.data_ptr()


def test_what_no_kernel_adds_up_at_once_takes_the_general_way():
    base, held = torch.randn(SHAPE), list(torch.randn(2, *SHAPE).unbind())
    rows, weights, add = (0, 1), (0.5, 0.25), sum_over(held, torch.float32)
    assert add(base, rows, weights) is not None
    assert add(base, rows, (0.5, 0.0)) is None  # a row without a share may hold anything
    for other in (
        base.double(),
        base[:1],
        base.transpose(0, 1).contiguous().transpose(0, 1),
        base.as_subclass(Kind),
        base.to("meta"),
    ):
        assert add(other, rows, weights) is None
    with fastcache.backend("reference"):
        assert add(base, rows, weights) is None
    with Watching():
        assert add(base, rows, weights) is None
    laid = torch.randn(2, 8, 6, 2).permute(0, 3, 2, 1)  # rows in another order of dimensions
    assert sum_over(list(laid.unbind()), torch.float32)(base, rows, weights) is None
    assert sum_over(held, torch.bfloat16)(base, rows, weights) is None
    many = list(torch.randn(8, *SHAPE).unbind())
    assert sum_over(many, torch.float32)(base, range(8), [0.5] * 8) is None


def test_a_backend_without_such_functions_has_none():
    assert dispatch.at_once("residual_l1", torch.float64) is None
    assert dispatch.at_once("residual_store", torch.float32) is None
    assert dispatch.BACKENDS["reference"].at_once("residual_l1", torch.float32) is None
