# SPDX-License-Identifier: Apache-2.0
"""Many requests on one model: nothing crossed, memory within its budget, nothing left behind."""

from __future__ import annotations

import contextvars
import threading
from typing import Any

import pytest
import torch
import torch._dynamo  # once it is imported, contexts look for calls that may run inside a graph
import toys
from torch import Tensor

import fastcache
from fastcache.storage import allocate

EVERY = toys.METHODS


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def alone(method: str, seed: int) -> list[Tensor]:
    return toys.alone(lambda: toys.build(method), method, toys.inputs_for(method, seed=seed))


def interleaved(
    method: str, requests: int, contexts: tuple[str, ...] = ("a", "b"), **options: Any
) -> tuple[dict[tuple[int, str], list[Tensor]], fastcache.Cache, int]:
    """Outputs per (request, context) of requests that start one call apart; most bytes after a call."""
    clock, target = toys.Clock(), toys.build(method)
    cache = fastcache.enable(target, toys.config(method, clock), **options)
    runs = {
        (r, name): toys.inputs_for(method, seed=len(contexts) * r + i)
        for r in range(requests)
        for i, name in enumerate(contexts)
    }
    outputs: dict[tuple[int, str], list[Tensor]] = {key: [] for key in runs}
    most = 0
    for i in range(toys.STEPS + requests):
        for (r, name), calls in runs.items():
            if 0 <= i - r < toys.STEPS:
                more = {"num_inference_steps": toys.STEPS, "step_index": i - r}
                outputs[r, name] += toys.run(
                    cache, target, [calls[i - r]], clock, name=name, request=r, **more
                )
                most = max(most, cache.nbytes())
    return outputs, cache, most


# --- nothing crossed ------------------------------------------------------------------------------


