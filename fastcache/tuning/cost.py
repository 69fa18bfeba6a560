# SPDX-License-Identifier: Apache-2.0
"""What runs cost, from the seconds that were measured of all of them.

A run costs c + a (1 + e) (computed + b reused), in units of the uncached run at the usual number of steps. c, what
comes before the first step and after the last, and b, what a reused step takes of a computed one, are seen within each
run, so that they are the same on a busy machine; b by kind, which is the same predictor, target and signal. e, what a
computed step takes more under a cache, needs the uncached run's time beside that of cached ones: all of them say it
together. One run's time is noisy; what all runs say of three numbers is less so.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable

GUESS = 0.1  # a reused step, in computed ones, while none was measured
MORE = (-0.2, 1.0)  # of a computed step, that a cache is believed to add; below 0 the clock errs
SIGMA = 1.48  # of a normal distribution, in medians of what lies apart from its middle
POOLED = 10  # runs of a kind from which on what they say of that counts as much as what all do


class Cost:
    """The cost model of one tuning.

    Args:
        usual: steps of the run that costs 1, as the denoiser counts them.
    """

    def __init__(self, usual: int) -> None:
        self.usual = usual
        self.rests: list[float] = []
        self.cached: list[tuple[str, float, float, float]] = []
        self.seen: dict[str, list[float]] = defaultdict(list)
        self._known: dict[
            tuple[str, str], float
        ] = {}  # what follows from these, until there are more

    def note(self, kind: str, computed: float, reused: float, ratio: float) -> None:
        """One run under a cache: steps computed and reused, and its time as a share of the uncached run's."""
        if kind:
            self.cached.append((kind, computed, reused, ratio))
            self._known.clear()

    def see(self, kind: str, reuse: float | None = None, rest: float | None = None) -> None:
        """What a reused step took, and all besides steps, in computed steps of the same run."""
        if reuse is not None:
            self.seen[kind].append(reuse)
        if rest is not None:
            self.rests.append(rest)
        self._known.clear()

    def _once(self, name: str, kind: str, make: Callable[[str], float]) -> float:
        if (name, kind) not in self._known:
            self._known[name, kind] = make(kind)
        return self._known[name, kind]

    @property
    def fixed(self) -> float:
        """What a run costs besides its steps."""
        return self._once("fixed", "", self._fixed)

    def _fixed(self, kind: str) -> float:
        rest = statistics.median(self.rests[1:] or self.rests) if self.rests else 0.0
        return rest / (rest + self.usual)

    @property
    def step(self) -> float:
        """What a computed step costs without a cache."""
        return (1 - self.fixed) / self.usual

    def reused(self, kind: str) -> float:
        """What a reused step of a kind takes of a computed one."""
        return self._once("reused", kind, self._reused)

    def _reused(self, kind: str) -> float:
        found = self.seen.get(kind, [])
        # the first run of a kind loads and compiles things
        return statistics.median(found[1:] or found) if found else GUESS

    def more(self, kind: str) -> float:
        """What a computed step takes more under a cache, as a share: by all runs, and by those of a kind where there
        are many."""
        return self._once("more", kind, self._more)

    def _more(self, kind: str) -> float:
        fixed, step = self.fixed, self.step
        found = [
            (k, (ratio - fixed) / (step * (c + self.reused(k) * n)))
            for k, c, n, ratio in self.cached
        ]
        if not found:
            return 0.0
        said = statistics.median(more for _, more in found)
        own = [more for k, more in found if k == kind]
        if own:
            said = (said * POOLED + statistics.median(own) * len(own)) / (POOLED + len(own))
        return min(max(said - 1, MORE[0]), MORE[1])

    def doubt(self, timings: int) -> float:
        """By what share all costs may be wrong, with so many timings of the uncached run: their standard error."""
        return self._once("spread", "", self._spread) / math.sqrt(max(timings, 1))

    def _spread(self, kind: str) -> float:
        apart = [abs(ratio / self.of(k, c, n) - 1) for k, c, n, ratio in self.cached]
        return SIGMA * statistics.median(apart) if apart else 0.0

    def of(self, kind: str, computed: float, reused: float) -> float:
        """What a run costs."""
        if not kind:
            return self.fixed + self.step * computed
        return self.fixed + self.step * (1 + self.more(kind)) * (
            computed + self.reused(kind) * reused
        )

    def affordable(self, kind: str, steps: int, most: float) -> int:
        """How many of `steps` steps may be computed; 0 where none may."""
        free = (most - self.fixed) / self.step
        if not kind:
            return int(free + 1e-6)
        reused = self.reused(kind)
        free = free / (1 + self.more(kind)) - reused * steps
        return min(max(int(free / (1 - reused) + 1e-6), 0), steps) if reused < 1 else 0
