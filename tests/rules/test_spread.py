# SPDX-License-Identifier: Apache-2.0
"""Schedules that fit a run of any length: shares of computed steps, and plans that are stretched."""

from __future__ import annotations

from itertools import pairwise

import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

import fastcache
from fastcache import Mask, Recipe, Reuse, Spread, Taylor

totals = st.integers(1, 120)
shares = st.floats(0.02, 1)


@given(totals, shares, st.integers(1, 6), st.floats(0.25, 4), st.booleans())
def test_a_spread_computes_its_share_the_first_steps_and_the_last(
    total, share, first, growth, last
):
    computed = Recipe(Spread(share, first, growth, last=last)).plan(total).computed
    assert len(computed) == min(max(round(share * total), first + last), total)
    assert computed[:first] == tuple(range(min(first, total)))
    if last:
        assert computed[-1] == total - 1


def test_gaps_are_even_or_grow():
    plan = lambda **fields: Recipe(Spread(0.4, **fields), Taylor(1)).plan(25).computed  # noqa: E731
    assert plan(first=1) == (0, 3, 5, 8, 11, 13, 16, 19, 21, 24)
    gaps = [b - a for a, b in pairwise(plan(first=3, growth=1.5)[2:])]
    assert gaps[0] == min(gaps) and gaps[-1] == max(gaps) and gaps[-1] >= gaps[0] + 2
    assert plan(last=False)[-1] < 24


def test_a_run_of_unknown_length_is_spread_evenly():
    when = Spread(0.25, 2)
    run = when.begin()
    actions = [when.decide(run, fastcache.Step(i)).action for i in range(20)]
    assert [i for i, a in enumerate(actions) if a == "compute"] == [0, 1, 4, 8, 12, 16]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("share", 0),
        ("share", 1.5),
        ("share", "half"),
        ("growth", 0.1),
        ("growth", float("nan")),
        ("first", 0),
    ],
)
def test_what_no_spread_can_be_is_refused_by_name(field, value):
    with pytest.raises((TypeError, ValueError), match=f"Spread: {field}"):
        Spread(**{field: value})


@given(st.lists(st.booleans(), max_size=60).map(lambda rest: [True, *rest]), totals)
def test_a_stretched_mask_keeps_its_share_and_its_ends(marks, total):
    computed = Recipe(Mask(marks, scaled=True)).plan(total).computed
    assert len(computed) == min(max(round(sum(marks) * total / len(marks)), 1), total)
    assert computed[0] == 0
    if marks[-1] and len(computed) > 1 and len(marks) > 1:
        assert computed[-1] == total - 1
    if total == len(marks):
        assert computed == tuple(i for i, mark in enumerate(marks) if mark)


def test_a_plan_of_28_steps_serves_50_and_14():
    marks = [int(i in (0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 27)) for i in range(28)]
    assert Recipe(Mask(marks)).plan(50).computed[-1] == 49  # past the mask everything is computed
    long = Recipe(Mask(marks, scaled=True)).plan(50).computed
    assert len(long) == 20 and long[-1] == 49 and max(b - a for a, b in pairwise(long)) <= 4
    short = Recipe(Mask(marks, scaled=True)).plan(14).computed
    assert len(short) == 6 and (short[0], short[-1]) == (0, 13)


@pytest.mark.parametrize("when", [Spread(0.5), Mask([1, 0], scaled=True)], ids=["spread", "mask"])
def test_a_model_runs_what_the_plan_says(when):
    model, recipe = toys.model(seed=1), Recipe(when, Reuse())
    with fastcache.enable(model, recipe) as cache:
        toys.run(cache, model, toys.inputs(toys.STEPS), num_inference_steps=toys.STEPS)
        computed = tuple(r.step for r in cache.stats if r.action == "compute")
    assert computed == recipe.plan(toys.STEPS).computed
