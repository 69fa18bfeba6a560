# SPDX-License-Identifier: Apache-2.0
"""Callers made by a seed, of every kind that there is, against a judge who knows the truth.

Every value that is reused must be of the same request, branch and run, and no older in steps than the policy
allows; who announces everything must get what the policy plans. `FASTCACHE_CALLERS=20000` plays that many.

Left out, since nothing that the cache is given tells them from callers that are right:

- a run of one step and then another at the same timestep, as far as its first step is concerned: it computes;
- a run that begins at a timestep below the last one of the run before, by hand: it goes on with that one;
- a branch that nobody names, under conditions that change or that others have too, and that is called before those
  others but begins later: until then they were the only branch;
- a branch that is left out from the beginning of a run that nobody announces, and comes with the very next step of
  the run before: it may have gone at a pace of its own;
- requests that nobody names, one step of each at a time, in one thread;
- parts of a latent with clean ones among them while time rises, to a policy that looks at the timestep: which part is
  clean is not known, so it computes.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from field_callers import make
from field_driver import Driver
from field_world import World

from fastcache.runtime import frames, runs, trips
from fastcache.runtime.branches import BranchDetector
from fastcache.runtime.steps import BEGINS, NEXT, StepTracker
from fastcache.storage.unit import Unit
from fastcache.targets.decide import RuleDecider
from fastcache.targets.stack.recording import Recorder

CALLERS = int(os.environ.get("FASTCACHE_CALLERS", 240))
SHARES = 8  # of the callers, a test each
ENOUGH = 600  # callers within which a mutant shows


def play(seed: int) -> World:
    return Driver(make(seed)).play()


@pytest.mark.parametrize("share", range(SHARES))
def test_no_caller_is_given_what_is_not_its_own(share):
    reused = planned = 0
    for seed in range(share, CALLERS, SHARES):
        world = play(seed)
        assert not world.faults, f"caller {seed}: {world.faults[0]}\n" + "\n".join(world.log)
        reused, planned = reused + world.reused, planned + world.planned
    assert reused and planned


def found(what: str) -> bool:
    """Whether this goes wrong for one of the first callers."""
    for seed in range(ENOUGH):
        try:
            world = play(seed)
        except ValueError:  # a caller who is refused is given no wrong value
            continue
        if any(what in fault for fault in world.faults):
            return True
    return False


# --- mutants: each is a mistake that the callers above have to find -------------------------------


def test_an_age_that_nobody_checks_is_found(monkeypatch):
    original = RuleDecider.__init__

    def forgetful(self: RuleDecider, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.oldest = float("inf")

    monkeypatch.setattr(RuleDecider, "__init__", forgetful)
    assert found("steps old")


def test_branches_that_are_never_told_apart_are_found(monkeypatch):
    def one(self: BranchDetector, *_: Any) -> int:
        self.unclear = False
        return 0

    index = StepTracker.index
    monkeypatch.setattr(BranchDetector, "of", one)
    monkeypatch.setattr(
        StepTracker,
        "index",
        lambda *args: (
            (found := index(*args))[0:1] + ((NEXT,) if found[1] == "unclear" else found[1:])
        ),
    )
    assert found("which is of")


def test_runs_whose_start_is_unseen_are_found(monkeypatch):
    index = StepTracker.index

    def on_and_on(self: StepTracker, state: Any, call: Any, *more: Any) -> tuple[int, str]:
        number, how = index(self, state, call, *more)
        if how != BEGINS:
            return number, how
        return (state.index if call.step_index is None else number), NEXT

    monkeypatch.setattr(StepTracker, "index", on_and_on)
    monkeypatch.setattr(runs.Runs, "rejoins", lambda self, *args: self.steps.index(*args))
    assert found("which is of")


def test_values_kept_whatever_their_dtype_are_found(monkeypatch):
    def shapes(args: tuple, kwargs: dict) -> tuple:
        given = (*args, *kwargs.values())
        return tuple((v.shape, v.device) for v in given if isinstance(v, torch.Tensor))

    monkeypatch.setattr(runs, "call_signature", shapes)
    monkeypatch.setattr(Unit, "fits", lambda *_: True)
    assert found("torch.bfloat16 in place of")


def test_requests_that_are_mixed_are_found(monkeypatch):
    push, one = frames.Frame.push, frames.thread_request()

    def mixed(self: Any) -> None:
        push(self)
        self.request = one

    monkeypatch.setattr(frames.Frame, "push", mixed)
    monkeypatch.setattr(trips, "thread_request", lambda: one)
    assert found("which is of")


def test_work_between_blocks_that_is_not_seen_is_found(monkeypatch):
    unseen = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(Recorder, "loop_does_more", unseen, raising=False)
    assert found("work is 2.0, not 1.0")
