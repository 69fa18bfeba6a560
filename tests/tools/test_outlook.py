# SPDX-License-Identifier: Apache-2.0
"""What a calibrated run lets expect of schedules, against the values themselves and against whole runs."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

import fastcache
from fastcache import DMD, Calibration, Guided, Hermite, Mask, Recipe, Reuse, Taylor
from fastcache.calibration.outlook import ALONE, Outlook
from fastcache.calibration.planner import planned

STEPS, WIDTH = 14, 9
WHATS = (
    Reuse(), Taylor(1), Taylor(2, "exact", skip_first=True), Hermite(1), Guided(1), Guided(2, "modulated"),
    Guided(1, "auto"), Guided(2, "modulated", 0.04, early=True, prior=2),
    Guided(3, "modulated", 0.06, prior=2, checked=True), Guided(2, checked=True),
)  # fmt: skip


def trajectory(seed: int) -> torch.Tensor:
    """[T, WIDTH], turning."""
    rng = np.random.default_rng(seed)
    a, b, c = rng.normal(size=(3, WIDTH))
    t = np.linspace(0, 1, STEPS)[:, None]
    return torch.tensor(np.cos((2 + seed) * t) * a + np.sin(5 * t * t) * b + 0.2 * c)


def rows(values: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    gram = (values @ values.T).tolist()
    return tuple(tuple(row[: i + 1]) for i, row in enumerate(gram))


def calibration(contexts: int = 2, **changes: Any) -> Calibration:
    names = [f"context {i}" for i in range(contexts)]
    found = {
        guide: {name: rows(trajectory(10 * at + i)) for i, name in enumerate(names)}
        for at, guide in ((1, "residual"), (2, "modulated"))
    }
    grams = {name: rows(trajectory(i)) for i, name in enumerate(names)}
    made: dict[str, Any] = {"grams": grams, "guides": found, **changes}
    return Calibration((1.0,) * STEPS, dict.fromkeys(names, (1.0,) * STEPS), **made)


def outlook_of(found: Calibration | None, steps: int = STEPS) -> Outlook:
    return Outlook(steps) if found is None else Outlook(steps, found.grams, found.guides)


def forecast(what: Any, kept: list[int], step: int, context: int) -> torch.Tensor:
    """Of a value, from the values themselves; a guide's weights by the public op."""
    values, held = trajectory(context), kept[: what.depth]
    prior = what.weights(tuple(held), step)
    if what.guide is None:
        return sum(w * values[i] for w, i in zip(prior, held, strict=False))
    at = 10 if what.guide == "residual" else 20
    guides = trajectory(at + context)[:, None, None].float()
    seen = [guides[i] for i in held]
    weights, _ = fastcache.ops.guided_weights(guides[step], seen, torch.tensor(prior), what.ridge)
    if what.checked:
        weights = checked(what, held, seen, values, prior, weights)
    return sum(float(w) * values[i] for w, i in zip(weights[0, 1:], held, strict=True))


def plain(prior: Any) -> torch.Tensor:
    """Weights of differences as those of a base and the values."""
    moved = [a - b for a, b in zip((*prior, 0.0), (0.0, *prior), strict=True)]
    return torch.tensor([1.0, 1 + moved[0], *moved[1:]])


def checked(what: Any, held: list[int], seen: Any, values: Any, prior: Any, found: Any) -> Any:
    """The weights drawn to the prior's: the newest value forecast both ways from the older ones."""
    newest, *older = held
    before = what.weights(tuple(older), newest)[: what.order - 1]
    told, _ = fastcache.ops.guided_weights(seen[0], seen[1:], torch.tensor(before), what.ridge)
    rows = torch.stack([values[i] for i in older])
    by_guide, by_prior = (w[1:].double() @ rows for w in (told[0], plain(before)))
    apart = by_guide - by_prior
    share = (apart @ (values[newest] - by_prior) / (apart @ apart) + 1) / 2
    return torch.lerp(plain(prior), found[0], float(share.clamp(0, 1)))[None]


def error(what: Any, marks: tuple[bool, ...], contexts: int) -> float:
    """What all skipped steps leave, written down plainly."""
    total = 0.0
    for context in range(contexts):
        values, moved, alone, kept = trajectory(context), torch.zeros(WIDTH), 0.0, list[int]()
        for step, mark in enumerate(marks):
            if mark:
                kept.insert(0, step)
                continue
            wrong = forecast(what, kept, step, context) - values[step]
            wrong = wrong / values[step].norm() / STEPS
            moved, alone = moved + wrong, alone + float(wrong.square().sum())
        total += float(moved.square().sum()) + ALONE * alone
    return total / contexts


