# SPDX-License-Identifier: Apache-2.0
"""What is measured on a distilled model: every schedule of its few steps, peers, and fewer steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from fastcache import Guided, Hermite, Mask, Recipe, Reuse, Stack, Taylor

from .points import Point, ours
from .subjects import Cell
from .sweeps import peer_points

FORECASTS: dict[str, Any] = {
    "reuse": Reuse(),
    "order 1": Taylor(1),
    "Hermite 1": Hermite(1),
    "modulated guide, order 1": Guided(1, "modulated"),
}


def short_points(cell: Cell, ratios: Sequence[float]) -> Iterator[Point]:
    """Every setting of a cell of few steps; ratios: MagCache's."""
    for n in range(cell.steps // 2, cell.steps):
        yield Point("uncached", "fewer steps", "", f"{n} steps", None, n)
    for plan in schedules(cell.steps):
        setting = " ".join(str(i) for i, computed in enumerate(plan) if computed)
        when = Mask(plan, warmup=0, last=False)
        for label, what in FORECASTS.items():
            yield ours("Mask", label, setting, Recipe(when, what, Stack()))
    yield from peer_points(cell, ratios)


def schedules(steps: int) -> Iterator[list[int]]:
    """All that compute steps 0 and 1, at least half and not all."""
    for rest in itertools.product((1, 0), repeat=steps - 2):
        if steps // 2 <= 2 + sum(rest) < steps:
            yield [1, 1, *rest]
