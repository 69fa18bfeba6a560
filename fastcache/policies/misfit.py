"""How far the next forecast is off, measured at the first block."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import limit
from .base import COMPUTE, REUSE, Decision, Policy, Run, Step


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
