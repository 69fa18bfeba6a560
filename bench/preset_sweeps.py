# SPDX-License-Identifier: Apache-2.0
"""The presets as points of the quality benchmark, and what they have been."""

from __future__ import annotations

from collections.abc import Iterator

import fastcache
from fastcache import Guided, Interval, Recipe

from .points import Point, ours

# "balanced" and "fast" of before; "quality" was one of the guides
FORMER = {
    "every 3.35 from 4, warm-up 3": Interval(3.35, phase=4, warmup=3, last=True),
    "every 4.4 from 4, warm-up 3, no last": Interval(4.4, phase=4, warmup=3, last=False),
}


def preset_points() -> Iterator[Point]:
    """Presets, on the guide that they have on every trained model."""
    for name, row in fastcache.presets().items():
        if "point" in row:
            predictor, setting = row["point"]
            yield ours("Guided", predictor, setting, fastcache.preset(name, guide="modulated"))


def former_points() -> Iterator[Point]:
    """What they were, on the same guide."""
    for setting, when in FORMER.items():
        yield ours("Guided", "modulated guide", setting, Recipe(when, Guided(guide="modulated")))


def longer_points(steps: int) -> Iterator[Point]:
    """Presets that name this number of steps, which are held against the converged picture."""
    name = f"converged/{steps}"
    if name in fastcache.presets():
        made = fastcache.preset(name, guide="modulated")
        yield ours("Guided", "modulated guide, prior 2", f"preset {name}", made)
