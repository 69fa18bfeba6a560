# SPDX-License-Identifier: Apache-2.0
"""Gaps that widen by a fixed amount after every computed step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..checks import real
from .base import COMPUTE, REUSE, Decision, Policy, Run, Step


@dataclass(frozen=True)
class Widening(Policy):
    """Compute every floor(window)-th step after the warm-up; every step so computed adds `flex` to the window.

    Args:
        window: distance of computed steps to begin with, in steps, >= 1.
        flex: what each adds to it, in steps, >= 0; at 50 steps .75 computes 14 of them, 3.0 computes 10.
        warmup: steps computed at the start, a count.
        max_skips, last: guards of every `Policy`, none unless given.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: the adaptive window of Spectrum (arXiv 2603.01623), from the paper.
    """

    window: float = 2.0
    flex: float = 0.75
    warmup: int | None = field(default=5, kw_only=True)
    last: bool | None = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "window", real("Widening", "window", self.window, 1.0))
        object.__setattr__(self, "flex", real("Widening", "flex", self.flex, 0.0))

    @property
    def oldest(self) -> float:
        return self.max_skips or (math.floor(self.window) - 1 if not self.flex else math.inf)

    @property
    def never_reuses(self) -> bool:
        return self.window < 2 and not self.flex

    def begin(self, total: int | None = None) -> Run:
        return Run(memory=self.window)

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        warming = step.index < (self.warmup or 0)
        due = not warming and run.in_a_row + 1 >= math.floor(run.memory + 1e-9)
        if due:
            run.memory += self.flex
        if guard or due:
            return Decision(COMPUTE, reason=guard or "window")
        return Decision(REUSE, reason="window")
