# SPDX-License-Identifier: Apache-2.0
"""Whether tensors are as others were, told in one call: never said of others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcache.ops import alike as module
from fastcache.ops.alike import alike, never

pytestmark = pytest.mark.skipif(module.TensorGuards is None, reason="this torch has no such guards")
SHAPE = (2, 6, 8)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Kind(Tensor):
    """A subclass."""


OTHERS = {
    "another shape": lambda: torch.randn(2, 6, 9),
    "as many elements": lambda: torch.randn(2, 8, 6),
    "another number of dimensions": lambda: torch.randn(2, 48),
    "another dtype": lambda: torch.randn(SHAPE).double(),
    "another device": lambda: torch.randn(SHAPE, device="meta"),
    "a subclass": lambda: torch.randn(SHAPE).as_subclass(Kind),
    "a parameter": lambda: torch.nn.Parameter(torch.randn(SHAPE), requires_grad=False),
    "a need of a gradient": lambda: torch.randn(SHAPE, requires_grad=True),
    "a sparse one": lambda: torch.randn(SHAPE).to_sparse(),
    "nothing": lambda: None,
    "a number": lambda: 1.0,
}


@pytest.mark.parametrize("what", OTHERS)
def test_it_is_said_of_no_others(what):
    first, second = torch.randn(SHAPE), torch.randn(3)
    known = alike(first, second)
    assert known(torch.randn(SHAPE), torch.randn(3))
    assert not known(OTHERS[what](), second)
    assert known(first, second)


def test_it_is_said_under_no_mode_that_was_not_there():
    """Who watches sees every op: nothing may go past the dispatcher."""
    tensor = torch.randn(SHAPE)
    known = alike(tensor)
    with Watching():
        assert not known(tensor)
    assert known(tensor)


def test_strides_count_where_they_are_asked_for():
    tensor, turned = torch.randn(SHAPE), torch.randn(SHAPE[::-1]).permute(2, 1, 0)
    assert alike(tensor)(turned)
    assert not alike(tensor, strides=True)(turned)
    assert alike(turned, strides=True)(torch.randn(SHAPE[::-1]).permute(2, 1, 0))


def test_what_was_changed_in_place_is_looked_at_again():
    tensor = torch.randn(SHAPE)
    known = alike(tensor)
    tensor.data = torch.randn(3)
    assert not known(tensor)


def test_gradients_off_or_inference_are_no_reason():
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            tensor = torch.randn(SHAPE)
            assert alike(tensor, strides=True)(torch.randn(SHAPE))


def test_another_torch_is_told_nothing(monkeypatch):
    monkeypatch.setattr(module, "TensorGuards", None)
    assert alike(torch.randn(SHAPE)) is never and not never(torch.randn(SHAPE))
