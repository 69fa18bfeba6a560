# SPDX-License-Identifier: Apache-2.0
"""Callers that the simulator has found: what went wrong for each of them, in as few calls as it takes."""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from field_callers import WIDTH
from field_world import KINDS, Kind, OnDevice, Truth, World, far
from torch import Tensor

import fastcache
from fastcache import Interval, Recipe, Reuse, TimestepRange

GUARDS = {"warmup": 0, "last": False}
LONG = Kind(Recipe(Interval(8, **GUARDS), Reuse()), 7)  # reuses for as long as it may


class Caller:
    """Calls of a world under a cache, each by its run, branch and step."""

    def __init__(self, kind: Kind, target: Any = None) -> None:
        self.world = World(kind)
        self.target = self.world.models[0] if target is None else target(self.world.models)

    @contextlib.contextmanager
    def under_a_cache(self) -> Iterator[fastcache.Cache]:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", fastcache.FastcacheWarning)
            with fastcache.enable(self.target, self.world.kind.recipe) as cache:
                yield cache
        assert not self.world.faults, "\n".join([*self.world.faults, *self.world.log])

    def call(
        self,
        run: int,
        branch: str,
        step: int,
        time: Any,
        text: Any = None,
        which: int = 0,
        batch: int = 1,
    ) -> None:
        time = time if isinstance(time, Tensor) else torch.tensor([float(time)])
        latents = torch.full((batch, 1, WIDTH), run + step / 32)
        latents = far(latents) if isinstance(time, OnDevice) else latents
        given = {"hidden_states": latents, "timestep": time, "encoder_hidden_states": text}
        self.world.call(Truth((run, branch, which), step), given, which)


def test_clean_parts_do_not_stop_the_clock_where_time_rises():
    caller = Caller(LONG)
    with caller.under_a_cache():
        for run in range(3):
            for step, t in enumerate((0.0, 0.1, 0.2, 0.3, 0.4, 0.5)):
                caller.call(run, "cond", step, torch.tensor([[1.0, t, t]]))


@pytest.mark.parametrize("times", [(0.5, 0.6, 0.7), (0.5, 0.75), (0.0, 0.25, 0.5, 0.75)])
def test_runs_too_short_to_learn_from_that_time_rises_are_never_mixed(times):
    caller = Caller(LONG)
    with caller.under_a_cache():
        for run in range(4):
            for step, t in enumerate(times):
                caller.call(run, "cond", step, t)


def test_a_branch_that_pauses_where_time_rises_unlearnt_is_never_mixed():
    caller = Caller(LONG)
    with caller.under_a_cache() as cache:
        for run in range(2):
            for step, t in enumerate((0.0, 0.25, 0.5, 0.75)):
                for name in ("cond", "weaker") if step in (0, 3) else ("cond",):
                    with cache.context(name):
                        caller.call(run, name, step, t)


def test_a_policy_that_looks_at_the_timestep_is_told_it_also_with_a_step_index():
    caller = Caller(Kind(Recipe(TimestepRange(2, (100, 900), **GUARDS), Reuse()), 1))
    with caller.under_a_cache() as cache:
        for step, t in enumerate((1000, 800, 600, 400, 200)):
            with cache.context("cond", step_index=step):
                caller.call(0, "cond", step, t)
    assert caller.world.reused == 2


@pytest.mark.parametrize("left_out", ["cond", "uncond"])
def test_one_branch_alone_in_a_context_around_both(left_out):
    texts = {"cond": torch.ones(1), "uncond": torch.zeros(1)}
    caller = Caller(LONG)
    with caller.under_a_cache() as cache:
        for step in range(7):
            with cache.context("mine"):
                for name, text in texts.items():
                    if name != left_out or not 2 <= step < 5:
                        caller.call(0, name, step, 1000 - 100 * step, text)
    assert caller.world.reused > 6


def test_what_a_context_says_holds_for_all_calls_in_it():
    caller = Caller(LONG)
    with caller.under_a_cache() as cache:
        for step in range(4):
            with cache.context("mine", compute=step == 2):
                for name, text in (("cond", 1.0), ("uncond", 0.0)):
                    caller.call(0, name, step, 1000 - 100 * step, text)
        assert [r.action for r in cache.stats if r.step == 2] == ["compute", "compute"]
        assert [r.action for r in cache.stats if r.step == 3] == ["reuse", "reuse"]


def test_windows_that_nobody_names_stay_unclear_also_where_one_comes_alone():
    caller = Caller(LONG)
    with caller.under_a_cache():
        for step, names in enumerate(("012", "012", "0", "0", "1", "12")):
            for name in names:
                caller.call(0, name, step, 1000 - 100 * step)


