# SPDX-License-Identifier: Apache-2.0
"""What runs cost, from the seconds that were measured of all of them.

A run costs c + a computed + b reused, in units of the uncached run at the usual number of steps. c and a are found
from uncached runs of several lengths, b from the runs of its kind: those with the same predictor, target and signal.
One run's time is noisy; what all runs say of three numbers is less so.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass, field

PAIR = (
    2  # timings of shorter runs without a cache, from which on what is constant in them is believed
)
GUESS = 0.05  # a reused step, in computed ones, while none was measured


@dataclass
class Cost:
    """The cost model of one tuning.

    Args:
        usual: steps of the run that costs 1, as the denoiser counts them.
    """

    usual: int
    uncached: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    cached: dict[str, list[tuple[float, float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def note(self, kind: str, computed: float, reused: float, ratio: float) -> None:
        """One run: steps computed and reused, and its time as a share of the uncached run's."""
        if kind:
            self.cached[kind].append((computed, reused, ratio))
        else:
            self.uncached[round(computed)].append(ratio)

    @property
    def fixed(self) -> float:
        """What a run costs besides its steps."""
        found = [
            (ratio - steps / self.usual) / (1 - steps / self.usual)
            for steps, ratios in self.uncached.items()
            for ratio in ratios
            if steps < self.usual
        ]
        # other work on the machine only ever adds to a time
        return min(max(min(found), 0.0), 0.9) if len(found) >= PAIR else 0.0

    @property
    def step(self) -> float:
        """What a computed step costs."""
        return (1 - self.fixed) / self.usual

    def reused(self, kind: str) -> float:
        """What a reused step of a kind costs."""
        runs = self.cached.get(kind, [])[1:]  # the first one loads and compiles things
        fixed, step = self.fixed, self.step
        found = [(r - fixed - step * c) / n for c, n, r in runs if n]
        return max(statistics.median(found), 0.0) if found else GUESS * step

    def of(self, kind: str, computed: float, reused: float) -> float:
        """What a run costs."""
        return self.fixed + self.step * computed + (self.reused(kind) * reused if reused else 0.0)

    def affordable(self, kind: str, steps: int, most: float) -> int:
        """How many of `steps` steps may be computed; 0 where none may."""
        if not kind:
            return int((most - self.fixed) / self.step + 1e-6)
        reused = self.reused(kind)
        free = most - self.fixed - reused * steps
        each = self.step - reused
        return min(max(int(free / each + 1e-6), 0), steps) if each > 0 else 0
