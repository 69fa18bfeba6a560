# SPDX-License-Identifier: Apache-2.0
"""The presets as points of the quality benchmark, and what they have been."""

from __future__ import annotations

from collections.abc import Iterator

import fastcache
from fastcache import Guided, Interval, Mask, Recipe

from .points import Point, ours

# "balanced" and "fast" of before, and "fast" between; the first "quality" was one of the guides
USUAL = Guided(guide="modulated")
FORMER = {
    ("modulated guide", "every 3.35 from 4, warm-up 3"): Recipe(
        Interval(3.35, phase=4, warmup=3, last=True), USUAL
    ),
    ("modulated guide", "every 4.4 from 4, warm-up 3, no last"): Recipe(
        Interval(4.4, phase=4, warmup=3, last=False), USUAL
    ),
    ("modulated guide, prior 2", "0 1 3 6 10 14 19 23 27"): Recipe(
        Mask(
            [int(i in (0, 1, 3, 6, 10, 14, 19, 23, 27)) for i in range(28)], scaled=True, last=True
        ),
        Guided(2, "modulated", 0.04, early=True, prior=2),
    ),
}


def preset_points() -> Iterator[Point]:
    """Presets, on the guide that they have on every trained model."""
    for name, row in fastcache.presets().items():
        if "point" in row:
            predictor, setting = row["point"]
            yield ours("Guided", predictor, setting, fastcache.preset(name, guide="modulated"))


def former_points() -> Iterator[Point]:
    """What they were, on the same guide."""
    for (predictor, setting), recipe in FORMER.items():
        yield ours("Guided", predictor, setting, recipe)


def longer_points(steps: int) -> Iterator[Point]:
    """Presets that name this number of steps, which are held against the converged picture."""
    name = f"converged/{steps}"
    if name in fastcache.presets():
        made = fastcache.preset(name, guide="modulated")
        yield ours("Guided", "modulated guide, prior 2", f"preset {name}", made)
