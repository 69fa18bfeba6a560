# SPDX-License-Identifier: Apache-2.0
"""Storage that by the plan of a run nothing reads any more serves others, and the run goes on as ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from test_offload import ONE

import fastcache
from fastcache import Interval, Mask, Recipe, Reuse, Taylor
from fastcache.policies import COMPUTE, REUSE, Calibrate
from fastcache.runtime.uses import Uses
from fastcache.storage.pool import Slots

MASK = (1, 1, 0, 1, 0, 0, 1, 1, 1, 1)  # nothing is read after step 5
LAST = 6
RECIPE = Recipe(Mask(MASK), Taylor(1))


class Served:
    """Requests on one model, a step at a time."""

    def __init__(self, recipe: Any = RECIPE, **given: Any) -> None:
        self.target = toys.Model()
        self.cache = fastcache.enable(self.target, recipe, **given)
        self.outputs: dict[Any, list] = {}

    def step(self, request: int, steps: int = 1, model: Any = None, **context: Any) -> None:
        for _ in range(steps):
            found = self.outputs.setdefault(request, [])
            given = {"step_index": len(found), "num_inference_steps": toys.STEPS, **context}
            with self.cache.context(request=request, **given):
                call = toys.inputs(seed=request)[len(found)]
                found.append(toys.step(model or self.target, call))

    def holds(self, request: int) -> set[int]:
        """Where its storage lies."""
        states = [d.pool.states.get((request, "default")) for d in self.cache.denoisers]
        return {t.data_ptr() for s in states if s is not None for t in s.tensors()}

    def right(self, recipe: Any = RECIPE) -> None:
        """All of them got what they get alone."""
        self.cache.disable()
        for request, outputs in self.outputs.items():
            alone = Served(recipe)
            alone.step(request, len(outputs))
            alone.cache.disable()
            for a, b in zip(outputs, alone.outputs[request], strict=True):
                assert torch.equal(a, b), request


def test_the_plan_says_after_which_step_nothing_is_read():
    assert Uses(RECIPE).end(10) == LAST and Uses(RECIPE).end(None) is None
    assert Uses(Recipe(Interval(4), Reuse())).end(10) == 10  # the last step is reused
    assert Uses(Recipe(Interval(4), Taylor(1))).end(10) == 9
    assert Uses(Recipe(Interval(1), Reuse())).end(10) == 10  # nothing is reused at all
    both = Recipe(Mask(MASK), Reuse()) + Recipe(
        fastcache.Interval(4), Reuse(), fastcache.Guidance(tensor_format="BSC", grid=(1, 6))
    )
    rows = both.plan(10).rows
    last = max(i for i, actions in enumerate(zip(*rows, strict=True)) if REUSE in actions)
    assert Uses(both).end(10) == last + 1
    for recipe in (
        Recipe(fastcache.FirstBlock(0.1), Reuse()),
        Recipe(Calibrate(), Reuse()),
        fastcache.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ).recipe(),
    ):
        assert Uses(recipe).end(10) == 10


def test_a_run_that_begins_takes_the_storage_of_one_that_needs_it_no_more():
    served = Served()
    served.step(1, LAST - 1)
    place = served.holds(1)
    served.step(2)
    assert served.holds(1) == place and not place & served.holds(2)  # one step is still to read it
    served.right()

    served = Served()
    served.step(1, LAST)
    place, held = served.holds(1), served.cache.nbytes()
    served.step(2)
    assert served.holds(2) == place and not served.holds(1)
    assert served.cache.nbytes() == held
    for _ in range(3):
        served.step(1)
        served.step(2)
    records = [r for r in served.cache.stats if r.request == 1]
    assert [r.action for r in records] == [COMPUTE if m else REUSE for m in MASK[: LAST + 3]]
    assert not any("store" in r.reason for r in records)
    served.step(1)
    served.step(2, 6)
    served.right()


def test_the_next_run_of_the_same_request_has_storage_again():
    served = Served()
    served.step(1, LAST)
    served.step(2, LAST)
    served.step(1, toys.STEPS - LAST)
    first, served.outputs[1] = served.outputs[1], []
    served.step(1, toys.STEPS)
    assert all(torch.equal(a, b) for a, b in zip(first, served.outputs[1], strict=True))
    assert served.cache.nbytes() == 2 * ONE
    served.right()


def test_a_run_that_goes_otherwise_than_planned_keeps_its_own():
    served = Served()
    served.step(1, 2)
    served.step(1, compute=True)  # which was to be reused
    served.step(1, LAST - 3)
    place = served.holds(1)
    served.step(2)
    assert served.holds(1) == place and not place & served.holds(2)
    served.cache.disable()


def test_compiled_steps_keep_theirs():
    served = Served()
    served.model = fastcache.compile(served.target, backend="eager")
    served.step(1, LAST, model=served.model)
    place = served.holds(1)
    served.step(2, model=served.model)
    assert served.holds(1) == place and not place & served.holds(2)
    served.cache.disable()


@pytest.mark.parametrize("offload", [False, True])
def test_within_a_budget_it_goes_first_and_not_to_the_host(offload, monkeypatch):
    sent: list[Any] = []
    original = Slots.send_away
    monkeypatch.setattr(
        Slots, "send_away", lambda self, state: (sent.append(state.key[0]), original(self, state))
    )
    served = Served(max_bytes=2 * ONE, offload=offload)
    served.step(1, 2)
    served.step(2, LAST)  # used last, and still the first to go
    served.step(1)
    served.step(2, 1)
    served.step(3)
    assert not sent and served.holds(1) and not served.holds(2) and served.holds(3)
    served.step(2, 3)
    served.step(1, 7)
    served.step(3, 9)
    assert not any(r.reason == "no room for a cache" for r in served.cache.stats)
    served.right()


def test_an_expert_gives_its_storage_up_before_the_other_one_begins():
    class Pipe:
        def __init__(self) -> None:
            self.transformer, self.transformer_2 = toys.Model(), toys.Model(seed=1)

    pipe, stretch = Pipe(), 4
    recipe = Recipe(Mask((1, 0, 1, 1)), Reuse())
    with fastcache.enable(pipe, recipe) as cache:
        served = Served.__new__(Served)
        served.cache, served.outputs = cache, {}
        served.step(1, 2, pipe.transformer, num_inference_steps=stretch)
        place, held = served.holds(1), cache.nbytes()
        served.step(2, 1, pipe.transformer, num_inference_steps=stretch)
        assert served.holds(2) == place and cache.nbytes() == held
        served.step(1, 2, pipe.transformer, num_inference_steps=stretch)
        served.step(1, 4, pipe.transformer_2, num_inference_steps=2 * stretch)
        assert [r.action for r in cache.stats if r.request == 1] == [
            COMPUTE,
            REUSE,
            COMPUTE,
            COMPUTE,
        ] * 2


def test_what_a_plan_says_is_kept_for_few_lengths():
    uses = Uses(RECIPE)
    for total in range(10, 200):
        uses.end(total)
    assert len(uses.known) <= 64


def test_a_run_longer_than_what_is_remembered_of_it_is_not_played_through(monkeypatch):
    asked: list[int] = []
    plan = Recipe.plan
    monkeypatch.setattr(
        Recipe, "plan", lambda self, n, *more: asked.append(n) or plan(self, n, *more)
    )
    served = Served(Recipe(Interval(2), Reuse()))
    served.step(1, 3, num_inference_steps=10**6)
    assert not asked and [r.action for r in served.cache.stats] == [COMPUTE, REUSE, COMPUTE]