@pytest.mark.parametrize("inherits", [False, True], ids=["own context", "context of its starter"])
@pytest.mark.parametrize("method", ["first_block", "mag_cache", "taylor_seer"])
def test_threads_share_one_model(method, inherits):
    target = toys.build(method)
    cache = fastcache.enable(target, toys.config(method))
    outputs: dict[int, list[Tensor]] = {}

    def serve(request: int) -> None:
        calls = toys.inputs_for(method, seed=request)
        outputs[request] = toys.run(cache, target, calls, request=request)

    def start(request: int) -> threading.Thread:
        context = contextvars.copy_context()
        work = (lambda: context.run(serve, request)) if inherits else (lambda: serve(request))
        return threading.Thread(target=work)

    with cache.context("outer", request="outer"):  # must not reach into the threads' own
        threads = [start(request) for request in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(outputs) == 8
    for request, found in outputs.items():
        assert equal(found, alone(method, request)), request


def test_contexts_that_are_open_at_once_do_not_disturb_each_other():
    """Tasks of one event loop: each opens its context, and calls later."""
    clock, target = toys.Clock(), toys.build("mag_cache")
    cache = fastcache.enable(target, toys.config("mag_cache", clock))
    runs = {r: toys.inputs_for("mag_cache", seed=r) for r in range(3)}
    outputs: dict[int, list[Tensor]] = {r: [] for r in runs}
    for i in range(toys.STEPS):
        places = [contextvars.copy_context() for _ in runs]
        opened = [cache.context("cond", request=r) for r in runs]
        for place, context in zip(places, opened, strict=True):
            place.run(context.__enter__)
        for r, place in enumerate(places):
            outputs[r].append(place.run(toys.step, target, runs[r][i]))
        for place, context in zip(places, opened, strict=True):
            place.run(context.__exit__, None, None, None)
    for r, found in outputs.items():
        assert equal(found, alone("mag_cache", r)), r
    assert torch._dynamo.eval_frame._stance.stance == "default"  # what ran eagerly ends with them


# --- the budget -----------------------------------------------------------------------------------


def bytes_of_one(method: str) -> int:
    return interleaved(method, 1, ("a",))[1].nbytes()


@pytest.mark.parametrize("room", [0.5, 1.0, 2.5, 100.0])
@pytest.mark.parametrize("method", EVERY)
def test_a_budget_is_never_exceeded_and_never_an_error(method, room):
    budget = int(room * bytes_of_one(method))
    outputs, cache, most = interleaved(method, 6, max_bytes=budget)
    assert most <= budget and len(cache.stats) == 12 * toys.STEPS
    reused = [r for r in cache.stats if r.action == "reuse"]
    if room < 1:
        plain = toys.plain(toys.build(method), toys.inputs_for(method, seed=0))
        assert not reused and equal(outputs[0, "a"], plain)
    else:
        assert reused
    if room > 50:
        assert equal(outputs[5, "b"], alone(method, 11))


def test_an_evicted_run_computes_until_there_is_room_again():
    method, one = "mag_cache", bytes_of_one("mag_cache")
    target = toys.build(method)
    cache = fastcache.enable(target, toys.config(method), max_bytes=one)
    old, new = toys.inputs_for(method), toys.inputs_for(method, seed=1)
    outputs = toys.run(cache, target, old[:5], request="old")
    assert any(r.action == "reuse" for r in cache.stats)
    toys.run(cache, target, new[:1], request="new")
    outputs += toys.run(cache, target, old[5:6], request="old")
    assert (cache.stats[-1].action, cache.stats[-1].reason) == ("compute", "no room for a cache")
    assert torch.equal(outputs[-1], toys.plain(toys.build(method), old)[5])
    cache.reset("new")
    toys.run(cache, target, old[6:], request="old")
    assert cache.stats[-1].action == "reuse" and cache.nbytes() <= one


@pytest.mark.parametrize("method", EVERY)
def test_offloaded_requests_go_on_as_if_they_were_alone(method):
    budget = int(2.5 * bytes_of_one(method))
    outputs, cache, most = interleaved(method, 6, max_bytes=budget, offload=True)
    assert most <= budget
    assert not any(r.reason == "no room for a cache" for r in cache.stats)
    plain, _, _ = interleaved(method, 6)
    assert all(equal(outputs[key], plain[key]) for key in plain)


def test_storage_that_graphs_know_stays_where_it_is():
    method = "mag_cache"
    target, budget = toys.build(method), int(1.5 * bytes_of_one(method))
    with fastcache.enable(target, toys.config(method), max_bytes=budget, offload=True) as cache:
        compiled = fastcache.compile(target, backend="eager")
        for i, call in enumerate(toys.inputs_for(method)):
            for request in range(2):
                toys.run(cache, compiled, [call], request=request, step_index=i)
        assert any(r.reason == "no room for a cache" for r in cache.stats)
        assert cache.nbytes() <= budget


def test_offloading_needs_a_budget():
    with pytest.raises(ValueError, match="max_bytes"):
        fastcache.enable(toys.Model(), toys.config("mag_cache"), offload=True)
    with pytest.raises(TypeError, match="offload"):
        fastcache.enable(toys.Model(), toys.config("mag_cache"), max_bytes=8, offload=1)


def test_one_context_above_the_budget_warns_once():
    cache = fastcache.enable(
        target := toys.build("first_block"), toys.config("first_block"), max_bytes=8
    )
    with pytest.warns(UserWarning, match="max_bytes") as warned:
        for request in range(3):
            toys.run(cache, target, toys.inputs(), request=request)
    assert sum("max_bytes" in str(w.message) for w in warned) == 1 and not cache.nbytes()


@pytest.mark.parametrize("value", [-1, 1.5, "1", True])
def test_a_budget_that_is_none_is_refused_by_name(value):
    target = toys.Model()
    with pytest.raises((TypeError, ValueError), match="max_bytes"):
        fastcache.enable(target, toys.config("mag_cache"), max_bytes=value)
    fastcache.enable(target, toys.config("mag_cache")).disable()


# --- out of memory --------------------------------------------------------------------------------


# MagCache has one slot in all
@pytest.mark.parametrize(
    ("method", "number"), [(m, n) for m in EVERY for n in (1, 2) if (m, n) != ("mag_cache", 2)]
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_no_memory_for_a_slot_means_compute_and_a_warning(method, error, number, monkeypatch):
    clock, target, calls = toys.Clock(), toys.build(method), toys.inputs_for(method)
    cache = fastcache.enable(target, toys.config(method, clock))
    zeros, asked = torch.zeros, []

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(args)
        if len(asked) >= number:
            raise error
        return zeros(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="out of memory") as warned:
        patch.setattr(allocate.torch, "zeros", fail)
        outputs = toys.run(cache, target, calls[:5], clock)
        outputs += toys.run(cache, target, calls[5:], clock)
    assert sum("out of memory" in str(w.message) for w in warned) == 1
    assert equal(outputs, toys.plain(toys.build(method), calls)) and not cache.stats.reused
    cache.reset()
    again = toys.run(cache, target, calls, clock)
    assert equal(again, toys.alone(lambda: toys.build(method), method, calls))


# --- nothing left behind --------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY)
def test_finished_requests_that_are_never_reset_leave_nothing(method):
    clock, target = toys.Clock(), toys.build(method)
    cache, sizes = fastcache.enable(target, toys.config(method, clock)), []
    for request in range(40):
        calls = toys.inputs_for(method, seed=request % 3)
        toys.run(cache, target, calls, clock, request=request, num_inference_steps=toys.STEPS)
        sizes.append((len(cache.denoisers[0].pool.states), cache.nbytes()))
    assert sizes[-1] == sizes[20] and sizes[-1][0] <= 16


# --- batches of several requests --------------------------------------------------------------------------


def pair(still: int, moving: int) -> list[dict[str, Tensor]]:
    """Calls on a batch of two samples: one whose first block barely changes, one that does."""
    a, b = toys.inputs(seed=still, batch=1), toys.inputs(seed=moving, batch=1)
    calls = []
    for x, y in zip(a, b, strict=True):
        calm = {**a[0], "timestep": y["timestep"]}  # the same latents on every step
        both = {k: torch.cat([calm[k], y[k]]) for k in x if isinstance(x[k], Tensor)}
        calls.append({**x, **both})
    return calls


def actions(config: Any, calls: list[dict[str, Any]], compiled: bool = False) -> str:
    target = toys.Model()
    with fastcache.enable(target, config) as cache, torch.no_grad():
        call = fastcache.compile(target, backend="eager") if compiled else target
        toys.run(cache, call, calls)
        return "".join("." if r.action == "reuse" else "C" for r in cache.stats)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_computes_if_any_sample_must(compiled):
    calls = pair(0, 1)
    apart = [
        [{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in c.items()} for c in calls]
        for i in range(2)
    ]
    rule = fastcache.FirstBlock(0.4, warmup=0, last=False, per_sample=True)
    alone = [actions(fastcache.Recipe(rule), one) for one in apart]
    assert alone[0] == "C" + "." * (toys.STEPS - 1) != alone[1]  # the moving one computes
    assert actions(fastcache.Recipe(rule), calls, compiled) == alone[1]


def test_a_batch_is_split_into_the_requests_of_its_samples():
    """Two requests at different steps in one batch: each as if it were alone."""
    runs = {r: toys.inputs(seed=r, batch=1) for r in range(2)}
    target = toys.build("first_block")
    cache = fastcache.enable(target, toys.config("first_block"))
    outputs: dict[int, list[Tensor]] = {0: [], 1: []}
    late = 3  # request 1 joins three steps after request 0
    for i in range(toys.STEPS + late):
        members = [(r, i - late * r) for r in range(2) if 0 <= i - late * r < toys.STEPS]
        inputs = {
            k: torch.cat([runs[r][step][k] for r, step in members]) if isinstance(v, Tensor) else v
            for k, v in runs[members[0][0]][members[0][1]].items()
        }
        contexts = [cache.context("cond", request=r, step_index=step) for r, step in members]
        with torch.no_grad():
            output = fastcache.split_batch(target, contexts, inputs)
        for n, (r, _) in enumerate(members):
            outputs[r].append(output[n : n + 1])
    for r, found in outputs.items():
        one = toys.alone(lambda: toys.build("first_block"), "first_block", runs[r])
        assert equal(found, one), r
    with pytest.raises(ValueError, match="inputs"):
        fastcache.split_batch(target, contexts * 7, inputs)
