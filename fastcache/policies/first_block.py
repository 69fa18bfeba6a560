"""FirstBlockCache's rule: has the first block's residual changed since the last computed step?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .base import COMPUTE, REUSE, Decision, Policy, Run, Step, limit


@dataclass(frozen=True)
class FirstBlock(Policy):
    """Reuse while sum|r - r_prev| / sum|r_prev| <= threshold, r the residual of the first block.

    r_prev is the one of the last computed step. Equality reuses; anything not finite computes.
    threshold: unitless, 0.05 to 0.3 is usual. Source: FirstBlockCache, diffusers 0.42.1.
    """

    threshold: float = 0.05
    needs_signal = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "threshold", limit("FirstBlock", "threshold", self.threshold))

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        if guard or signal is None:
            return Decision(COMPUTE, signal, self.threshold, guard or "no residual yet")
        if math.isfinite(signal) and signal <= self.threshold:
            return Decision(REUSE, signal, self.threshold, "change within threshold")
        return Decision(COMPUTE, signal, self.threshold, "change above threshold")


@dataclass(frozen=True)
class Misfit(Policy):
    """Reuse while the guide of this very step is explained by its history up to `threshold`.

    threshold: relative norm of what is left over, unitless. Needs `Guided(guide="residual")` as predictor,
    whose weights give the misfit for free; one number is read per step. Anything not finite computes.
    """

    threshold: float = 0.3
    needs_signal = True
    measures = "misfit"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "threshold", limit("Misfit", "threshold", self.threshold))

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        if guard or signal is None:
            return Decision(COMPUTE, signal, self.threshold, guard or "history too short")
        if signal <= self.threshold:
            return Decision(REUSE, signal, self.threshold, "misfit within threshold")
        return Decision(COMPUTE, signal, self.threshold, "misfit above threshold")
