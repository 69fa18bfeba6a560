# SPDX-License-Identifier: Apache-2.0
"""The short way of an op to its kernel on CPUs: the same numbers, and the general way for all that is unusual."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache
from fastcache.ops import dispatch
from fastcache.ops.short import SHORT

pytestmark = pytest.mark.skipif(
    fastcache.backends()["cpp"] is not True, reason="needs the C++ kernels"
)
SHAPE = (2, 6, 8)


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


@pytest.mark.parametrize("name", SHORT)
def test_shapes_that_differ_are_an_error_before_anything_is_read(name):
    tensors = [*three()[:2], torch.randn(2, 6, 9)]
    with pytest.raises(RuntimeError, match="another shape"):
        taken(name, tensors)


def test_a_backend_without_such_operators_has_none():
    assert dispatch.at_once("residual_l1", torch.float64) is None
    assert dispatch.BACKENDS["reference"].operator("residual_l1") is None