@pytest.mark.parametrize("what", WHATS, ids=repr)
def test_what_is_expected_is_the_error_that_the_values_give(what):
    outlook, draw = outlook_of(calibration()), random.Random(0)
    assert outlook.knows(what)
    on = what.on_block(True)
    for _ in range(20):
        first = what.depth if what.guide else 1
        marks = tuple(i < first or draw.random() < 0.4 for i in range(STEPS))
        expected = -10 * math.log10(max(error(on, marks, 2), 1e-12))
        assert outlook.expected(what, marks) == pytest.approx(expected, abs=0.05)


def test_what_cannot_be_known_is_not_claimed():
    outlook = outlook_of(calibration(guides={"residual": calibration().guides["residual"]}))
    assert outlook.knows(Guided(1)) and outlook.knows(Guided(1, "auto"))
    assert not outlook.knows(Guided(1, "modulated")) and not outlook.knows(DMD())
    assert not outlook.knows(Guided(1, "input"))


@pytest.mark.parametrize(
    "given", [None, calibration(0), calibration()], ids=["none", "empty", "other length"]
)
def test_where_nothing_fits_values_are_taken_to_turn_slowly(given):
    steps = STEPS if given is None or not given.grams else STEPS + 3
    outlook = outlook_of(given, steps)
    every = lambda n: tuple(i < 2 or i % n == 0 for i in range(steps))  # noqa: E731
    near = [outlook.expected(Taylor(1), every(n)) for n in (2, 3, 5)]
    assert near == sorted(near, reverse=True)
    assert outlook.expected(Taylor(1), every(3)) > outlook.expected(Reuse(), every(3))


def test_a_plan_for_a_guide_costs_no_more_than_others():
    made = calibration(1)
    plan = made.plan(6, Guided(1))
    steps = [i for i, mark in enumerate(plan.when.compute) if mark]
    gram, guide = (np.array((t @ t.T).tolist()) for t in (trajectory(0), trajectory(10)))
    assert steps == planned(gram, 6, Guided(1), guide=guide)
    assert plan.what == Guided(1) and made.plan(6, Guided(1, "auto")).what == Guided(1, "modulated")

    def price(chosen: list[int]) -> float:
        cost, kept = 0.0, list[int]()
        for step in range(STEPS):
            if step in chosen:
                kept.insert(0, step)
            else:
                cost += float((forecast(Guided(1), kept, step, 0) - trajectory(0)[step]).norm())
        return cost

    draw = random.Random(1)
    others = [[0, 1, 2, *sorted(draw.sample(range(3, STEPS - 1), 2)), STEPS - 1] for _ in range(60)]
    assert price(steps) <= min(map(price, others)) + 1e-9


@pytest.mark.parametrize(
    "guides", [{"a": {"b": [[1.0, 2.0]]}}, {"a": []}, "guides", {"a": {"b": []}}]
)
def test_hostile_guides_are_refused(guides):
    with pytest.raises(fastcache.CalibrationError, match=r"guides|grams"):
        Calibration((1.0,), guides=guides)


@pytest.mark.slow
def test_the_order_that_it_gives_is_that_of_whole_runs():
    from fastcache.demo.metrics import psnr
    from fastcache.demo.model import load_model
    from fastcache.demo.sample import generate

    model, labels, draw = load_model(), torch.arange(2), random.Random(2)

    def run(cache: Any = None) -> torch.Tensor:
        return generate(model, labels, steps=STEPS, cache=cache)

    found = fastcache.calibrate(lambda cache: run(cache), model)
    assert set(found.guides) == {"residual", "modulated"}
    outlook, reference, pairs = outlook_of(found), run(), []
    for what in (Taylor(1), Taylor(2, "exact"), Guided(1, "modulated"), Reuse()):
        for _ in range(8):
            marks = tuple(i < 3 or draw.random() < 0.4 for i in range(STEPS))
            with fastcache.enable(model, Recipe(Mask(marks), what)) as cache:
                near = psnr(run(cache), reference)
            pairs.append((outlook.expected(what, marks), float(near)))
    expected, came = (np.argsort(np.argsort(column)) for column in zip(*pairs, strict=True))
    assert np.corrcoef(expected, came)[0, 1] > 0.8
