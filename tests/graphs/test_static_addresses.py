# SPDX-License-Identifier: Apache-2.0
"""Storage that compiled and captured code may hold on to: it never moves, and it is marked so."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from test_compile import Graphs, fresh
from torch import Tensor, nn

import fastcache
from fastcache.runtime.patch import ATTACHED
from fastcache.storage.ring import Ring
from fastcache.storage.state import State
from fastcache.storage.table import Table

STEPS = 6
METHODS: dict[str, Callable[[], Any]] = {
    "mag": lambda: fastcache.MagCacheConfig(
        mag_ratios=torch.ones(STEPS), num_inference_steps=STEPS, retention_ratio=0.1
    ),
    "first_block": lambda: fastcache.FirstBlockCacheConfig(0.3),
    "interval_taylor2": lambda: fastcache.Recipe(fastcache.Interval(3), fastcache.Taylor(2)),
    "taylorseer": lambda: fastcache.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1
    ),
    "dmd": lambda: fastcache.Recipe(fastcache.Interval(3), fastcache.DMD()),
    "chebyshev": lambda: fastcache.Recipe(fastcache.Interval(3), fastcache.Chebyshev()),
}


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def held(state: State) -> list[Tensor]:
    """Every tensor of a state that a graph may be given."""
    found: list[Tensor] = []
    streams = [s for units in state.units for unit in units.values() for s in unit.streams]
    keepers = [keeper for group in state.slots for _, keeper in group.owners("")]
    for keeper in (*streams, *keepers):
        if isinstance(keeper, Ring | Table):
            for name in (
                n for kind in type(keeper).__mro__ for n in getattr(kind, "__slots__", ())
            ):
                part = getattr(keeper, name)
                found += [t for t in (part if isinstance(part, list) else [part]) if _is(t)]
        else:
            found += [getattr(keeper, name) for name in keeper.kept]
    for timeline in state.timelines:
        if timeline.staged is not None:
            found += [
                v
                for name in timeline.staged.__slots__
                if isinstance(v := getattr(timeline.staged, name), Tensor)
            ]
    return found


def run(cache: fastcache.Cache, call: Callable, inputs: dict, request: Any = 0) -> set[int]:
    """One run of two contexts; the addresses of all that its states hold."""
    for step in tiny.trajectory("Wan3D", inputs, STEPS):
        for context in ("cond", "uncond"):
            with cache.context(context, request=request), torch.no_grad():
                call(**step, return_dict=False)
    states = cache.denoisers[0].pool.states
    return {t.data_ptr() for name in ("cond", "uncond") for t in held(states[request, name])}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:fastcache. each of:UserWarning")
def test_addresses_stay_over_runs_resets_and_requests(method: str, compiled: bool) -> None:
    fresh()
    model, inputs = tiny.build("Wan3D")
    with fastcache.enable(model, METHODS[method]()) as cache:
        call = fastcache.compile(model, backend=Graphs()) if compiled else model
        run(cache, call, inputs)  # the second step allocates what compiled regions hand over
        first = run(cache, call, inputs)
        for request in (0, 0, "other", "third"):
            assert run(cache, call, inputs, request) == first
            cache.reset(request)  # its storage serves the next request
        assert len(cache.denoisers[0].pool.spares) == 2


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:fastcache:UserWarning")
def test_storage_is_marked_static_even_where_it_was_there_before(
    method: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh()
    model, inputs = tiny.build("Wan3D")
    with fastcache.enable(model, METHODS[method]()) as cache:
        denoiser = model.__dict__[ATTACHED]
        with monkeypatch.context() as patch:  # as if nothing had loaded Dynamo yet
            patch.delitem(sys.modules, "torch._dynamo")
            run(cache, model, inputs)
        states = list(denoiser.pool.states.values())
        assert not any(hasattr(t, "_dynamo_static_input_type") for s in states for t in held(s))
        cache.reset()
        call: nn.Module | Callable = (
            fastcache.compile(model, backend=Graphs())
            if own
            else torch.compile(model, backend=Graphs())
        )
        run(cache, call, inputs)
        tensors = [t for s in denoiser.pool.states.values() for t in held(s)]
        assert tensors
        assert all(t._dynamo_static_input_type == "unguarded" for t in tensors)
