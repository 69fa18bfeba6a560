# SPDX-License-Identifier: Apache-2.0
"""Faults: exceptions anywhere, NaN, many requests, memory; and mutants of the rules, which must be caught."""

from __future__ import annotations

import copy
import gc
import math
import random
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastcache
from fastcache.policies import COMPUTE, REUSE, FirstBlock, Interval, Magnitude, Step, TimestepRange
from fastcache.policies.base import Policy
from fastcache.policies.magnitude import FORMS, _Account, rounded
from fastcache.predictors import TaylorTable
from fastcache.storage.history import Timeline
from fastcache.storage.ring import Ring
from fastcache.storage.state import State
from fastcache.storage.table import Table
from fastcache.storage.unit import Unit

EVERY = toys.METHODS
ERRORS = (RuntimeError, ValueError, KeyboardInterrupt, MemoryError, SystemExit, StopIteration)
INJECTIONS, PER_TEST = 300, 25


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Fault:
    """Raises once, at a given call of a given module."""

    def __init__(self, module: nn.Module, error: type[BaseException], after: bool) -> None:
        self.error, self.armed = error, False
        register = module.register_forward_hook if after else module.register_forward_pre_hook
        self.handle = register(self)

    def __call__(self, *_: Any) -> None:
        if self.armed:
            self.armed = False
            raise self.error("injected")


