# SPDX-License-Identifier: Apache-2.0
"""Random sequences of enable, step, raise, reset, update and disable against a simple oracle.

The oracle: a run is a model and a cache of its own, fed the same calls. Every output must have the same
bits, every record the same step and action, whatever else happened in between.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo  # once it is imported, contexts prepare calls that may run inside a graph
import toys
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import fastcache
from fastcache.runtime import denoiser, runs

REQUESTS, NAMES = (0, "r1", ("r", 2)), ("a", "b")
KEYS = st.tuples(st.sampled_from(REQUESTS), st.sampled_from(NAMES))
_inputs: dict[Any, list[dict[str, Any]]] = {}


def inputs_of(method: str, key: tuple, wide: bool) -> list[dict[str, Any]]:
    made = (method, key, wide)
    if made not in _inputs:
        calls = toys.inputs_for(method, seed=sum(map(ord, repr(key))))
        if wide:
            calls = [{k: torch.cat([v, v]) for k, v in call.items()} for call in calls]
        _inputs[made] = calls
    return _inputs[made]


class Run:
    """The oracle of one (request, context): a model and a cache that nothing else touches."""

    def __init__(self, method: str) -> None:
        self.clock, self.model = toys.Clock(), toys.build(method)
        self.cache = fastcache.enable(self.model, toys.config(method, self.clock))
        self.steps = 0

    def step(self, call: dict[str, Any]) -> Tensor:
        (out,) = toys.run(self.cache, self.model, [call], self.clock)
        self.steps += 1
        return out


class Machine(RuleBasedStateMachine):
    method = ""

    @initialize(explicit=st.booleans())
    def start(self, explicit: bool) -> None:
        self.explicit = explicit  # whether contexts give step_index
        self.clock, self.model = toys.Clock(), toys.build(self.method)
        self.before = toys.snapshot(self.model)
        self.cache: fastcache.Cache | None = None
        self.at: dict[tuple, int] = {}  # next call of each key's trajectory
        self.wide: dict[tuple, bool] = {}
        self.runs: dict[tuple, Run] = {}
        self.seen = 0
        self.enable()

    # --- what may happen ---------------------------------------------------------------------------

    @precondition(lambda self: self.cache is None)
    @rule()
    def enable(self) -> None:
        self.cache = fastcache.enable(self.model, toys.config(self.method, self.clock))
        self.forget(lambda key: True)
        self.seen = 0

    @precondition(lambda self: self.cache is not None)
    @rule()
    def enable_again(self) -> None:
        with pytest.raises(ValueError, match="already enabled"):
            fastcache.enable(self.model, toys.config(self.method, self.clock))

    @precondition(lambda self: self.cache is not None and self.seen > 5)
    @rule(times=st.integers(1, 2))
    def disable(self, times: int) -> None:
        for _ in range(times):
            self.cache.disable()
        self.cache = None
        assert toys.snapshot(self.model) == self.before

    @precondition(lambda self: self.cache is None)
    @rule(key=KEYS)
    def step_without_a_cache(self, key: tuple) -> None:
        call = inputs_of(self.method, key, False)[0]
        assert torch.equal(toys.step(self.model, call), toys.step(toys.build(self.method), call))

    @precondition(lambda self: self.cache is not None)
    @rule()
    def update(self) -> None:
        self.cache.update(toys.config(self.method, self.clock))
        self.forget(lambda key: True)

    @precondition(lambda self: self.cache is not None)
    @rule(key=KEYS, count=st.integers(1, 6))
    def step(self, key: tuple, count: int) -> None:
        for _ in range(count):
            if self.at.get(key, 0) >= toys.STEPS:
                self.begin(key)
            self.check(key, *self.call(key))

    @precondition(lambda self: self.cache is not None)
    @rule(outer=KEYS, inner=KEYS)
    def step_inside_another_context(self, outer: tuple, inner: tuple) -> None:
        if outer == inner:
            return
        for key in (outer, inner):
            if self.at.get(key, 0) >= toys.STEPS:
                self.begin(key)
        call, context = self.call(outer)
        self.clock.now = float(call["timestep"][0])  # current when the context is entered
        with self.cache.context(outer[1], request=outer[0], **context):
            self.check(inner, *self.call(inner))
            self.clock.now = float(call["timestep"][0])
            out = toys.step(self.model, call)
        self.compare(outer, call, out)

    @precondition(lambda self: self.cache is not None)
    @rule(key=KEYS)
    def begin(self, key: tuple) -> None:
        """The trajectory starts again: timestep and step index go back."""
        if self.at.get(key, 0) > 1:
            self.at[key] = 0
            self.runs.pop(key, None)

    @precondition(lambda self: self.cache is not None)
    @rule(key=KEYS, around=st.integers(0, 3))
    def change_shape(self, key: tuple, around: int) -> None:
        """In the middle of a run: only the shape says that another one begins."""
        self.step(key, around)
        if self.at.get(key, 0) >= toys.STEPS:
            self.begin(key)
        self.wide[key] = not self.wide.get(key, False)
        self.runs.pop(key, None)
        if self.explicit:
            self.at[key] = 0
        self.step(key, around)

    @precondition(lambda self: self.cache is not None)
    @rule(
        key=KEYS,
        place=st.sampled_from(["embed", "blocks.0", "blocks.1.attn", "blocks.2", "proj_out"]),
        error=st.sampled_from([RuntimeError, KeyboardInterrupt, ValueError]),
        late=st.booleans(),
        around=st.integers(0, 3),
    )
    def fault(
        self, key: tuple, place: str, error: type[BaseException], late: bool, around: int
    ) -> None:
        self.step(key, around)
        if self.at.get(key, 0) >= toys.STEPS:
            self.begin(key)

        def fail(*_: Any) -> None:
            raise error("injected")

        module = self.model.get_submodule(place)
        register = module.register_forward_hook if late else module.register_forward_pre_hook
        handle, (call, context) = register(fail), self.call(key)
        self.clock.now = float(call["timestep"][0])
        try:
            with self.cache.context(key[1], request=key[0], **context):
                out = toys.step(self.model, call)
        except BaseException as caught:
            assert type(caught) is error and caught.args == ("injected",)
            handle.remove()
            self.forget(lambda other: other[0] == key[0])
            self.seen = len(list(self.cache.stats))
        else:  # the step was reused and the module did not run
            handle.remove()
            self.compare(key, call, out)
        self.step(key, around)

    @precondition(lambda self: self.cache is not None)
    @rule(key=KEYS, everything=st.booleans(), around=st.integers(0, 3))
    def reset(self, key: tuple, everything: bool, around: int) -> None:
        self.step(key, around)
        self.cache.reset(None if everything else key[0])
        self.forget(lambda other: everything or other[0] == key[0])
        self.step(key, around)

    # --- the oracle ------------------------------------------------------------------------------------

    def forget(self, which: Any) -> None:
        """Runs end. Explicit indices start again; without them the timestep just goes on falling."""
        for key in [k for k in {*self.runs, *self.at} if which(k)]:
            self.runs.pop(key, None)
            if self.explicit:
                self.at[key] = 0

    def call(self, key: tuple) -> tuple[dict[str, Any], dict[str, Any]]:
        i = self.at.get(key, 0)
        call = inputs_of(self.method, key, self.wide.get(key, False))[i]
        return call, {"step_index": i} if self.explicit else {}

    def check(self, key: tuple, call: dict[str, Any], context: dict[str, Any]) -> None:
        (out,) = toys.run(
            self.cache, self.model, [call], self.clock, key[1], request=key[0], **context
        )
        self.compare(key, call, out)

    def compare(self, key: tuple, call: dict[str, Any], out: Tensor) -> None:
        run = self.runs.setdefault(key, Run(self.method))
        expected = run.step(call)
        assert torch.equal(out, expected)
        record, other = list(self.cache.stats)[-1], list(run.cache.stats)[-1]
        assert (record.request, record.context) == key
        assert record.step == other.step == run.steps - 1
        assert record[3:7] == other[3:7]
        self.at[key] = self.at.get(key, 0) + 1
        self.seen += 1

    @invariant()
    def records_are_complete(self) -> None:
        if getattr(self, "cache", None) is not None:
            assert len(list(self.cache.stats)) == self.seen
            assert list(self.model.state_dict()) == self.before[""]


def agrees(method: str) -> None:
    kind = type(f"Machine_{method}", (Machine,), {"method": method})
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=12,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],  # a failure prints its steps; shrinking them takes minutes
        ),
    )


@pytest.mark.parametrize("method", toys.METHODS)
def test_any_sequence_of_events_agrees_with_the_oracle(method):
    agrees(method)


def survive_faults(monkeypatch) -> None:
    """Exceptions no longer forget the request's runs."""
    for room in ("denoiser", "called"):
        monkeypatch.setattr(f"fastcache.runtime.{room}.abandon", lambda pools, request: None)


def told_otherwise(monkeypatch, **fields) -> None:
    """Contexts say something else than they were opened with."""
    original = denoiser.latest

    def other():
        frame = copy.copy(original())
        for name, value in fields.items() if frame is not None else ():
            setattr(frame, name, value)
        return frame

    monkeypatch.setattr(denoiser, "latest", other)


def share_contexts(monkeypatch) -> None:
    told_otherwise(monkeypatch, name="a")


def share_requests(monkeypatch) -> None:
    told_otherwise(monkeypatch, request=0)


def survive_resets(monkeypatch) -> None:
    monkeypatch.setattr(runs.Runs, "reset", lambda self, request=None: None)


def survive_shapes(monkeypatch) -> None:
    monkeypatch.setattr(runs, "call_signature", lambda args, kwargs: ())


@pytest.mark.parametrize(
    "mutate", [survive_faults, share_contexts, share_requests, survive_resets, survive_shapes]
)
def test_the_oracle_notices_a_mutant_of_the_runtime(mutate, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        agrees("mag_cache")
