# SPDX-License-Identifier: Apache-2.0
"""What policies share that add up a measured number over the steps that they skip."""

from __future__ import annotations

from dataclasses import dataclass

from .base import COMPUTE, REUSE, Decision, Policy, Run, Step


@dataclass
class Sum:
    """error: added up since the last computed step. at: the latest step that was judged."""

    error: float = 0.0
    at: int = 0


@dataclass(frozen=True)
class Accumulated(Policy):
    """Reuse while what was added up since the last computed step stays below `threshold`.

    A computed step starts it anew, for whatever reason it was computed. A subclass says what a number adds, and
    which steps cannot be judged.
    """

    weighs = "error"

    @property
    def never_reuses(self) -> bool:
        return self.threshold == 0

    def begin(self, total: int | None = None) -> Run:
        return Run(memory=Sum())

    def _added(self, signal: float) -> float:
        """What a step's number adds."""
        return signal

    def _unjudged(self, account: Sum, step: Step) -> str:
        """Why a step is computed that no guard computes, before its number is looked at; "" for no reason."""
        return ""

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        account: Sum = run.memory
        guard = guard or self._unjudged(account, step)
        account.at = step.index
        if not guard and signal is None:
            guard = "nothing to compare with"
        error = None if signal is None else account.error + self._added(signal)
        if not guard and error is not None and error < self.threshold and self.threshold:
            account.error = error
            return Decision(REUSE, error, self.threshold, "error below threshold")
        account.error = 0.0
        return Decision(COMPUTE, error, self.threshold, guard or "error reached threshold")

    def computed(self, run: Run, step: Step) -> None:
        super().computed(run, step)
        run.memory.error = 0.0
