"""The rooms of a call: contexts, the end of a run, what is said about it, and the way that a call takes."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
import toys
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcache


def enabled(method: str = "mag_cache", **changes: Any) -> tuple[fastcache.Cache, Any, toys.Clock]:
    clock, target = toys.Clock(), toys.build(method)
    return fastcache.enable(target, toys.config(method, clock, **changes)), target, clock


# --- contexts -------------------------------------------------------------------------------------


def test_a_context_that_is_open_cannot_be_entered_again():
    """Looking for the innermost context went round in a circle for ever."""
    cache, target, _ = enabled()
    context, call = cache.context("cond"), toys.inputs()[0]
    with context:
        with pytest.raises(ValueError, match=r"context: .*'cond'.*open"), context:
            pass
        toys.step(target, call)
    with context:  # one after the other is no circle
        toys.step(target, call)
    assert [r.context for r in cache.stats] == ["cond", "cond"]


def test_a_request_named_none_is_refused():
    """`reset(None)` forgets all requests, so None can name none of them."""
    cache, _, _ = enabled()
    with pytest.raises(ValueError, match="context: request is None"):
        cache.context("cond", request=None)


# --- the end of a run -----------------------------------------------------------------------------


class Unread(deque):
    """Records that may be added to, and not gone through."""

    def __iter__(self) -> Any:
        raise AssertionError("all records were gone through")

    __reversed__ = __iter__


def test_the_end_of_a_run_reads_its_own_records_only():
    cache, target, _ = enabled(mag_ratios=[1.5] * toys.STEPS)
    kept, cache.stats._all = cache.stats._all, Unread()
    with pytest.warns(UserWarning, match="no step of 10 was reused"):
        for request in range(3):
            toys.run(cache, target, toys.inputs(), request=request)
            cache.reset(request)
    kept.extend(cache.stats._all[i] for i in range(len(cache.stats._all)))
    cache.stats._all = kept
    assert len(cache.stats) == 3 * toys.STEPS


class Zeroed(TorchDispatchMode):
    """Counts tensors that are overwritten with zeros."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.zero_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", toys.METHODS)
def test_storage_is_emptied_once_between_two_runs(method):
    cache, target, clock = enabled(method)
    calls = toys.inputs_for(method)
    toys.run(cache, target, calls, clock)
    (state,) = cache.denoisers[0].slots.states.values()
    held = sum(len(s.tensors()) for units in state.units for u in units.values() for s in u.streams)
    held += sum(isinstance(value, Tensor) for value in state.head.values())
    with Zeroed() as zeroed:
        cache.reset()
        assert zeroed.count == held > 0
        toys.run(cache, target, calls[:1], clock)
    assert zeroed.count == held