def test_a_third_branch_of_the_same_shape_is_not_taken_for_the_second():
    texts = {n: torch.full((1,), float(i)) for i, n in enumerate(("cond", "uncond", "third"))}
    caller = Caller(LONG)
    with caller.under_a_cache():
        for step, names in enumerate((("cond", "third"), tuple(texts), tuple(texts))):
            for name in names:
                caller.call(
                    0, name, step, 1000 - 100 * step, texts[name], batch=1 + (name == "cond")
                )


def test_calls_without_a_step_index_do_not_go_on_with_those_that_had_one():
    caller = Caller(LONG)
    with caller.under_a_cache() as cache:
        with cache.context("cond", step_index=0):
            caller.call(0, "cond", 0, 500)
        for step in range(3):
            with cache.context("cond"):
                caller.call(1, "cond", step, 1000 - 100 * step)


@pytest.mark.parametrize("announced", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_branch_that_comes_late_belongs_to_the_run_that_the_others_have_begun(indexed, announced):
    """The run before was stopped early; in this one guidance begins late."""
    caller = Caller(LONG)
    with caller.under_a_cache() as cache:
        with cache.run() if announced else contextlib.nullcontext():
            for run, (first, stop) in enumerate(((0, 2), (4, 6), (5, 7))):
                for step in range(stop):
                    for name in ("cond", "uncond"):
                        if name == "cond" or step >= first:
                            with cache.context(name, step_index=step if indexed else None):
                                caller.call(run, name, step, 1000 - 100 * step)


def test_how_old_a_value_is_is_known_in_every_run():
    caller = Caller(KINDS["Interval"])
    with caller.under_a_cache() as cache:
        for run in range(2):
            for step in range(7):
                for name in ("cond", "uncond"):
                    if name == "cond" or not 1 <= step < 4:
                        with cache.context(name):
                            caller.call(run, name, step, 1000 - 100 * step)


def test_a_first_step_that_comes_twice_casts_doubt_on_the_other_branches_too():
    """A run of one step, and then one in which the other branch pauses: it may not take the value of the first."""
    caller = Caller(LONG)
    with caller.under_a_cache() as cache:
        for run, steps in enumerate((("ab",), ("a", "ab"))):
            for step, names in enumerate(steps):
                for name in names:
                    with cache.context(name):
                        caller.call(run, name, step, 1000 - 100 * step)


def piped(models: list[Any]) -> Any:
    """A pipeline of two experts whose loops nobody announces; its scheduler counts steps."""

    class Pipeline:
        def __init__(self) -> None:
            self.transformer, self.transformer_2 = models
            self.scheduler = SimpleNamespace(order=1, config=SimpleNamespace(), _step_index=None)

        def __call__(self, chunks: int, experts: int, caller: Caller, place: Any) -> None:
            for run in range(chunks):
                times = self.scheduler.timesteps = place(torch.tensor([1000.0, 800.0, 600.0]))
                self.scheduler._step_index = None
                for step, t in enumerate(times):
                    which = int(experts > 1 and step > 0 and (run == 0 or step > 1))
                    caller.call(run, "cond", step, t, which=which)
                    self.scheduler._step_index = step + 1

    return Pipeline()


@pytest.mark.parametrize("place", [lambda t: t, far], ids=["host", "device"])
@pytest.mark.parametrize("experts", [1, 2])
def test_loops_within_one_call_of_a_pipeline_that_shows_no_progress(experts, place):
    caller = Caller(LONG, piped)
    with caller.under_a_cache():
        caller.target(3, experts, caller, place)
    assert caller.world.reused


def test_a_thread_that_ends_leaves_the_branches_of_others_alone():
    """The request of a thread that is gone was forgotten between a step's first branch and its second."""
    caller, alone = Caller(LONG), Caller(LONG)
    texts = torch.zeros(1), torch.ones(1)

    def run(caller: Caller, between: Any) -> list[tuple[str, str]]:
        with caller.under_a_cache() as cache:
            between()
            for step, time in enumerate((900, 600, 300)):
                for branch, text in zip(("cond", "uncond"), texts, strict=True):
                    caller.call(1, branch, step, time, text)
            return [(r.context, r.action) for r in cache.stats if r.request == 0]

    def other() -> None:
        thread = threading.Thread(target=lambda: caller.call(0, "cond", 0, 900, texts[0]))
        thread.start()
        thread.join()
        gc.collect()  # its request goes with it

    assert run(caller, other) == run(alone, lambda: None)
