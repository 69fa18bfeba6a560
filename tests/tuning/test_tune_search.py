# SPDX-License-Identifier: Apache-2.0
"""What a search finds and what it takes, where cost and quality are known: without a model, by a clock of its own."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from tuning_world import Flow, Ticks, clock, generation, tuned

from fastcache import Calibration, Interval, Recipe, Taylor
from fastcache.predictors import Guided, Predictor
from fastcache.runtime.stats import Record
from fastcache.tuning.belief import believed
from fastcache.tuning.budget import budget, compared
from fastcache.tuning.candidates import PREDICTORS, SHAPES, Candidate, EveryNth, shaped
from fastcache.tuning.cost import Cost
from fastcache.tuning.generation import Outcome, shares_of
from fastcache.tuning.goal import Goal
from fastcache.tuning.journal import Journal
from fastcache.tuning.lab import Lab
from fastcache.tuning.pictures import Picture
from fastcache.tuning.plans import Planned
from fastcache.tuning.search import Search

__all__ = ["clock"]

STEPS, WIDTH = 28, 12
COST = {Guided: 0.12}  # of a reused step, in computed ones; others take less
OTHERS = 0.07


def turning(seed: int) -> np.ndarray:
    """Values [T, WIDTH] of a run: they turn and drift, and that of step 0 is apart from the others."""
    rng = np.random.default_rng(seed)
    a, b, c, d = rng.normal(size=(4, WIDTH))
    t = np.linspace(0, 1, STEPS)[:, None] ** (1 + 0.3 * (seed % 3))
    found = np.cos(3 * t) * a + np.sin((4 + seed) * t) * b + 0.6 * np.exp(-6 * t) * c
    found[0] += 0.5 * d
    return found


def guides(values: np.ndarray, seed: int) -> np.ndarray:
    """What a guide sees of them: another projection, with a part of its own."""
    rng = np.random.default_rng(100 + seed)
    own = np.sin(np.linspace(0, 2 + seed, STEPS))[:, None] * rng.normal(size=WIDTH)
    return values @ rng.normal(size=(WIDTH, WIDTH)) + 0.5 * own


class World:
    """A generation whose error is what its forecasts leave, written down plainly, and something of its own."""

    takes = ("num_inference_steps", "seed")
    models = ()
    model_name = "World"
    target = nn.Identity()
    device = torch.device("cpu")

    def __init__(self, number: int, busy: float = 0.0, own: float = 0.0) -> None:
        self.values = turning(number)
        # another seed goes a little another way
        self.seen = {s: self.values + 0.01 * s * turning(50 + number) for s in (0, 1)}
        self.guides = guides(self.values, number)
        self.busy, self.own, self.random = busy, own, random.Random(0)
        self.runs, self.spent, self.level = 0, 0.0, 0.0

    def calibration(self) -> Calibration:
        def rows(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
            gram = values @ values.T
            return tuple(tuple(map(float, gram[i, : i + 1])) for i in range(STEPS))

        seen = {"cond": rows(self.guides)}
        return Calibration(
            (1.0,) * STEPS, {"cond": (1.0,) * STEPS}, grams={"cond": rows(self.values)},
            guides={"residual": seen, "modulated": seen},
        )  # fmt: skip

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
        error = 10 ** (-self.decibels(recipe, steps, seed) / 20)
        picture = Picture(torch.tensor([0.0, 1.0, 0.5 + error * math.sqrt(3)]), 1.0)
        if recipe is None and steps == STEPS:
            picture = Picture(torch.tensor([0.0, 1.0, 0.5]), 1.0)
        seconds = cost * math.exp(self.level)
        flags = tuple(i in marks for i in range(steps))
        shares = None if recipe is None else SimpleNamespace(reuse=reuse, rest=0.0)
        counts = (0, 0, 0) if recipe is None else (steps, steps, computed)
        return Outcome([picture], seconds, *counts, () if recipe is None else flags, shares)

    def decibels(self, recipe: Recipe | None, steps: int, seed: int = 0) -> float:
        if recipe is None or steps != STEPS:
            return 5.0 + steps
        what, kept, moved = recipe.rules[0].what, list[int](), np.zeros(WIDTH)
        values = self.seen[seed]
        computed = recipe.plan(steps).computed
        for step in range(steps):
            if step in computed:
                kept.insert(0, step)
                continue
            weights = self.weights(what, tuple(kept[: what.depth]), step)
            forecast = sum(w * values[i] for w, i in zip(weights, kept, strict=False))
            size = np.linalg.norm(values[step])
            moved = moved + (forecast - values[step]) / size / steps
        own = random.Random(f"{sorted(computed)} {what} {seed}").gauss(0, self.own)
        return -20 * math.log10(max(float(np.linalg.norm(moved)), 1e-6)) + own

    def weights(self, what: Predictor, kept: tuple[int, ...], step: int) -> tuple[float, ...]:
        if what.guide is None:
            return what.weights(kept, step)
        g = self.guides
        now = g[step] - g[kept[0]]
        by = np.array([g[a] - g[b] for a, b in pairwise(kept)]).T
        prior = np.array(what.weights(kept, step))
        pull = math.sqrt(what.ridge * np.square(by).sum() / by.shape[1])
        system = np.vstack([by, pull * np.eye(by.shape[1])])
        w = np.linalg.lstsq(system, np.concatenate([now, pull * prior]), rcond=None)[0]
        steps = np.zeros(len(kept))
        steps[0] += 1.0
        for j, weight in enumerate(w):
            steps[j] += weight
            steps[j + 1] -= weight
        return tuple(steps)


@pytest.fixture
def known(monkeypatch):
    """Whether a world's calibration can be had; what is tried without one is known to nobody."""

    def give(calibrated: bool) -> None:
        made = lambda lab, steps: lab.generation.calibration() if calibrated else None  # noqa: E731
        monkeypatch.setattr("fastcache.tuning.search.calibrated", made)

    give(True)
    return give


