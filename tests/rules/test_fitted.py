# SPDX-License-Identifier: Apache-2.0
"""Weights fitted to recorded runs, against least squares over the values; and windows that widen, against a count."""

from __future__ import annotations

import math

import numpy as np
import pytest
import toys

import fastcache
from fastcache import Interval, Mask, Recipe, Taylor, Widening
from fastcache.calibration.errors import CalibrationError

STEPS = 14
MASK = (1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1)


def runs(count: int, seed: int = 0) -> list[np.ndarray]:
    """Values [T, width] of runs that bend alike."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, STEPS)[:, None]
    shape = np.concatenate([np.ones_like(t), t, np.exp(-6 * t), np.sin(4 * t)], 1)
    return [
        shape @ rng.normal(size=(4, 60)) + 0.01 * rng.normal(size=(STEPS, 60)) for _ in range(count)
    ]


def calibrated(found: list[np.ndarray]) -> fastcache.Calibration:
    grams = [values @ values.T for values in found]
    gram = np.mean([g / np.trace(g) * STEPS for g in grams], axis=0).tolist()
    rows = tuple(tuple(row[: i + 1]) for i, row in enumerate(gram))
    return fastcache.Calibration((1.0,) * STEPS, grams={"cond": rows})


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_without_a_pull_they_are_the_least_squares_over_all_runs(keep):
    found = runs(3)
    scaled = [v / math.sqrt(np.trace(v @ v.T) / STEPS) for v in found]
    stacked = np.concatenate(scaled, 1)  # [T, runs x width]
    what = calibrated(found).fit(Mask(MASK), keep, ridge=0.0)
    assert [step for step, *_ in what.rows] == [i for i, mark in enumerate(MASK) if not mark]
    for step, steps, weights in what.rows:
        assert steps == tuple(i for i in range(step - 1, -1, -1) if MASK[i])[:keep]
        wanted, *_ = np.linalg.lstsq(stacked[list(steps)].T, stacked[step], rcond=None)
        assert weights == pytest.approx(wanted, rel=1e-4, abs=1e-5)
        assert what.weights(steps, step) == weights


def error(values: np.ndarray, what: fastcache.Predictor) -> float:
    """How far forecasts of the mask's skipped steps are from the values, all together."""
    kept: tuple[int, ...] = ()
    total = 0.0
    for step, mark in enumerate(MASK):
        if mark:
            kept = (step, *kept)[: what.depth]
            continue
        weights = what.weights(kept, step)
        forecast = sum(w * values[s] for w, s in zip(weights, kept, strict=False))
        total += float(np.linalg.norm(forecast - values[step]))
    return total


def test_they_forecast_runs_that_were_not_recorded_better_than_a_line():
    what = calibrated(runs(4)).fit(Mask(MASK), keep=3)
    for values in runs(3, seed=9):
        assert error(values, what) < 0.5 * error(values, Taylor(1, "exact"))
        assert error(values, what) < error(values, fastcache.Reuse())


def test_a_strong_pull_leaves_the_line():
    what = calibrated(runs(2)).fit(Mask(MASK), keep=3, ridge=1e9)
    line = Taylor(1, "exact")
    for step, steps, weights in what.rows:
        wanted = line.weights(steps[:2], step)
        assert weights == pytest.approx([*wanted, *[0.0] * (len(steps) - len(wanted))], abs=1e-6)
    assert what.weights((12, 9), 13) == pytest.approx(line.weights((12, 9), 13))  # never fitted


def test_a_fit_is_for_the_schedule_of_a_forecast_and_goes_into_a_file(tmp_path):
    found = calibrated(runs(2))
    what = found.fit(Interval(3), keep=2)
    recipe = Recipe(Interval(3), what)
    skipped = set(range(STEPS)) - set(recipe.plan(STEPS).computed)
    assert {step for step, *_ in what.rows} == skipped
    assert Recipe.load(recipe.save(tmp_path / "fit.json")) == recipe
    with pytest.raises(CalibrationError, match="context"):
        found.fit(Interval(3), context="uncond")
    with pytest.raises(ValueError, match="decides on"):
        found.fit(fastcache.FirstBlock(0.1))


@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_run_uses_the_weights_of_its_steps(way):
    model, calls = toys.Model(), toys.inputs(STEPS)
    what = calibrated(runs(2)).fit(Mask(MASK), keep=3)
    plain = []
    for call in calls:
        hidden = model.embed(call["hidden_states"])
        t = call["timestep"].reshape(-1)
        hidden = hidden + 0.1 * (t / 300).sin().reshape(-1, 1, 1)
        plain.append((hidden, model.through(hidden, None)[0] - hidden))
    with fastcache.enable(model, Recipe(Mask(MASK), what)) as cache:
        run = model if way == "eager" else fastcache.compile(model, backend="aot_eager")
        for i, call in enumerate(calls):
            with cache.context("cond", step_index=i, num_inference_steps=STEPS):
                output = toys.step(run, call)
            hidden, residual = plain[i]
            if not MASK[i]:
                _, steps, weights = next(row for row in what.rows if row[0] == i)
                residual = sum(w * plain[s][1] for w, s in zip(weights, steps, strict=True))
            wanted = model.proj_out(hidden + residual)
            fastcache_error = (output - wanted).abs().max()
            assert fastcache_error <= 1e-5 * wanted.abs().max() + 1e-5


# --- windows that widen ---------------------------------------------------------------------------------


def counted(steps: int, window: float, flex: float, warmup: int) -> tuple[int, ...]:
    """Spectrum's count, written down plainly."""
    found, cached = [], 0
    for step in range(steps):
        computes = step < warmup
        if not computes:
            computes = (cached + 1) % math.floor(window) == 0
            if computes:
                window = round(window + flex, 6)
        if computes:
            found.append(step)
        cached = 0 if computes else cached + 1
    return tuple(found)


@pytest.mark.parametrize("warmup", [1, 5])
@pytest.mark.parametrize("flex", [0.0, 0.1, 0.75, 3.0])
@pytest.mark.parametrize("window", [1.0, 2.0, 3.5])
def test_the_window_widens_after_each_computed_step(window, flex, warmup):
    when = Widening(window, flex, warmup=warmup)
    for steps in (10, 28, 50, 120):
        assert Recipe(when).plan(steps).computed == counted(steps, window, flex, warmup)


def test_its_published_settings_compute_what_they_say():
    assert len(Recipe(Widening()).plan(50).computed) == 14
    assert len(Recipe(Widening(flex=3.0)).plan(50).computed) == 10
    assert Widening(1.0, 0.0).never_reuses and not Widening(1.0, 0.1).never_reuses


def test_a_step_that_is_computed_for_another_reason_begins_the_window_anew():
    model, calls = toys.Model(), toys.inputs(12)
    recipe = Recipe(Widening(3.0, 1.0, warmup=1), fastcache.Reuse())
    with fastcache.enable(model, recipe) as cache:
        for i, call in enumerate(calls):
            with cache.context("cond", step_index=i, compute=i == 2):
                toys.step(model, call)
        # computed for its own reason: after three steps, then after four
        assert toys.actions(cache) == "C.C..C...C.."
