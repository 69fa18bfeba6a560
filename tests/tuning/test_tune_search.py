# SPDX-License-Identifier: Apache-2.0
"""What a search finds and what it takes, where cost and quality are known: without a model, by a clock of its own."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from tuning_world import Flow, Ticks, clock, generation, tuned

from fastcache import Interval, Recipe, Taylor
from fastcache.predictors import Guided
from fastcache.runtime.stats import Record
from fastcache.tuning.budget import budget, compared
from fastcache.tuning.candidates import PREDICTORS, SHAPES, Candidate
from fastcache.tuning.cost import Cost
from fastcache.tuning.generation import Outcome, shares_of
from fastcache.tuning.goal import Goal
from fastcache.tuning.journal import Journal
from fastcache.tuning.lab import Lab
from fastcache.tuning.pairs import promising
from fastcache.tuning.pictures import Picture
from fastcache.tuning.search import Search

__all__ = ["clock"]

STEPS = 28
COST = {Guided: 0.12}  # of a reused step, in computed ones; others take less
OTHERS = 0.07
GAIN = 0.3  # dB by which the planted plan's neighbours are nearer for each step that is right


class World:
    """A generation whose runs are sums: a schedule's worth, a predictor's, and that of more computed steps."""

    takes = ("num_inference_steps", "seed")
    models = ()
    model_name = "World"
    target = nn.Identity()
    device = torch.device("cpu")

    def __init__(self, best: tuple[str, str], busy: float = 0.0) -> None:
        self.best, self.busy, self.random = best, busy, random.Random(0)
        self.runs, self.spent, self.level = 0, 0.0, 0.0

    def run(self, recipe: Recipe | None, steps: int, seed: int) -> Outcome:
        self.runs += 1
        # how busy the machine is changes slowly
        self.level = 0.75 * self.level + self.random.gauss(0, self.busy)
        marks = tuple(range(steps)) if recipe is None else recipe.plan(steps).computed
        computed = len(marks)
        what = None if recipe is None else recipe.rules[0].what
        reuse = COST.get(type(what), OTHERS)
        cost = computed + reuse * (steps - computed)
        self.spent += cost / STEPS
        error = 10 ** (-self.decibels(recipe, marks, computed, steps) / 20)
        picture = Picture(torch.tensor([0.0, 1.0, 0.5 + error * math.sqrt(3)]), 1.0)
        if recipe is None and steps == STEPS:
            picture = Picture(torch.tensor([0.0, 1.0, 0.5]), 1.0)
        seconds = cost * math.exp(self.level)
        flags = tuple(i in marks for i in range(steps))
        shares = None if recipe is None else SimpleNamespace(reuse=reuse, rest=0.0)
        counts = (0, 0, 0) if recipe is None else (steps, steps, computed)
        return Outcome([picture], seconds, *counts, () if recipe is None else flags, shares)

    def decibels(
        self, recipe: Recipe | None, marks: tuple[int, ...], computed: int, steps: int
    ) -> float:
        if recipe is None:
            return 20.0 + steps
        predictor, shape = self.best
        right = recipe.rules[0].what == PREDICTORS[predictor]
        wanted = next(s for s in SHAPES if s.name == shape).policy(steps, computed)
        planted = set(Recipe(wanted, PREDICTORS[predictor]).plan(steps).computed)
        return 20.0 + computed + 8.0 * right + GAIN * len(planted & set(marks))


def searched(world: World, speedup: float, counts: tuple[int, ...] = (STEPS,)) -> Search:
    ticks: list[float] = []
    lab = Lab(
        world, STEPS, STEPS, (0, 1), Journal(None, {}), None, lambda cost, name: ticks.append(cost)
    )  # type: ignore[arg-type]
    search = Search(lab, Goal(speedup), counts)
    search.deciding = lambda steps: None  # type: ignore[method-assign]
    search.run()
    return search


@pytest.mark.parametrize("speedup", [1.5, 2.0, 2.5, 3.0])
@pytest.mark.parametrize(
    "best",
    [
        ("modulated guide, order 1", "growing gaps"), ("Taylor 2, exact", "even"),
        ("Taylor 1, exact", "gaps that shrink"), ("reuse", "warm-up 3"),
    ],
    ids=["guide", "Taylor 2", "Taylor 1", "reuse"],
)  # fmt: skip
def test_the_planted_best_is_found_within_the_budget(best, speedup):
    world = World(best)
    search = searched(world, speedup)
    found = search.best()
    predictor, shape = best
    assert found.candidate.recipe.rules[0].what == PREDICTORS[predictor]
    cost = search.lab.expected(found)
    assert cost <= 1.02 / speedup
    kind = found.candidate.kind
    computed = search.lab.cost.affordable(kind, STEPS, 1 / speedup)
    wanted = next(s for s in SHAPES if s.name == shape).policy(STEPS, computed)
    marks = Recipe(wanted, PREDICTORS[predictor]).plan(STEPS).computed
    planted = world.decibels(Recipe(wanted, PREDICTORS[predictor]), marks, len(marks), STEPS)
    assert found.quality > planted - 1.0  # at most three steps of the schedule are others
    assert world.spent < budget((STEPS,), False) + 5


def test_a_busy_machine_decides_nothing():
    best, quiet = ("modulated guide, order 2", "even"), []
    for busy in (0.0, 0.03):
        world = World(best, busy)
        search = searched(world, 2.0)
        found = search.best()
        quiet.append((found.candidate.recipe.rules[0].what, sum(found.marks)))
    (what, computed), (again, close) = quiet
    assert what == again and abs(computed - close) <= 1


def test_what_a_run_costs_is_the_same_on_a_machine_that_slows_down():
    cost = Cost(28)
    for kind, reuse in (("a", 0.1), ("b", 0.3)):
        for slow in (1.0, 1.3, 1.3, 1.6):
            cost.see(kind, reuse, 2.0)
            ratio = (2 + 14 + 14 * reuse) / 30
            cost.note(kind, 14, 14, ratio * slow / 1.3)
    assert cost.fixed == pytest.approx(2 / 30)
    assert cost.of("a", 14, 14) == pytest.approx((2 + 14 + 1.4) / 30)
    assert cost.of("b", 10, 18) == pytest.approx((2 + 10 + 5.4) / 30)
    assert cost.affordable("b", 28, cost.of("b", 10, 18)) == 10
    assert cost.affordable("", 28, 16 / 30) == 14
    assert cost.doubt(16) < cost.doubt(4)


def test_a_computed_step_that_a_cache_makes_dearer_counts_as_such():
    cost = Cost(20)
    for _ in range(30):
        cost.see("a", 0.1, 0.0)
        cost.note("a", 10, 10, 1.2 * 11 / 20)
    assert cost.of("a", 10, 10) == pytest.approx(0.66)
    assert cost.of("", 10, 0) == pytest.approx(0.5)


def record(action: str) -> Record:
    return Record(0, "cond", 0, action, None, None, "")


def test_shares_are_told_within_one_run():
    actions = ("compute", "compute", "reuse", "compute", "reuse")
    spans = (3.0 + 2.0, 2.0, 0.5, 2.0, 0.5, 1.0)  # 3 before the first call, 1 after the last
    moments = [0.0]
    for span in spans:
        moments.append(moments[-1] + span)
    shares = shares_of(tuple(map(record, actions)), moments)
    assert shares == pytest.approx((0.25, 2.0))
    assert shares_of((), [0.0, 1.0]) is None
    assert shares_of((record("compute"),), [0.0, 1.0, 2.0]) is None


def test_the_pair_whose_parts_have_done_best_comes_next():
    rows, columns = ("a", "b", "c"), ("x", "y", "z")
    worth = {"a": 1.0, "b": 5.0, "c": 3.0, "x": 10.0, "y": 14.0, "z": 0.0}
    found = {
        (r, c): worth[r] + worth[c]
        for r, c in (("a", "x"), ("b", "x"), ("c", "x"), ("a", "y"), ("a", "z"))
    }
    assert promising(found, rows, columns) == ("b", "y")
    found["b", "y"] = 19.0
    assert promising(found, rows, columns) == ("c", "y")
    found["c", "y"] = -math.inf  # it could not be run
    assert promising(found, rows, columns) in {("b", "z"), ("c", "z")}
    assert promising({}, rows, columns) is None
    assert promising({(r, c): 0.0 for r in rows for c in columns}, rows, columns) is None


def test_more_step_counts_have_a_larger_budget():
    assert compared((28, 14, 50), False) == (28,) and compared((28, 14, 50), True) == (50, 28)
    assert budget((28,), True) == budget((28,), False) < budget((28, 14), False)
    assert budget((28, 14, 50), False) < budget((28, 14, 50), True)


@pytest.mark.usefixtures("clock")
def test_a_tuning_takes_about_as_many_runs_as_it_says():
    model, start = Flow(), Ticks.now
    whole = generation(model)
    found = tuned(model, whole, speedup=2)
    uncached = 16 * 4.125
    assert (Ticks.now - start) / uncached < budget((16,), False) + 5
    assert found.rows[0].psnr > 70


def test_a_recipe_is_a_candidate_of_its_kind():
    kinds = {
        Candidate("", Recipe(Interval(2), what), 28).kind
        for what in (Taylor(1), Taylor(2), Guided(1, "modulated"), Guided(2, "modulated"))
    }
    assert len(kinds) == 2
