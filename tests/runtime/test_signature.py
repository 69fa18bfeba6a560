# SPDX-License-Identifier: Apache-2.0
"""What storage fits a call: told by its signature, and at once by a call that had the same one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys

import fastcache
from fastcache import FirstBlock, Recipe, Stack
from fastcache.ops.alike import TensorGuards
from fastcache.runtime.signature import call_signature, known_by

guarded = pytest.mark.skipif(TensorGuards is None, reason="this torch has no such guards")
Call = tuple[tuple, dict[str, Any]]


def call(**changed: Any) -> Call:
    given = {"x": torch.randn(2, 4), "t": torch.tensor([0.5]), "text": None, "plain": True}
    return (), given | changed


SAME = {
    "other values": lambda: call(),
    "another number": lambda: call(plain=3.5),
    "a word": lambda: call(text="cat"),
    "another order in memory": lambda: call(x=torch.randn(4, 2).T),
    "by place": lambda: ((torch.randn(2, 4), torch.tensor([0.1])), {}),
}
OTHER = {
    "another shape": lambda: call(x=torch.randn(2, 5)),
    "another dtype": lambda: call(x=torch.randn(2, 4).double()),
    "another device": lambda: call(x=torch.randn(2, 4, device="meta")),
    "one more": lambda: call(text=torch.randn(1)),
    "one less": lambda: call(t=None),
    "a list": lambda: call(text=[1, 2]),
    "a dict": lambda: call(text={}),
    "an object": lambda: call(text=object()),
    "a tensor in a tuple": lambda: call(t=(torch.tensor([0.5]),)),
}


@guarded
@pytest.mark.parametrize("what", SAME)
def test_a_call_of_the_same_signature_is_known(what):
    args, kwargs = SAME[what]()
    assert call_signature(args, kwargs) == call_signature(*call())
    assert known_by(*call())(args, kwargs)


@pytest.mark.parametrize("what", OTHER)
def test_a_call_of_another_signature_never_is(what):
    args, kwargs = OTHER[what]()
    assert call_signature(args, kwargs) != call_signature(*call())
    assert not known_by(*call())(args, kwargs)


@pytest.mark.parametrize("what", ["a list", "a dict", "an object", "a tensor in a tuple"])
def test_nothing_is_known_by_a_call_with_more_in_it_than_tensors(what):
    """Nor is it by one that looks like it."""
    args, kwargs = OTHER[what]()
    assert not known_by(args, kwargs)(args, kwargs)


def test_a_call_that_fits_no_more_is_computed_in_the_middle_of_a_run():
    """Steps that say their number are known by the ones before; each has to show what it comes with all the same."""
    model = toys.model()
    with fastcache.enable(model, Recipe(FirstBlock(1e9), where=Stack())) as cache:
        for step, tokens in enumerate((5, 5, 5, 5, 6, 6, 6, 5)):
            (call,) = toys.inputs(1, tokens=tokens)
            with cache.context("cond", step_index=step):
                assert toys.step(model, call).shape[1] == tokens
        assert toys.actions(cache) == "C...C..C"
