# SPDX-License-Identifier: Apache-2.0
"""Plans of computed steps against every other schedule of as many, on small trajectories."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
import toys

import fastcache
from fastcache import Chebyshev, FastcacheWarning, Hermite, Mask, Recipe, Reuse, Taylor
from fastcache.calibration.errors import CalibrationError
from fastcache.calibration.planner import planned
from fastcache.made_for import MadeFor


def trajectory(steps: int, seed: int, width: int = 40) -> np.ndarray:
    """Values [T, width] that turn and drift, fast at the ends."""
    rng = np.random.default_rng(seed)
    a, b, c = rng.normal(size=(3, width))
    t = np.linspace(0, 1, steps)[:, None] ** (1 + seed % 3)
    return np.cos(3 * t) * a + np.sin(5 * t * t) * b + 0.3 * np.exp(-8 * t) * c


def missed(values: np.ndarray, marks: tuple[int, ...], what: Any) -> list[np.ndarray]:
    """Per step the forecast less the value, from the values themselves; zeros where it is computed."""
    kept: list[int] = []
    found = []
    for step, mark in enumerate(marks):
        if mark:
            kept.insert(0, step)
            found.append(np.zeros(values.shape[1]))
            continue
        held = tuple(kept[: what.depth])
        args = (held, step, len(marks)) if what.per_run else (held, step)
        weights = what.weights(*args)
        forecast = sum(w * values[s] for w, s in zip(weights, held, strict=False))
        found.append(forecast - values[step])
    return found


def price(values, marks, what, cost, lengths) -> Any:
    """What a schedule costs, written down plainly."""
    wrong = missed(values, marks, what)
    if cost == "steps":
        return sum(map(np.linalg.norm, wrong))
    edges, moved = [], np.zeros(values.shape[1])
    for step in range(1, len(marks)):
        if marks[step]:
            edges.append(np.linalg.norm(moved))
            moved = np.zeros(values.shape[1])
        else:
            moved = moved + lengths[step] * wrong[step]
    if not marks[-1]:
        edges.append(np.linalg.norm(moved))
    return sorted((e for e in edges if e), reverse=True)


def every(steps: int, computed: int, first: int, last: bool, max_skips: int | None) -> list[tuple]:
    """All schedules of so many computed steps."""
    free = range(first, steps - last)
    found = []
    for chosen in itertools.combinations(free, computed - first - last):
        marks = tuple(
            int(i < first or i in chosen or (last and i == steps - 1)) for i in range(steps)
        )
        rows = [len(list(run)) for mark, run in itertools.groupby(marks) if not mark]
        if max_skips is None or max(rows, default=0) <= max_skips:
            found.append(marks)
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cost", ["steps", "final"])
@pytest.mark.parametrize("what", [Reuse(), Taylor(1), Hermite(1, 0.4), Taylor(2)], ids=repr)
@pytest.mark.parametrize(
    ("first", "last", "max_skips"), [(3, True, None), (1, False, None), (2, True, 3)]
)
def test_no_other_schedule_costs_less(what, cost, seed, first, last, max_skips):
    steps, computed = 12, 6
    values = trajectory(steps, seed)
    lengths = np.linspace(1, 0.2, steps)
    ends = {"first": first, "last": last, "max_skips": max_skips}
    plan = planned(values @ values.T, computed, what, cost, lengths=list(lengths), **ends)
    assert plan == sorted(set(plan)) and len(plan) == computed
    marks = tuple(int(i in plan) for i in range(steps))
    others = every(steps, computed, **ends)
    assert marks in others
    best = min(price(values, other, what, cost, lengths) for other in others)
    assert price(values, marks, what, cost, lengths) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_a_predictor_of_many_values_gets_a_plan_better_than_evenly_spaced_steps():
    steps, computed, what = 16, 7, Chebyshev(4)
    values = trajectory(steps, 1)
    plan = planned(values @ values.T, computed, what)
    marks = tuple(int(i in plan) for i in range(steps))
    ones = np.ones(steps)
    others = sorted(
        price(values, m, what, "steps", ones) for m in every(steps, computed, 3, True, None)
    )
    assert price(values, marks, what, "steps", ones) <= others[len(others) // 20]


def calibration(steps: int = 12, **changes: Any) -> fastcache.Calibration:
    values = trajectory(steps, 0)
    gram = values @ values.T
    rows = tuple(tuple(row[: i + 1]) for i, row in enumerate(gram.tolist()))
    return fastcache.Calibration(
        tuple([1.0] * steps), grams={"cond": rows, "uncond": rows}, model="Model", **changes
    )


def test_a_plan_is_a_recipe_for_one_model_and_length(tmp_path):
    found = calibration(scheduler="Euler")
    recipe = found.plan(6)
    assert recipe.when == Mask(recipe.when.compute, scaled=True, max_skips=0)
    assert recipe.made_for == MadeFor("Model", "Euler", 12)
    assert recipe.what == Taylor(1) and sum(recipe.when.compute) == 6
    assert tuple(i for i, m in enumerate(recipe.when.compute) if m) == recipe.plan(12).computed
    assert Recipe.load(recipe.save(tmp_path / "plan.json")) == recipe
    assert fastcache.Calibration.load(found.save(tmp_path / "c.json")) == found
    values = trajectory(12, 0)
    assert [i for i, m in enumerate(recipe.when.compute) if m] == planned(
        values @ values.T, 6, Taylor(1)
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"computed": 3}, "computed"),
        ({"computed": 12}, "computed"),
        ({"computed": 5, "max_skips": 1}, "max_skips"),
        ({"computed": 5, "cost": "most"}, "cost"),
        ({"computed": 5, "what": fastcache.DMD()}, "what"),
        ({"computed": 5, "what": fastcache.Guided(1)}, "what"),
        ({"computed": 5, "what": "Taylor"}, "what"),
        ({"computed": 5, "lengths": [1.0]}, "lengths"),
        ({"computed": 5, "context": "image"}, "context"),
        ({"computed": 5, "first": 0}, "first"),
    ],
)
def test_what_cannot_be_planned_is_named(arguments, said):
    with pytest.raises((ValueError, TypeError), match=said):
        calibration().plan(**arguments)


def test_without_a_measurement_there_is_no_plan():
    with pytest.raises(CalibrationError, match="grams"):
        fastcache.Calibration((1.0, 1.0)).plan(5)


@pytest.mark.parametrize("rows", [[[1.0], [1.0]], [[1.0, 2.0]], [[math.nan]], "rows", []])
def test_hostile_grams_are_refused(rows):
    with pytest.raises(CalibrationError, match="grams"):
        fastcache.Calibration((1.0,), grams={"a": rows})


def together(values: np.ndarray, marks: tuple[int, ...], what: Any) -> float:
    """What all skipped steps leave in the latents, each as a share of its value."""
    wrong = missed(values, marks, what)
    shares = [w / np.linalg.norm(v) for w, v in zip(wrong, values, strict=True)]
    return float(np.linalg.norm(sum(shares)))


@pytest.mark.parametrize("what", [Reuse(), Taylor(1), Taylor(2, "exact")], ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_a_plan_for_the_run_leaves_less_than_most_others(what, seed):
    steps, computed = 14, 6
    values = trajectory(steps, seed)
    rows = tuple(tuple(row[: i + 1]) for i, row in enumerate((values @ values.T).tolist()))
    made = fastcache.Calibration((1.0,) * steps, grams={"cond": rows})
    plan = made.plan(computed, what, cost="run", first=2)
    marks = tuple(map(int, plan.when.compute))
    assert sum(marks) == computed and marks[:2] == (1, 1) and marks[-1]
    all_of_them = sorted(together(values, m, what) for m in every(steps, computed, 2, True, None))
    assert together(values, marks, what) <= all_of_them[len(all_of_them) // 10]
    for other in ("steps", "final"):
        marked = tuple(map(int, made.plan(computed, what, cost=other, first=2).when.compute))
        assert together(values, marks, what) <= 1.2 * together(values, marked, what)


def test_a_plan_for_the_run_keeps_its_limits():
    made = calibration()
    plan = made.plan(6, Taylor(1), cost="run", first=1, last=False, max_skips=2, context="cond")
    rows = [len(list(run)) for mark, run in itertools.groupby(plan.when.compute) if not mark]
    assert sum(plan.when.compute) == 6 and max(rows) <= 2
    early = made.plan(6, Taylor(1), cost="run", lengths=[1.0] * 4 + [1e-6] * 8)
    late = made.plan(6, Taylor(1), cost="run", lengths=[1e-6] * 8 + [1.0] * 4)
    assert sum(early.when.compute[:6]) > sum(late.when.compute[:6])


def test_another_model_or_scheduler_is_named():
    recipe = calibration(scheduler="Euler").plan(6)
    with fastcache.enable(toys.Model(), recipe):
        pass
    with pytest.warns(FastcacheWarning, match="model Model, not for Picture"):
        fastcache.enable(toys.Picture(), recipe).disable()

    class Pipe:
        def __init__(self) -> None:
            self.transformer, self.scheduler = toys.Model(), object()

    with pytest.warns(FastcacheWarning, match="scheduler Euler, not for object"):
        fastcache.enable(Pipe(), recipe).disable()
    with fastcache.enable(Pipe(), calibration(scheduler="object").plan(6)):
        pass


def test_a_run_of_another_length_takes_as_large_a_share_and_says_so():
    model, recipe = toys.Model(), calibration().plan(6)
    with fastcache.enable(model, recipe) as cache:
        run_of(cache, model, 12)
        assert cache.stats.computed == 6
        cache.stats.clear()
        with pytest.warns(FastcacheWarning, match="steps 12, not for 24"):
            run_of(cache, model, 24)
        assert cache.stats.computed == 12


def run_of(cache: Any, model: Any, steps: int) -> None:
    cache.reset()
    for i, call in enumerate(toys.inputs(steps)):
        with cache.context("cond", step_index=i, num_inference_steps=steps):
            toys.step(model, call)
    cache.reset()


def residuals(model: toys.Model, calls: list) -> np.ndarray:
    """What the blocks add at each step, uncached."""
    found = []
    for call in calls:
        hidden = model.embed(call["hidden_states"])
        t = call["timestep"].reshape(-1)
        hidden = hidden + 0.1 * torch.sin(t / 300).reshape(-1, 1, 1)
        found.append((model.through(hidden, None)[0] - hidden).flatten().double().numpy())
    return np.stack(found)


def test_a_calibration_records_the_products_of_what_the_blocks_add():
    model, calls = toys.Model(), [toys.inputs(9), toys.inputs(9, seed=3)]

    def job(cache, run):
        for i, call in enumerate(run):
            with cache.context("cond", step_index=i, num_inference_steps=9):
                toys.step(model, call)

    jobs = [lambda cache, run=run: job(cache, run) for run in calls]
    found = fastcache.calibrate(jobs, model)
    wanted = 0
    for run in calls:
        values = residuals(model, run)
        gram = values @ values.T
        wanted = wanted + gram / np.trace(gram) * 9 / 2
    (rows,) = found.grams.values()
    assert [len(row) for row in rows] == list(range(1, 10))
    for i, row in enumerate(rows):
        assert row == pytest.approx(wanted[i, : i + 1], rel=1e-4)
    recipe = found.plan(5, cost="final")
    assert recipe.made_for.model == "Model" and sum(recipe.when.compute) == 5
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()
    with fastcache.enable(model, recipe) as cache:
        job(cache, calls[0])
        assert toys.actions(cache) == "".join("C" if m else "." for m in recipe.when.compute)
    assert isinstance(Recipe(Mask(recipe.when.compute), recipe.what), Recipe)