@pytest.mark.parametrize("part", range(INJECTIONS // (PER_TEST * 6)))
@pytest.mark.parametrize("method", EVERY)
def test_after_any_fault_the_next_run_equals_a_fresh_one(method, part):
    """An exception of any kind, in any module, at any step, in any context, however often."""
    rng = random.Random(f"{method}{part}")
    calls, other = toys.inputs_for(method), toys.inputs_for(method, seed=9)
    fresh = toys.alone(lambda: toys.build(method), method, calls)
    target, clock = toys.build(method), toys.Clock()
    cache = fastcache.enable(target, toys.config(method, clock))
    modules = [m for n, m in target.named_modules() if n and not isinstance(m, nn.ModuleList)]
    raised = 0
    for _ in range(PER_TEST):
        fault = Fault(rng.choice(modules), rng.choice(ERRORS), rng.random() < 0.5)
        at, explicit = rng.randrange(len(calls)), rng.random() < 0.5
        names = rng.sample(["a", "b", "c"], rng.randint(1, 2))
        try:
            for i, call in enumerate(other):
                fault.armed = fault.armed or i == at
                for name in names:
                    toys.run(cache, target, [call], clock, name=name) if explicit else (
                        toys.step(target, call, clock)
                    )
        except BaseException as error:
            assert type(error) is fault.error and error.args == ("injected",)
            raised += 1
            begin = {}
        else:  # the module did not run again: a clean end, or a run cut short
            begin = {"request": "next"} if rng.random() < 0.5 else {}
        fault.handle.remove()
        if fault.armed and not begin:
            cache.reset()
        if explicit:
            assert equal(toys.run(cache, target, calls, clock, name=names[0], **begin), fresh)
        else:
            assert equal([toys.step(target, call, clock) for call in calls], fresh)
        if rng.random() < 0.3:
            cache.reset()
    assert raised >= PER_TEST // 2
    cache.disable()
    assert equal(toys.plain(target, calls), toys.plain(toys.build(method), calls))


def test_three_hundred_faults_are_injected():
    assert len(EVERY) * (INJECTIONS // (PER_TEST * 6)) * PER_TEST == INJECTIONS


@pytest.mark.parametrize("method", EVERY)
def test_a_fault_while_a_value_is_stored_leaves_nothing_behind(method, monkeypatch):
    """The cache itself fails, as out of memory does: still no trace in the next run."""

    calls = toys.inputs_for(method)
    fresh = toys.alone(lambda: toys.build(method), method, calls)
    target, clock = toys.build(method), toys.Clock()
    cache = fastcache.enable(target, toys.config(method, clock))
    for cls in (Ring, Table):
        for name in ("store", "predict"):
            original, count = getattr(cls, name), [0]

            def broken(self, *args, original=original, count=count):
                count[0] += 1
                if count[0] == 3:
                    raise MemoryError("storage")
                return original(self, *args)

            monkeypatch.setattr(cls, name, broken)
            try:
                toys.run(cache, target, toys.inputs_for(method, seed=9), clock)
            except MemoryError as error:
                assert error.args == ("storage",)
            monkeypatch.setattr(cls, name, original)
            assert equal(toys.run(cache, target, calls, clock), fresh)


def test_an_exception_in_one_request_does_not_touch_another():
    for method in EVERY:
        calls = toys.inputs_for(method)
        fresh = toys.alone(lambda m=method: toys.build(m), method, calls)
        target, clock = toys.build(method), toys.Clock()
        cache = fastcache.enable(target, toys.config(method, clock))
        fault = Fault(target.proj_out, RuntimeError, False)
        outputs = []
        for i, call in enumerate(calls):
            outputs += toys.run(cache, target, [call], clock, request="good")
            fault.armed = i % 2 == 1
            if fault.armed:
                with pytest.raises(RuntimeError, match="injected"):
                    toys.run(cache, target, [call], clock, request="bad")
            else:
                toys.run(cache, target, [call], clock, request="bad")
        assert equal(outputs, fresh)


# --- NaN and infinity --------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 3])
def test_first_block_never_reuses_on_or_after_a_value_that_is_not_finite(value, at):
    target, clock = toys.Model(), toys.Clock()
    calls = toys.inputs(speed=0.0)  # latents that stand still: everything else would be reused
    clean = toys.plain(target, calls)
    calls[at] = {**calls[at], "hidden_states": torch.full_like(calls[at]["hidden_states"], value)}
    with fastcache.enable(target, toys.config("first_block", clock, threshold=math.inf)) as cache:
        outputs = toys.run(cache, target, calls, clock)
        actions = toys.actions(cache)
    assert actions[at] == "C" and actions[at + 1] == "C", actions
    assert set(actions[at + 2 :]) == {"."}, actions
    for i, (a, b) in enumerate(zip(outputs, clean, strict=True)):
        assert i == at or (torch.isfinite(a).all() and (a - b).abs().max() < 0.2), i


@pytest.mark.parametrize("method", EVERY)
def test_a_run_full_of_nan_does_not_reach_the_next_one(method):
    calls = toys.inputs_for(method)
    fresh = toys.alone(lambda: toys.build(method), method, calls)
    target, clock = toys.build(method), toys.Clock()
    cache = fastcache.enable(target, toys.config(method, clock))
    for value in (math.nan, math.inf):
        sick = [{**c, "hidden_states": c["hidden_states"] + value} for c in calls]
        toys.run(cache, target, sick, clock)
        assert equal(toys.run(cache, target, calls, clock), fresh)


# --- many requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY)
def test_64_interleaved_requests_of_two_contexts_equal_the_same_requests_alone(method):
    """Requests start at different moments, in random order, and are reset at random when done."""
    rng = random.Random(method)
    runs = {
        (request, name): toys.inputs_for(method, steps=6, seed=request * 2 + branch, batch=4)
        if method != "faster_guided"
        else toys.inputs_for(method, steps=6, seed=request * 2 + branch)
        for request in range(64)
        for branch, name in enumerate(("a", "b"))
    }
    target, clock = toys.build(method), toys.Clock()
    cache = fastcache.enable(target, toys.config(method, clock))
    outputs: dict[Any, list[Tensor]] = {key: [] for key in runs}
    waiting, active = list(runs), []
    rng.shuffle(waiting)
    while waiting or active:
        while waiting and len(active) < 32:
            active.append(waiting.pop())
        key = rng.choice(active)
        done = len(outputs[key])
        outputs[key] += toys.run(
            cache, target, [runs[key][done]], clock, name=key[1], request=key[0]
        )
        if done + 1 == len(runs[key]):
            active.remove(key)
    strips = toys.actions(cache)
    assert "." in strips and "C" in strips
    fresh = fastcache.enable(alone := toys.build(method), toys.config(method, clock))
    for key, calls in runs.items():
        fresh.reset()
        assert equal(outputs[key], toys.run(fresh, alone, calls, clock)), key


def test_threads_are_right():
    """One model, one cache, a thread per request: calls take turns."""
    method, results = "mag_cache", {}
    target = toys.Model()
    cache = fastcache.enable(target, toys.config(method))

    def work(request: int) -> None:
        results[request] = toys.run(cache, target, toys.inputs(seed=request), request=request)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for request in range(4):
        assert equal(results[request], toys.alone(toys.Model, method, toys.inputs(seed=request)))


# --- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY)
def test_memory_is_flat_over_many_steps(method):
    """Bytes held by the cache, live tensors, and Python's own allocations."""
    calls = toys.inputs_for(method)
    target, clock = toys.build(method), toys.Clock()
    cache = fastcache.enable(target, toys.config(method, clock))

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    def rounds(n: int) -> None:
        for i in range(n):
            toys.run(cache, target, calls, clock, request=i % 3)
            cache.stats.clear()
        cache.reset()

    rounds(6)
    held, alive = cache.nbytes(), tensors()
    tracemalloc.start()
    rounds(6)
    gc.collect()
    start = tracemalloc.get_traced_memory()[0]
    rounds(20)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - start
    tracemalloc.stop()
    assert cache.nbytes() == held
    assert tensors() <= alive + 2
    assert grown < 60_000, f"{grown} bytes in 200 steps"  # a record per step would be more


def test_records_do_not_grow_without_end():
    from fastcache.runtime import stats

    cache = fastcache.enable(toys.Model(), toys.config("mag_cache"))
    record = stats.Record(0, "a", 0, COMPUTE, None, None, "")
    for _ in range(stats.KEEP + 10):
        cache.stats.add(record)
    assert len(cache.stats) == stats.KEEP


# --- mutants --------------------------------------------------------------------------------------------


def decisions(policy: Policy, signals: list[Any], **step: Any) -> str:
    run = policy.begin(len(signals))
    made = [policy.decide(run, Step(i, len(signals), **step), s) for i, s in enumerate(signals)]
    return "".join("C" if d.action == COMPUTE else "." for d in made)


def timed(policy: Policy, times: list[float]) -> str:
    run = policy.begin(len(times))
    made = [policy.decide(run, Step(i, len(times), t)) for i, t in enumerate(times)]
    return "".join("C" if d.action == COMPUTE else "." for d in made)


def rules() -> dict[str, Any]:
    """What the rules decide on cases chosen to lie on every edge."""
    bare = {"warmup": 0, "max_skips": 0, "last": False}
    first = FirstBlock(0.1, **bare)
    ratios = (1.0, 1.0, 1.1, 0.95, 1.0, 1.0, 1.0, 1.0, 1.02, 1.0)
    fall = [900.0, 800.0, 799.0, 500.0, 300.0, 101.0, 100.0, 50.0]
    interval = Interval(5, phase=4, stop=12, warmup=3, max_skips=0, last=False)
    return {
        "first block": decisions(first, [None, 0.1, 0.1001, math.nan, math.inf, 0.0, -0.0]),
        "endless": decisions(FirstBlock(math.inf, **bare), [None, 9.0, math.inf, math.nan]),
        "guards": decisions(
            FirstBlock(1.0, warmup=2, max_skips=2, last=True), [None, *[0.0] * 8]
        ),
        "magnitude": decisions(Magnitude(0.1, 2, 0.2, 10, ratios, **bare), [None] * 10),
        "magnitude, wide": decisions(Magnitude(0.5, 9, 0.25, 10, ratios, **bare), [None] * 10),
        "interval": decisions(interval, [None] * 14),
        "range": timed(TimestepRange(100, (100, 800), **bare), fall),
        "range of two": timed(TimestepRange(2, (100, 800), **bare), fall),
        "half": timed(TimestepRange(2, (0, 999), conditional_only=True, **bare), fall),
        "taylor": TaylorTable(3).weights((9, 4, 2, 1), 12),
        "latest gap": fastcache.Taylor(2).weights((9, 4, 2), 10),
        "extrapolate": fastcache.Extrapolate(0.3).weights((5, 4), 6),
    }  # fmt: skip


EXPECTED = {
    "first block": "C.CCC..",
    "endless": "C.CC",
    "guards": "CC..C..CC",
    "magnitude": "CCC.C..C..",
    "magnitude, wide": "CCC.......",
    "interval": "CCC.C....C..CC",
    "range": "CC....CC",
    "range of two": "CCC.C.CC",
    "half": "CCCCCCCC",
    "taylor": (1.0, 3.0, 4.5, 4.5),
    "latest gap": pytest.approx((1.22, -0.27, 0.05)),
    "extrapolate": (1.3, -0.3),
}


def test_the_rules_decide_as_specified():
    assert rules() == EXPECTED


class Mutant(NamedTuple):
    """A method that behaves otherwise: `mutate` gets the original and gives what stands in its place."""

    owner: type
    name: str
    mutate: Callable[[Callable], Callable]


MUTANTS: dict[str, Mutant] = {}


def mutant(owner: type, name: str, table: dict[str, Mutant] = MUTANTS) -> Callable:
    """Enter the function below into a table of mutants, under what its name says."""

    def enter(mutate: Callable) -> Callable:
        table[mutate.__name__] = Mutant(owner, name, mutate)
        return mutate

    return enter


def take_effect(chosen: Mutant, monkeypatch: Any) -> None:
    original = getattr(chosen.owner, chosen.name)
    monkeypatch.setattr(chosen.owner, chosen.name, chosen.mutate(original))


def with_fields(**changes: Callable[[Any], Any]) -> Callable:
    """A mutant of a policy's method that sees other fields than the policy has."""

    def mutate(original: Callable) -> Callable:
        def method(self, *args):
            other = copy.copy(self)
            for field, change in changes.items():
                if getattr(self, field) is not None:
                    object.__setattr__(other, field, change(getattr(self, field)))
            return original(other, *args)

        return method

    return mutate


def with_step(change: Callable[[Any, Step], Step]) -> Callable:
    """A mutant of a rule that sees another step than there is."""

    def mutate(original: Callable) -> Callable:
        return lambda self, run, step, *rest: original(self, run, change(self, step), *rest)

    return mutate


@mutant(FirstBlock, "_judge")
def equality_computes(original):
    def method(self, run, step, signal, guard):
        made = original(self, run, step, signal, guard)
        return made._replace(action=COMPUTE) if signal == self.threshold else made

    return method


@mutant(FirstBlock, "_judge")
def large_changes_are_reused(original):
    def method(self, run, step, signal, guard):
        made = original(self, run, step, signal, guard)
        if guard or signal is None:
            return made
        return made._replace(action=REUSE if signal >= self.threshold else COMPUTE)

    return method


@mutant(FirstBlock, "_judge")
def infinity_is_a_number(original):
    def method(self, run, step, signal, guard):
        made = original(self, run, step, signal, guard)
        within = not guard and signal is not None and signal <= self.threshold
        return made._replace(action=REUSE) if within else made

    return method


@mutant(FirstBlock, "_judge")
def guards_are_not_heard(original):
    return lambda self, run, step, signal, guard: original(self, run, step, signal, "")


MUTANTS |= {
    "a_longer_warm_up": Mutant(Policy, "must_compute", with_fields(warmup=lambda n: n + 1)),
    "a_longer_row": Mutant(Policy, "must_compute", with_fields(max_skips=lambda n: n and n + 1)),
    "the_last_step_is_missed": Mutant(
        Policy, "must_compute", with_step(lambda self, s: s._replace(total=s.total + 1))
    ),
    "one_skip_less": Mutant(Magnitude, "_judge", with_fields(max_skip_steps=lambda n: n - 1)),
    "stop_comes_late": Mutant(Interval, "_judge", with_fields(stop=lambda n: n + 1)),
    "phase_comes_early": Mutant(Interval, "_judge", with_fields(phase=lambda n: n - 1)),
    "ends_belong_to_the_range": Mutant(
        TimestepRange,
        "_judge",
        with_fields(
            timesteps=lambda r: (
                math.nextafter(r[0], -math.inf),
                math.nextafter(r[1], math.inf),
            )
        ),
    ),
    "the_other_steps_are_due": Mutant(
        TimestepRange, "_judge", with_step(lambda self, s: s._replace(index=s.index + self.n - 1))
    ),
    "the_other_half": Mutant(
        TimestepRange,
        "_judge",
        with_step(lambda self, s: s._replace(guidance_skipped=not s.guidance_skipped)),
    ),
}


@mutant(Policy, "decide")
def rows_are_not_counted(original):
    def method(self, run, step, signal=None):
        made = original(self, run, step, signal)
        run.in_a_row = 0
        return made

    return method


@mutant(Magnitude, "_judge")
def no_error_is_small_enough(original):
    def method(self, run, *args):
        run.memory.threshold = -1.0
        return original(self, run, *args)

    return method


@mutant(Magnitude, "begin")
def one_more_is_retained(original):
    def method(self, total=None):
        run = original(self, total)
        run.memory.retained += 1
        return run

    return method


@mutant(Magnitude, "begin")
def retention_is_rounded_down(original):
    def method(self, total=None):
        run = original(self, total)
        run.memory.retained = int(self.retention_ratio * (total or self.num_inference_steps))
        return run

    return method


@mutant(_Account, "clear")
def the_error_is_carried_on(original):
    return lambda self: None if hasattr(self, "steps") else original(self)


@mutant(_Account, "add")
def errors_cancel(original):
    def method(self, ratio):
        before = self.error
        more = original(self, ratio) - before
        self.error = before - more if self.ratio > 1 else before + more
        return self.error

    return method


@mutant(TaylorTable, "weights")
def no_factorials(original):
    return lambda self, *args: tuple(
        w * math.factorial(k) for k, w in enumerate(original(self, *args))
    )


@mutant(TaylorTable, "weights")
def a_step_too_far(original):
    return lambda self, steps, step: original(self, steps, step + 1)


@mutant(fastcache.Extrapolate, "weights")
def backwards(original):
    def method(self, *args):
        newest, *older = original(self, *args)
        return (2.0 - newest, *(-w for w in older))

    return method


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_a_rule_is_caught(name, monkeypatch):
    take_effect(MUTANTS[name], monkeypatch)
    assert rules() != EXPECTED


def test_no_mutant_stays_behind():
    """Each is another one than the original, and gone after its test."""
    assert len(MUTANTS) == 22 and len(STATE_MUTANTS) == 6
    assert rules() == EXPECTED


@settings(deadline=None, derandomize=True)
@given(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=12))
def test_accumulated_ratios_have_the_bits_of_float32(ratios):
    """diffusers accumulates in the dtype of its ratios; ours are Python numbers, rounded."""
    account = _Account(rounded(tuple(ratios), "float32"), 0, 1.0, FORMS["float32"])
    ratio, error = np.float32(1.0), np.float32(0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        for i, value in enumerate(ratios):
            ratio = ratio * np.float32(value)
            error = error + abs(np.float32(1.0) - ratio)
            assert np.array_equal(np.float32(account.add(account.ratios[i])), error, equal_nan=True)
            assert np.array_equal(np.float32(account.ratio), ratio, equal_nan=True)


STATE_MUTANTS: dict[str, Mutant] = {}


@mutant(State, "begin_run", STATE_MUTANTS)
def runs_go_on(original):
    """A run that begins counts on from the one before."""

    def method(self):
        index = getattr(self, "index", 0)
        original(self)
        self.index = index

    return method


@mutant(State, "empty", STATE_MUTANTS)
def histories_go_on(original):
    """What a run has stored counts as the next one's."""

    def method(self):
        kept = [(t.steps, t.rows, t.pushes) for t in self.timelines]
        original(self)
        for timeline, facts in zip(self.timelines, kept, strict=True):
            timeline.steps, timeline.rows, timeline.pushes = facts

    return method


@mutant(Unit, "ready", STATE_MUTANTS)
def gaps_are_not_seen(original):
    """A unit that has missed a step of its timeline counts as up to date."""

    def method(self, timeline):
        last, self.last = self.last, timeline.pushes - 1
        try:
            return original(self, timeline)
        finally:
            self.last = last

    return method


@mutant(Ring, "unmodified", STATE_MUTANTS)
def writes_are_not_seen(original):
    return lambda self: True


@mutant(Timeline, "push", STATE_MUTANTS)
def every_value_counts_twice(original):
    def method(self, step):
        original(self, step)
        self.pushes += 1

    return method


@mutant(Timeline, "gap", STATE_MUTANTS)
def gaps_reach_to_the_oldest(original):
    return lambda self, step: original(
        self, step + self.steps[0] - self.steps[-1] if self.steps else step
    )


class Skipping(toys.Block):
    """Calls its attention only while the latents are positive at one place."""

    def change(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        if hidden_states[0, 0, 0] < 0:
            return hidden_states * 0.1
        return self.attn(hidden_states)


def behaviour() -> None:
    """A handful of whole runs that state mistakes must disturb."""
    from test_contract import test_a_consumer_may_write_into_what_a_reused_module_returned as writer

    calls, clock = toys.inputs(speed=0.0), toys.Clock()
    target = toys.Model(block=Skipping, depth=1)
    sign = torch.sign(target.embed(calls[0]["hidden_states"])[0, 0, 0])
    runs = []
    target.embed.register_forward_hook(lambda m, a, out: out * sign * (1 - 2 * (len(runs) in (4,))))
    target.blocks[0].attn.to_q.register_forward_hook(lambda *_: ran.add(len(runs)))
    ran: set[int] = set()
    recipe = fastcache.Recipe(fastcache.Interval(4), where=fastcache.Modules(("attn",)))
    with fastcache.enable(target, recipe) as cache:
        for call in calls:
            runs += toys.run(cache, target, [call], clock)
    # step 4 was due but its attention was not called, so the value of step 0 is too old for step 5;
    # where modules decide together (some of the model may be compiled), step 5 stores a new one
    assert ran in ({0, 5, 6, 7, 8}, {0, 5, 8}), ran

    for method in ("first_block", "mag_cache", "taylor_seer", "pyramid", "taylor_two"):
        more = {"max_order": 2} if method == "taylor_two" else {}
        method = "taylor_seer" if more else method
        calls, other = toys.inputs_for(method), toys.inputs_for(method, seed=9)
        target, clock = toys.build(method), toys.Clock()
        cache = fastcache.enable(target, toys.config(method, clock, **more))
        fault = Fault(target.blocks[1].attn, RuntimeError, True)
        for at in (6, 4):
            for i, call in enumerate(other):
                fault.armed = i == at
                try:
                    toys.run(cache, target, [call], clock)
                except RuntimeError:
                    break
        fault.armed = False
        outputs = toys.run(cache, target, calls, clock)
        strip = toys.actions(cache)[-len(calls) :]
        assert strip == STRIPS[method], strip
        assert equal(outputs, toys.alone(lambda m=method: toys.build(m), method, calls, **more))
        writer(method)
    target = toys.Model()
    config = toys.config("taylor_seer", max_order=2, taylor_factors_dtype=None)
    with fastcache.enable(target, config) as cache:
        seen: list[Tensor] = []
        target.blocks[0].attn.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
        toys.run(cache, target, toys.inputs())
    assert toys.actions(cache) == "CC.C..C..C"
    first = (seen[3] - seen[1]) / 2  # over two steps
    second = (first - (seen[1] - seen[0])) / 2
    assert torch.allclose(seen[4], seen[3] + first + second / 2, atol=1e-5)


STRIPS = {
    "first_block": "CCC...CCCC",
    "mag_cache": "CC...C...C",
    "taylor_seer": "CC.C..C..C",
    "pyramid": "CCC.C.C.CC",
}


def test_whole_runs_behave():
    behaviour()


@pytest.mark.parametrize("name", STATE_MUTANTS)
def test_a_mutant_of_the_state_is_caught(name, monkeypatch):
    take_effect(STATE_MUTANTS[name], monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError, ZeroDivisionError)):
        behaviour()


def test_reuse_is_a_word_of_the_contract():
    assert (COMPUTE, REUSE) == ("compute", "reuse")