def searched(world: World, goal: Goal, counts: tuple[int, ...] = (STEPS,)) -> Search:
    lab = Lab(world, STEPS, STEPS, (0, 1), Journal(None, {}), None, lambda cost, name: None)  # type: ignore[arg-type]
    search = Search(lab, goal, counts)
    search.deciding = lambda steps: None  # type: ignore[method-assign]
    search.run()
    return search


def best_of_all(world: World, search: Search, most: float) -> float:
    """The nearest of every predictor on every shape at a cost, dB."""
    found = [-math.inf]
    for name in PREDICTORS:
        computed = search.lab.cost.affordable(search.plans[STEPS].kind(name), STEPS, most)
        for shape in SHAPES:
            made = shaped(name, shape, STEPS, STEPS, computed)
            if made is not None:
                found.append(
                    statistics.fmean(world.decibels(made.recipe, STEPS, s) for s in (0, 1))
                )
    return max(found)


def test_at_a_wished_speed_it_finds_what_trying_everything_finds(known):
    leads = []
    for number, speedup in product(range(4), (1.5, 2.0, 2.5, 3.0)):
        world = World(number, own=0.5)
        search = searched(world, Goal(speedup))
        found = search.best()
        assert search.lab.expected(found) <= 1.01 / speedup
        assert world.spent < 1.3 * budget((STEPS,), False)
        leads.append(found.quality - best_of_all(world, search, 1 / speedup))
    # here and there it misses something; over all of them it is ahead of what has no steps moved
    assert statistics.fmean(leads) > 1 and statistics.median(leads) > -0.5, leads


def test_where_nothing_can_be_calibrated_it_still_finds_good_ones(known):
    known(False)
    leads = []
    for number in range(5):
        world = World(number)
        search = searched(world, Goal(2.0))
        assert search.calibrations == {STEPS: None}
        leads.append(search.best().quality - best_of_all(world, search, 0.5))
    assert statistics.fmean(leads) > -2 and min(leads) > -8, leads


@pytest.mark.parametrize("error", [30.0, 40.0])
def test_within_a_wished_error_it_is_about_as_fast_as_can_be(known, error):
    world = World(1, own=0.5)
    search = searched(world, Goal(error=error))
    found = search.best()
    assert found.quality >= error
    fewer = search.lab.expected(found) - 2.5 * search.lab.cost.step
    assert best_of_all(world, search, fewer) < error + 1


def test_a_busy_machine_decides_nothing(known):
    quiet = []
    for busy in (0.0, 0.03):
        search = searched(World(2, busy), Goal(2.0))
        quiet.append((search.best().quality, sum(search.best().marks)))
    (near, computed), (again, close) = quiet
    assert abs(near - again) < 5 and abs(computed - close) <= 1


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


def expecting(predictor: str, marks: str, expected: float) -> Planned:
    return Planned(
        Candidate("", None, len(marks)), predictor, tuple(m == "1" for m in marks), expected
    )


def test_what_has_come_of_similar_candidates_is_believed_of_others():
    a, like, other = (expecting("x", marks, 40.0) for marks in ("11001001", "11001010", "10110100"))
    foreign = expecting("y", "10110100", 40.0)
    assert believed([], [a, like]).tolist() == [40.0, 40.0]
    # all came 10 dB nearer than expected, x on the schedule of a 6 dB more
    known = [(expecting("y", "10011100", 40.0), 50.0), (expecting("x", "10101010", 40.0), 50.0)]
    before = believed(known, [like, other, foreign])
    after = believed([*known, (a, 56.0)], [like, other, foreign]) - before
    assert after[0] > after[1] > after[2] > -1.0
    assert believed([*known, (a, 56.0)], [a])[0] == pytest.approx(56.0, abs=2.5)


@pytest.mark.parametrize("last", [0, 1, 2])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_equal_gaps_come_after_as_long_a_warm_up_as_their_number_allows(n, last):
    for computed in range(2, STEPS):
        policy = EveryNth(n, last).policy(STEPS, computed)
        if policy is None:
            assert STEPS / n + last >= computed
            continue
        marks = Recipe(policy, Taylor(1)).plan(STEPS).computed
        longer = replace(policy, warmup=policy.warmup + 1)
        assert len(marks) <= computed
        assert len(Recipe(longer, Taylor(1)).plan(STEPS).computed) > computed or (
            policy.warmup == STEPS - last
        )
        between = [m for m in marks if policy.warmup - 1 <= m < STEPS - last]
        assert {b - a for a, b in pairwise(between)} <= {n}
        assert set(range(STEPS - last, STEPS)) <= set(marks)
