"""FirstBlockCache's rule: has the first block's residual changed since the last computed step?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..checks import flag, limit
from .base import COMPUTE, REUSE, Decision, Policy, Run, Step


@dataclass(frozen=True)
class FirstBlock(Policy):
    """Reuse while sum|r - r_prev| / sum|r_prev| <= threshold, r the residual of the first block.

    r_prev is the one of the last computed step. Equality reuses; anything not finite computes.
    threshold: unitless, 0.05 to 0.3 is usual. per_sample: judge every sample of a batch by itself, and compute
    the step if any of them asks for it; otherwise the sums run over the whole batch, and one sample that
    moves hides among others. Source: FirstBlockCache, diffusers 0.42.1; per_sample is ours.
    """

    threshold: float = 0.05
    per_sample: bool = False
    needs_signal = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "threshold", limit("FirstBlock", "threshold", self.threshold))
        flag("FirstBlock", "per_sample", self.per_sample)

    def sums(self, residuals: Any) -> tuple[int, ...]:
        return (residuals.shape[0], 2) if self.per_sample else (2,)

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        if guard or signal is None:
            return Decision(COMPUTE, signal, self.threshold, guard or "no residual yet")
        if math.isfinite(signal) and signal <= self.threshold:
            return Decision(REUSE, signal, self.threshold, "change within threshold")
        return Decision(COMPUTE, signal, self.threshold, "change above threshold")
