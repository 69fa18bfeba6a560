# SPDX-License-Identifier: Apache-2.0
"""FirstBlockCache's rule: has the first block's residual changed since the last computed step?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checks import flag, limit
from ..signals import Signal
from .base import COMPUTE, REUSE, Decision, Policy, Run, Step


@dataclass(frozen=True)
class FirstBlock(Policy):
    """Reuse while sum|r - r_prev| / sum|r_prev| <= threshold, r the residual of the first block.

    r, r_prev: [B, tokens, width], r_prev that of the last computed step. Equality reuses; anything not
    finite computes.

    Args:
        threshold: relative L1 change, unitless, >= 0; 0.05 to 0.3 is usual. 0 reuses only
            what has not changed at all.
        per_sample: True judges every sample of a batch by itself, and computes the step if any of
            them asks for it. False sums over the whole batch, where one sample that moves can hide.
        warmup, max_skips, last: guards of every `Policy`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: FirstBlockCache of diffusers 0.42.1; `per_sample` is ours.
    """

    threshold: float = 0.05
    per_sample: bool = False
    signal = Signal("first_block", "last_computed", "change")
    weighs = "change"
    threshold_alone = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "threshold", limit("FirstBlock", "threshold", self.threshold))
        flag("FirstBlock", "per_sample", self.per_sample)

    @property
    def never_reuses(self) -> bool:
        return self.threshold == 0

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        if guard or signal is None:
            return Decision(COMPUTE, signal, self.threshold, guard or "no residual yet")
        if math.isfinite(signal) and signal <= self.threshold:
            # as Decision(...) does it, without a call into Python
            return tuple.__new__(
                Decision, (REUSE, signal, self.threshold, "change within threshold")
            )
        return Decision(COMPUTE, signal, self.threshold, "change above threshold")
