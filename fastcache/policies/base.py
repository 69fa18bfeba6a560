"""What a policy is: host numbers in, COMPUTE or REUSE out. No torch.

A policy is a frozen description. What it must remember during a run (accumulated error, steps in a row)
lives in the small mutable object that `begin` returns, one per request and context.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..checks import whole

COMPUTE = "compute"


REUSE = "reuse"


class Step(NamedTuple):
    """One denoiser call, as the host knows it before it runs."""

    index: int  # type: ignore[assignment]  # from 0 within the run
    total: int | None = None  # steps in the run, where known
    timestep: float | None = None  # in the model's own scale
    sigma: float | None = None
    guidance_skipped: bool = False  # this call sees only the conditional half of a guidance batch


class Decision(NamedTuple):
    """What to do with a step, and why."""

    action: str
    signal: float | None = None
    threshold: float | None = None
    reason: str = ""


@dataclass
class Run:
    """What a policy remembers during one run."""

    in_a_row: int = 0  # consecutive reused steps
    memory: Any = None  # the policy's own

    def copy(self) -> Run:
        """A copy that later decisions do not change."""
        return Run(self.in_a_row, copy.copy(self.memory))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Guards that every policy takes; None lets the recipe choose (see `Recipe`).

    warmup: steps always computed at the start. max_skips: longest row of reused steps (0: no limit).
    last: compute the last step of a run whose length is known.
    """

    warmup: int | None = None
    max_skips: int | None = None
    last: bool | None = None

    needs_signal = False  # True: `decide` wants a number measured on the device in this very step
    needs_timestep = False
    measures = "change"  # what the signal is: the "change" of the first block, or the "misfit" of its guide

    def sums(self, residuals: Any) -> tuple[int, ...]:
        """Shape of what is measured, where the first block's residuals are [B, ...]."""
        return (1,)

    def __post_init__(self) -> None:
        for name in ("warmup", "max_skips"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole(type(self).__name__, name, value, 0))
        if self.last is not None and not isinstance(self.last, bool):
            raise TypeError(
                f"{type(self).__name__}: last is {self.last!r}, must be True, False or None"
            )

    def guarded(self, **defaults: Any) -> Policy:
        """A copy in which guards left at None take these values."""
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    def begin(self, total: int | None = None) -> Run:
        """Fresh memory for a run of `total` steps."""
        return Run()

    def must_compute(self, run: Run, step: Step) -> str:
        """The reason why a guard computes this step, or ""."""
        if step.index == 0:
            return "first step"
        if step.index < (self.warmup or 0):
            return "warm-up"
        if self.last and step.total is not None and step.index == step.total - 1:
            return "last step"
        if self.max_skips and run.in_a_row >= self.max_skips:
            return "max_skips"
        return ""

    def decide(self, run: Run, step: Step, signal: float | None = None) -> Decision:
        """The decision for `step`. Called once per step, in order; updates `run`."""
        reason = self.must_compute(run, step)
        decision = self._judge(run, step, signal, reason)
        run.in_a_row = run.in_a_row + 1 if decision.action == REUSE else 0
        return decision

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        """The method's own rule; `guard` is the reason why it must compute, or ""."""
        raise NotImplementedError

    def computed(self, run: Run, step: Step) -> None:
        """The runtime computed a step that `decide` wanted to reuse (nothing valid to reuse)."""
        run.in_a_row = 0
