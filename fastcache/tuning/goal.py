# SPDX-License-Identifier: Apache-2.0
"""What is wished for: a speed-up, or an error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..checks import real
from .lab import Lab, Trial

SLACK = 0.01  # by how much a measured time may miss a wished speed-up,
MOST_SLACK = 0.02  # and at most, where no better can be told from the times


@dataclass(frozen=True)
class Goal:
    """Exactly one of the two.

    Args:
        speedup: of the run's time, >= 1: the run that comes nearest to the reference is looked for.
        error: PSNR to the reference, dB: the cheapest run that keeps it is looked for.
    Raises:
        TypeError, ValueError: that names the argument.
    """

    speedup: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if (self.speedup is None) == (self.error is None):
            raise ValueError(
                f"tune: speedup is {self.speedup!r} and error is {self.error!r}, give exactly one: speedup=2 for the "
                "nearest run that is twice as fast, error=40 for the fastest run within 40 dB"
            )
        for name in ("speedup", "error"):
            if (given := getattr(self, name)) is not None:
                value = real("tune", name, given)
                if not math.isfinite(value) or value < (1 if name == "speedup" else -math.inf):
                    wanted = (
                        "a finite number >= 1" if name == "speedup" else "a finite number of dB"
                    )
                    raise ValueError(f"tune: {name} is {given!r}, must be {wanted}")
                object.__setattr__(self, name, value)

    @property
    def most(self) -> float | None:
        """The cost, as a share of the uncached run's, that a run may have; None: any."""
        return None if self.speedup is None else 1 / self.speedup

    @property
    def planned(self) -> float | None:
        """The cost that schedules are made for; None: any."""
        return None if self.most is None else self.most * (1 + 0.9 * SLACK)

    def met(self, lab: Lab, trial: Trial) -> bool:
        """Whether a trial is what was wished for."""
        if not trial.psnr:
            return False
        if self.most is not None:
            return lab.expected(trial) <= self.most * (1 + min(max(SLACK, lab.doubt), MOST_SLACK))
        assert self.error is not None
        return trial.quality >= self.error

    def rank(self, lab: Lab, trial: Trial) -> tuple[Any, ...]:
        """What is better is larger."""
        cost, met = lab.expected(trial), self.met(lab, trial)
        nearest, cheapest = (trial.quality, -cost), (-cost, trial.quality)
        return (met, *(nearest if met == (self.most is not None) else cheapest))

    def __str__(self) -> str:
        if self.speedup is not None:
            return f"nearest at {self.speedup:g} times the speed"
        return f"fastest within {self.error:g} dB"
