# SPDX-License-Identifier: Apache-2.0
"""How far the next forecast is off, measured at the first block."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import limit
from ..signals import Signal
from .base import COMPUTE, REUSE, Decision, Policy, Run, Step


@dataclass(frozen=True)
class Misfit(Policy):
    """Reuse while the history of the guide explains its value of this step up to `threshold`.

    Needs `Guided(guide="residual")` as predictor, whose weights leave the misfit behind. One number is
    read from the device per step. Anything not finite computes.

    Args:
        threshold: relative norm of what stays unexplained, unitless, >= 0.
        warmup, max_skips, last: guards of every `Policy`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: ours; measured in docs/benchmarks.md.
    """

    threshold: float = 0.3
    signal = Signal("first_block", "last_computed", "misfit")
    weighs = "misfit"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "threshold", limit("Misfit", "threshold", self.threshold))

    @property
    def never_reuses(self) -> bool:
        return self.threshold == 0

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        if guard or signal is None:
            return Decision(COMPUTE, signal, self.threshold, guard or "history too short")
        if signal <= self.threshold:
            return Decision(REUSE, signal, self.threshold, "misfit within threshold")
        return Decision(COMPUTE, signal, self.threshold, "misfit above threshold")
