# SPDX-License-Identifier: Apache-2.0
"""The settings that `bench/quality.py` sweeps, one row each: who, which method, how strong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastcache import (
    Extrapolate,
    FirstBlock,
    Guidance,
    Guided,
    Interval,
    Magnitude,
    Mask,
    Misfit,
    Modules,
    Recipe,
    Reuse,
    Stack,
    Taylor,
    TimestepRange,
)

from . import systems
from .peer_sweeps import (
    FIRST_BLOCK,
    MAGNITUDE,
    SEER_INTERVALS,
    cache_dit_points,
    diffusers_points,
    module_points,
    seer_points,
    seer_schedule,
)
from .points import Point, ours, theirs
from .preset_sweeps import former_points, longer_points, preset_points
from .subjects import Cell

MISFIT = (0.15, 0.2, 0.3)


INTERVALS = (2, 3, 4, 5, 6, 7, 9)


RIDGE = 0.03  # ten times the default pull toward Taylor


@dataclass(frozen=True)
class Guide:
    """One setting of guided prediction and the intervals at which it is measured."""

    guide: str
    order: int = 2
    warmup: int = 4
    last: int = 1
    ridge: float | None = None  # None and 4 tokens: the defaults
    tokens: int = 4
    intervals: tuple[int, ...] = INTERVALS

    @property
    def label(self) -> str:
        return f"{self.guide} guide" + ", order 1" * (self.order == 1)

    @property
    def setting(self) -> str:
        """What comes after "every n"."""
        text = f", warm-up {self.warmup}" * (self.warmup != 4) + _last(self.last)
        text += "" if self.ridge is None else f", ridge {self.ridge:g}"
        return text + ", all tokens" * (self.tokens == 1)

    def recipe(self, n: int, steps: int) -> Recipe:
        fields = {} if self.ridge is None else {"ridge": self.ridge}
        when = Interval(n, warmup=self.warmup, stop=steps - self.last, last=False)
        return Recipe(when, Guided(self.order, self.guide, tokens=self.tokens, **fields))


def _last(steps: int) -> str:
    """How a setting says that so many last steps are computed; one goes without saying."""
    return "" if steps == 1 else f", last {steps}" if steps else ", no last"


GUIDES = (
    Guide("residual", warmup=2),
    Guide("residual", warmup=2, last=2),
    Guide("modulated", warmup=2),
    Guide("modulated", warmup=2, last=2),
    Guide("modulated", 1, warmup=2, last=0),
    Guide("modulated", 1, warmup=2),
    Guide("modulated", 1, warmup=2, last=2),
    Guide("modulated", 1, warmup=3, last=2),
    Guide("modulated", 1, warmup=3, last=5),
)


# without guidance also these, which are no candidates for the frontier: Taylor's schedule, and promises
ABLATED = (3, 5, 7)


COMPARED = (
    Guide("residual"),
    Guide("modulated"),
    Guide("modulated", 1),
    Guide("input"),
    Guide("modulated", ridge=RIDGE),
    *(Guide(g, tokens=1, intervals=ABLATED) for g in ("residual", "modulated")),
)


# with guidance the longer warm-up is a candidate: trained models differ in it
WARM = (Guide("residual"), Guide("modulated"), Guide("modulated", 1))


# the largest gaps of the schedules whose gaps grow
GROWN = (2, 3, 4, 5, 6)


# and what each setting is worth, for which one number of steps has to do
ABLATION_STEPS = 28


ABLATIONS = tuple(
    Guide(guide, intervals=ABLATED, **changed)
    for guide in ("residual", "modulated")
    for changed in (
        {"order": 1},
        {"ridge": 0.0},
        {"ridge": RIDGE},
        {"ridge": 0.3},
        {"warmup": 1},
        {"last": 0},
        {"last": 2},
    )
    if Guide(guide, **changed) not in COMPARED
)


HALVES = (3, 5)


def fewer(steps: int) -> Iterator[Point]:
    """The uncached model at fewer steps: what one would do without a cache."""
    counts = sorted(
        {round(steps * share / 28) for share in (5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 21)}
    )
    for n in counts:
        yield Point("uncached", "fewer steps", "", f"{n} steps", None, n)


def points(cell: Cell, ratios: Sequence[float], output: Mapping[str, Any]) -> Iterator[Point]:
    """Every setting of a cell; ratios: MagCache's, output: tensor_format and grid of the model's output."""
    steps, guidance = cell.steps, cell.guidance
    yield from fewer(steps)
    if guidance == "batched":
        yield from half_points(output)
        yield from preset_points()
        if not systems.missing("diffusers"):
            yield from seer_points(cell)
        return
    yield from stack_points(steps, ratios)
    yield from guided_points(cell)
    yield from growing_points(steps)
    yield from module_points(cell)
    yield from peer_points(cell, ratios)


def peer_points(cell: Cell, ratios: Sequence[float]) -> Iterator[Point]:
    """Those of the peers that are installed."""
    if not systems.missing("diffusers"):
        yield from diffusers_points(cell, ratios)
    if not systems.missing("cache-dit"):
        yield from cache_dit_points(cell.steps, cell.guidance == "sequential")


def stack_points(steps: int, ratios: Sequence[float]) -> Iterator[Point]:
    """Rules on the whole stack; both predictors of a rule compute the same steps."""
    predictors = {"reuse": Reuse(), "order 1": Taylor(1)}
    for label, what in predictors.items():
        for t in FIRST_BLOCK:
            when = FirstBlock(t, warmup=4, last=True)
            yield ours("FirstBlock", label, f"{t:g}", Recipe(when, what, Stack()))
        for t in MAGNITUDE:
            rule = Magnitude(
                t, num_inference_steps=steps, mag_ratios=tuple(ratios), warmup=4, last=True
            )
            yield ours("MagCache", label, f"{t:g}", Recipe(rule, what, Stack()))
    for label, what in (predictors | {"order 2": Taylor(2, skip_first=True)}).items():
        for n in INTERVALS:
            every = Interval(n, warmup=4, last=True)
            yield ours("Interval", label, f"every {n}", Recipe(every, what, Stack()))
    for n in INTERVALS:
        yield ours("Interval", "reuse", f"every {n}, no guards", Recipe(Interval(n)))
    # two steps, then every n-th so that the third from the end is one, and the last; step 0 forgotten soon
    for order in (1, 2):
        for n in INTERVALS:
            early = Interval(n, phase=(steps - 3) % n, warmup=2, last=True)
            recipe = Recipe(early, Taylor(order, skip_first=True), Stack())
            yield ours("Interval", f"order {order}", f"every {n}, early start", recipe)
    for n in (3, 4):  # the early start of 28 steps, at any number of them
        early = Interval(n, phase=1, warmup=2, last=True)
        recipe = Recipe(early, Taylor(2, skip_first=True))
        yield ours("Interval", "order 2", f"every {n}, phase 1", recipe)
    yield from preset_points()
    yield from former_points()
    yield from longer_points(steps)
    seers = {
        "order 1": Taylor(1),
        "residual guide": Guided(),
        "modulated guide": Guided(guide="modulated"),
    }
    for label, what in seers.items():
        for n in SEER_INTERVALS:
            for last in (0, 1, 2):
                plan = [int(c or i >= steps - last) for i, c in enumerate(seer_schedule(steps, n))]
                recipe = Recipe(Mask(plan, warmup=0, last=False), what, Stack())
                setting = f"stack, every {n}" + f", last {last}" * (last > 0)
                yield ours("TaylorSeer", label, setting, recipe)


AFTER_THREE = ", after 3"  # the schedule on which guided prediction was first measured


COMPARABLE: dict[str, Any] = {
    "order 1": Taylor(1),
    "residual guide": Guided(),
    "modulated guide": Guided(guide="modulated"),
    "modulated guide, order 1": Guided(1, "modulated"),
}


def comparable_points(steps: int) -> Iterator[Point]:
    """Predictors on the very same computed steps: the first three, every n-th from there, and the last."""
    for n in INTERVALS:
        plan = [int(i < 3 or (i - 2) % n == 0 or i == steps - 1) for i in range(steps)]
        for label, what in COMPARABLE.items():
            recipe = Recipe(Mask(plan, warmup=0, last=False), what, Stack())
            method = "Guided" if isinstance(what, Guided) else "Interval"
            yield ours(method, label, f"every {n}{AFTER_THREE}", recipe)


def growing(steps: int, most: int) -> list[int]:
    """1 for the first four steps, and from there after gaps of 2, 3, ... up to `most`."""
    plan, at, gap = [0] * steps, 0, 1
    while at < steps:
        plan[at] = 1
        gap = 1 if at < 3 else min(most, gap + 1)
        at += gap
    return plan


def growing_points(steps: int) -> Iterator[Point]:
    """Predictors on schedules whose gaps grow, as they are and with the last step."""
    for most in GROWN:
        for ending, last in (("", 0), (", last", 1)):
            plan = growing(steps, most)
            plan[-1] = max(plan[-1], last)
            for label, what in COMPARABLE.items():
                recipe = Recipe(Mask(plan, warmup=0, last=False), what, Stack())
                method = "Guided" if isinstance(what, Guided) else "Interval"
                yield ours(method, label, f"gaps up to {most}{ending}", recipe)


def guided_points(cell: Cell) -> Iterator[Point]:
    """Guided prediction, in some cells also what is no candidate for the frontier."""
    plain = cell.guidance == "none"
    ablation = (cell.dtype, cell.steps, cell.guidance) == ("fp32", ABLATION_STEPS, "none")
    for guide in GUIDES + (COMPARED if plain else WARM) + ABLATIONS * ablation:
        for n in guide.intervals:
            setting = f"every {n}{guide.setting}"
            yield ours("Guided", guide.label, setting, guide.recipe(n, cell.steps))
    yield from comparable_points(cell.steps) if plain else ()
    for t in MISFIT if plain else ():
        recipe = Recipe(Misfit(t, warmup=4, last=True), Guided())
        yield ours("Guided", "residual guide", f"misfit {t:g}", recipe)
    for t in FIRST_BLOCK:
        recipe = Recipe(FirstBlock(t, warmup=2, last=True), Guided())
        yield ours("FirstBlock", "residual guide", f"{t:g}, warm-up 2", recipe)


def half_points(output: Mapping[str, Any]) -> Iterator[Point]:
    """What a batched call allows besides: rebuilding its unconditional half, alone and in company."""
    attention = Recipe(
        TimestepRange(2, (-1, 681), conditional_only=True), Extrapolate(0.3), Modules()
    )
    for n in HALVES:
        when = TimestepRange(n, (-1, 641))
        half = Recipe(when, Reuse(), Guidance(**output))
        yield ours("FasterCache", "extrapolate", f"half {n}", half)
        yield ours("FasterCache", "extrapolate", f"half {n}, attention 2", half + attention)
        for every in (2, 3, 4):
            stack = Recipe(Interval(every, warmup=2, last=True), Guided(guide="modulated"))
            yield ours("Guided", "modulated guide", f"every {every}, half {n}", half + stack)
        if not systems.missing("diffusers"):
            yield theirs(
                "FasterCache",
                "extrapolate",
                f"half {n}, attention 2",
                "FasterCacheConfig",
                unconditional_batch_skip_range=n,
                attention_weight_callback=lambda module: 0.3,
                tensor_format="BCHW",
                current_timestep_callback=systems.now,
            )
    for every in INTERVALS:
        for label, what in (("order 1", Taylor(1)), ("modulated guide", Guided(guide="modulated"))):
            warmup = 2 if isinstance(what, Guided) else 4
            recipe = Recipe(Interval(every, warmup=warmup, last=True), what)
            yield ours("Guided" if warmup == 2 else "Interval", label, f"every {every}", recipe)
