# SPDX-License-Identifier: Apache-2.0
"""Storage in host memory: fetched while the call before runs, and never the reason of an error."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
import torch
import toys
from test_mixed import RECIPES, mixed

import fastcache
from fastcache import Interval, Recipe, Taylor
from fastcache.runtime import mixed as mixing
from fastcache.storage import allocate, pool
from fastcache.storage.pool import Slots

RECIPE = Recipe(Interval(3), Taylor(1))
ONE = 2 * 2 * toys.TOKENS * toys.DIM * 4  # bytes of a request: two residuals [2, 6, 8]


@pytest.fixture
def moved(monkeypatch):
    """What is moved, as (how, request), from the moment when it is asked for."""
    seen: list[Any] = []
    for name in ("send_away", "bring_back", "fetch"):
        original = getattr(Slots, name)

        def noted(self, state, *more, name=name, original=original):
            seen.append((name, state.key))
            before = len(seen)
            original(self, state, *more)
            del seen[before:]  # of a fetch on the CPU, how it is done

        monkeypatch.setattr(Slots, name, noted)
    return seen


def served(turns: list[tuple[int, str]], room: int, moved: list, **given: Any) -> list[list]:
    """Per call of requests that take these turns, what was moved in it; each gets what it gets alone."""
    target, at, found = toys.model(), dict.fromkeys(turns, 0), []
    runs = {key: toys.inputs(seed=hash(key) % 1000) for key in at}
    outputs: dict[Any, list] = {key: [] for key in at}
    with fastcache.enable(target, RECIPE, max_bytes=room * ONE, offload=True) as cache:
        for key in turns:
            moved.clear()
            step, (request, name) = at[key], key
            with cache.context(
                name, request=request, step_index=step, num_inference_steps=toys.STEPS
            ):
                outputs[key].append(toys.step(target, runs[key][step]))
            at[key] += 1
            found.append(list(moved))
            assert cache.nbytes() <= room * ONE
        assert not any(r.reason == "no room for a cache" for r in cache.stats)
    for key, calls in runs.items():
        with fastcache.enable(target, RECIPE) as cache:
            wanted = toys.run(cache, target, calls[: at[key]], num_inference_steps=toys.STEPS)
        assert all(torch.equal(a, b) for a, b in zip(outputs[key], wanted, strict=True))
    return found


@pytest.mark.parametrize("branches", [("cond",), ("cond", "uncond")])
@pytest.mark.parametrize("room", [2, 3])
def test_the_call_before_asks_for_the_storage_of_the_next(room, branches, moved):
    cycle = [(request, name) for request in range(4) for name in branches]
    turns = cycle * toys.STEPS
    found = served(turns, room, moved)
    settled = 3 * len(cycle)
    assert any(how == "fetch" for call in found for how, _ in call)
    for i, call in enumerate(found[settled : -2 * len(cycle)], settled):
        fetched = [key for how, key in call if how == "fetch"]
        assert fetched == [turns[i + 1]] or (room > 2 and not fetched), f"call {i}"
        assert not any(how == "bring_back" for how, _ in call), f"call {i}"
        sent = [key for how, key in call if how == "send_away"]
        assert turns[i] not in sent and turns[i + 1] not in sent


def test_with_room_for_one_nothing_is_fetched_ahead(moved):
    cycle = [(request, "cond") for request in range(3)]
    found = served(cycle * toys.STEPS, 1, moved)
    assert not any(how == "fetch" for call in found for how, _ in call)
    assert sum(how == "bring_back" for call in found for how, _ in call) > toys.STEPS


def test_turns_that_change_cost_copies_and_no_more(moved):
    draw = random.Random(0)
    turns = [(draw.randrange(4), "cond") for _ in range(38)]
    turns = [key for i, key in enumerate(turns) if turns[:i].count(key) < toys.STEPS]
    served(turns, 2, moved)


@pytest.mark.parametrize("how", ["send_away", "bring_back", "fetch"])
@pytest.mark.parametrize("error", [MemoryError("none"), RuntimeError("out of memory")])
def test_no_memory_on_the_way_means_compute(how, error, monkeypatch):
    """Of one copy in three the memory is not there."""
    asked = []
    original, make = torch.empty_strided, getattr(Slots, how)

    def failing(self, state, *more):
        def none(*args, **kwargs):
            asked.append(state.key)
            if len(asked) % 3 == 0:
                raise error
            return original(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty_strided", none)
            make(self, state, *more)

    monkeypatch.setattr(Slots, how, failing)
    target, runs = toys.model(), [toys.inputs(seed=r) for r in range(4)]
    plain, worst = [toys.plain(target, calls) for calls in runs], 0.0
    for calls, wanted in zip(runs, plain, strict=True):
        with fastcache.enable(target, RECIPE) as cache:
            alone = toys.run(cache, target, calls, num_inference_steps=toys.STEPS)
        errors = [float((a - b).abs().max()) for a, b in zip(alone, wanted, strict=True)]
        worst = max(worst, *errors)
    with fastcache.enable(target, RECIPE, max_bytes=2 * ONE, offload=True) as cache:
        for step in range(toys.STEPS):
            for request, calls in enumerate(runs):
                with cache.context(
                    request=request, step_index=step, num_inference_steps=toys.STEPS
                ):
                    output = toys.step(target, calls[step])
                assert cache.nbytes() <= 2 * ONE
                if cache.stats[-1].action == "compute":
                    assert torch.equal(output, plain[request][step])
                assert (output - plain[request][step]).abs().max() <= 2 * worst
    assert len(asked) > 3 and cache.stats.reused


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("room", [0.5, 1, 2, 3.5, 100])
@pytest.mark.parametrize("method", ["schedule", "first_block", "taylor_seer"])
def test_traffic_with_requests_that_are_given_up_and_that_fail(method, room, offload):
    """Whatever becomes of the others, a request gets what it would get alone, and in the end all storage is back."""
    recipe = RECIPE if method == "schedule" else toys.config(method)
    draw, target, fails = random.Random(7), toys.model(), False
    with fastcache.enable(target, recipe) as cache:
        toys.run(cache, target, toys.inputs(4), num_inference_steps=toys.STEPS)
        limit = int(room * cache.nbytes())

    def fault(*_: Any) -> None:
        if fails:
            raise RuntimeError("injected")

    target.proj_out.register_forward_hook(fault)
    at: dict[int, int] = {}
    outputs: dict[int, list] = {}
    born = 0
    with fastcache.enable(target, recipe, max_bytes=limit, offload=offload) as cache:
        for _ in range(150):
            while len(at) < 4:
                at[born], outputs[born] = 0, []
                born += 1
            request = draw.choice(list(at))
            step, fails = at[request], draw.random() < 0.03
            call = toys.inputs(seed=request)[step]
            failed = contextlib.suppress(RuntimeError) if fails else contextlib.nullcontext()
            done = False
            with failed:
                with cache.context(
                    request=request, step_index=step, num_inference_steps=toys.STEPS
                ):
                    outputs[request].append(toys.step(target, call))
                done = True
            at[request] += 1
            assert cache.nbytes() <= limit
            if not done or draw.random() < 0.03:  # given up
                del at[request], outputs[request]
                cache.reset(request)
            elif at[request] == toys.STEPS:
                del at[request]
        held = cache.nbytes()
        reused = cache.stats.reused
        for request in list(at):
            cache.reset(request)
        assert cache.nbytes() <= held
        states = [s for d in cache.denoisers for s in d.pool.states.values() if not s.complete]
        assert not states, "a run that was given up still holds storage"
    assert len(outputs) > 10 and (reused or room < 1)
    if (offload and room >= 1) or room > 50:
        for request, found in outputs.items():
            with fastcache.enable(target, recipe) as cache:
                calls = toys.inputs(seed=request)[: len(found)]
                fails = False
                wanted = [
                    out
                    for i, call in enumerate(calls)
                    for out in toys.run(
                        cache, target, [call], step_index=i, num_inference_steps=toys.STEPS
                    )
                ]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), request


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_in_a_batch_of_requests_only_those_go_together_whose_storage_is_there(
    room, offload, monkeypatch
):
    together = mixing._together

    def checked(denoiser, samples, *more):
        assert not any(s.state.away or s.state.evicted for s in samples)
        return together(denoiser, samples, *more)

    monkeypatch.setattr(mixing, "_together", checked)
    whole = mixed(RECIPES["taylor"])[0]
    outputs, *_ = mixed(RECIPES["taylor"], max_bytes=room * ONE, offload=offload)
    for found, wanted in zip(outputs, whole, strict=True):
        torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-5)
        if offload:
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


class Stream:
    """A CUDA stream that notes what waits for it."""

    def __init__(self, name: Any = "aside") -> None:
        self.name = name if isinstance(name, str) else "aside"

    def wait_stream(self, other: Stream) -> None:
        EVENTS.append((self.name, "waits for", other.name))


EVENTS: list[tuple] = []


def test_on_cuda_copies_have_a_stream_of_their_own_which_the_next_call_waits_for(monkeypatch):
    EVENTS.clear()
    compute, cuda = Stream("compute"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: compute)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)

    @contextlib.contextmanager
    def on(stream):
        EVENTS.append(("on", stream.name))
        yield
        EVENTS.append(("off", stream.name))

    monkeypatch.setattr(torch.cuda, "stream", on)
    used = lambda t, stream: EVENTS.append(("memory used by", stream.name))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "record_stream", used)

    def made(shape, dtype, device, strides):
        EVENTS.append(("allocated for", device.type))
        return allocate.allocate(shape, dtype, torch.device("cpu"), strides)

    target, (call, *_) = toys.model(), toys.inputs()
    with fastcache.enable(target, RECIPE, max_bytes=ONE) as cache:
        toys.step(target, call)
        (slots,) = [d.pool for d in cache.denoisers]
        (state,) = slots.states.values()
        value = state.tensors()[0].clone()
        slots.send_away(state)
        state.stream = compute  # as `follow` has it on a GPU
        monkeypatch.setattr(pool, "allocate", made)
        slots.fetch(state, cuda)
        assert EVENTS == [
            ("aside", "waits for", "compute"),  # which has sent it away
            ("allocated for", "cuda"),
            ("aside", "waits for", "compute"),
            ("on", "aside"),
            ("off", "aside"),
            ("memory used by", "aside"),
        ]
        assert not state.away and state.held and torch.equal(state.tensors()[0], value)
        assert state.stream is slots.aside
        EVENTS.clear()
        state.signature = (("tensor", (1,), cuda),)
        pool.follow(state)  # as its next call does first
        assert EVENTS[0] == ("compute", "waits for", "aside") and state.stream is compute
        state.signature = None
