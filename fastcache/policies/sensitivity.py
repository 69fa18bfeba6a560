# SPDX-License-Identifier: Apache-2.0
"""SenCache's rule: how much can the output have changed, by its sensitivity to the latents and to time?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checks import flag, limit, real
from ..signals import Signal
from .base import COMPUTE, REUSE, Decision, Policy, Run, Step


@dataclass(frozen=True)
class Sensitivity(Policy):
    """Reuse while alpha_x |x - x'| + alpha_t |t - t'| <= threshold.

    x: the model's input latents, t its timestep, x' and t' those of the last computed step, |.| the L2 norm.
    Equality reuses; anything not finite, or a timestep that is not known, computes.

    Args:
        threshold: of the weighted distance, in the unit that the alphas give it, >= 0.
        alpha_x: sensitivity to the latents, per unit of their L2 norm, >= 0.
        alpha_t: sensitivity to time, per unit of the timestep in the model's scale, >= 0.
        per_sample: True takes the largest norm of the samples of a batch, False that of all together.
        warmup, max_skips, last: guards of every `Policy`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: SenCache (arXiv 2602.24208), from the paper.
    """

    threshold: float = 0.05
    alpha_x: float = 1.0
    alpha_t: float = 0.0
    per_sample: bool = False
    signal = Signal("model_input", "last_computed", "distance")
    weighs = "error"
    needs_timestep = True

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = "Sensitivity"
        object.__setattr__(self, "threshold", limit(owner, "threshold", self.threshold))
        for name in ("alpha_x", "alpha_t"):
            object.__setattr__(self, name, real(owner, name, getattr(self, name), 0.0))
        flag(owner, "per_sample", self.per_sample)

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        before, score = run.memory, None
        if not guard and step.timestep is None:
            guard = "no timestep"
        if signal is not None and step.timestep is not None and before is not None:
            score = self.alpha_x * signal + self.alpha_t * abs(step.timestep - before)
        if not guard and score is None:
            guard = "nothing to compare with"
        if not guard and score is not None and math.isfinite(score) and score <= self.threshold:
            return Decision(REUSE, score, self.threshold, "change within threshold")
        run.memory = step.timestep
        return Decision(COMPUTE, score, self.threshold, guard or "change above threshold")

    def computed(self, run: Run, step: Step) -> None:
        super().computed(run, step)
        run.memory = step.timestep
