# SPDX-License-Identifier: Apache-2.0
"""DBCache's rule: the first blocks' change, under limits of its own, or a mask of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite

from ..checks import limit, marks_of, whole
from ..signals import Signal
from .base import COMPUTE, REUSE, Decision, Policy, Run, Step

WITHIN = "change within threshold"


@dataclass(slots=True)
class _Counts:
    """What a run, or what follows a refresh, has seen: reused steps, and changes added up."""

    reused: int = 0
    change: float = 0.0


@dataclass(frozen=True)
class DualBlock(Policy):
    """Reuse while the first blocks' residual has changed by less than `threshold`, as cache-dit's DBCache does.

    Computed are, in this order: each `interval`-th step of the warm-up, marks of `compute`, steps after `max_reused`
    reused ones or `max_skips` in a row, steps after changes that add up to `budget`, then those whose change is not
    below `threshold`.

    Args:
        threshold: relative L1 change against the last computed step, unitless, >= 0; 0 reuses nothing, from 1 on
            everything is reused, and equality computes.
        interval: distance of the steps that are computed in the warm-up, a count >= 1.
        max_reused: reused steps of a run, a count; None: no limit.
        budget: sum of the changes of a run, unitless; None: no limit.
        compute: marks, one per step, 1 for a computed one; steps past the end count as 0; None: no mask.
        refresh: index of a step that begins as a run does, a count >= 1; None: none.
        repeat: whether so does every `refresh`-th step after it.
        warmup, max_skips, last: guards of every `Policy`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: DBCache of cache-dit 1.5.3.
    """

    threshold: float = 0.08
    interval: int = 1
    max_reused: int | None = None
    budget: float | None = None
    compute: Sequence[bool | int] | None = None
    refresh: int | None = None
    repeat: bool = False
    _free = inf  # the step from which on nothing but the change decides,
    _below = 0.0  # and what that has to be below
    signal = Signal("first_block", "last_computed", "change")
    weighs = "change"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        object.__setattr__(self, "threshold", limit(name, "threshold", self.threshold))
        object.__setattr__(self, "interval", whole(name, "interval", self.interval, 1))
        for field, low in (("max_reused", 0), ("refresh", 1)):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, whole(name, field, getattr(self, field), low))
        if self.budget is not None:
            object.__setattr__(self, "budget", limit(name, "budget", self.budget))
        if self.compute is not None:
            object.__setattr__(self, "compute", marks_of(name, "compute", self.compute))
        if not isinstance(self.repeat, bool):
            raise TypeError(f"{name}: repeat is {self.repeat!r}, must be True or False")
        limits = self.compute is not None or self.max_reused is not None or self.refresh is not None
        limited = limits or self.last or self.max_skips or self.budget
        object.__setattr__(self, "_free", inf if limited else max(self._warmed, 1))
        object.__setattr__(self, "_below", inf if self.threshold >= 1 else self.threshold)

    @property
    def never_reuses(self) -> bool:
        return self.threshold == 0 or self.max_reused == 0

    def begin(self, total: int | None = None) -> Run:
        return Run(memory=_Counts())

    def decide(self, run: Run, step: Step, signal: float | None = None) -> Decision:
        at = step.index
        if at < self._free or step.compute or signal is None or not signal < self._below:
            return super().decide(run, step, signal)
        run.in_a_row += 1  # and nothing else counts
        # as Decision(...) does it, without a call into Python
        decision = run.decision = tuple.__new__(Decision, (REUSE, signal, self.threshold, WITHIN))
        return decision

    def must_compute(self, run: Run, step: Step) -> str:
        at = self._place(step.index)
        if not at:
            return "first step"
        if step.compute:
            return "asked for"
        if at < self._warmed and at % self.interval == 0:
            return "warm-up"
        if self.last and step.total is not None and step.index == step.total - 1:
            return "last step"
        if self.compute is not None and at < len(self.compute) and self.compute[at]:
            return "mask"
        if self.max_reused is not None and run.memory.reused >= self.max_reused:
            return "max_reused"
        if self.max_skips and run.in_a_row >= self.max_skips:
            return "max_skips"
        if self.budget and run.memory.change >= self.budget:
            return "budget"
        return ""

    @cached_property
    def _warmed(self) -> int:
        """Steps of the warm-up, which ends with the first marks of a mask."""
        warmup = self.warmup or 0
        if self.compute is None:
            return warmup
        first = next((i for i, mark in enumerate(self.compute) if not mark), len(self.compute))
        return min(warmup, first)

    def _place(self, index: int) -> int:
        """The step's index since the last refresh."""
        if self.refresh is None or index < self.refresh:
            return index
        return index % self.refresh if self.repeat else index - self.refresh

    def marks(self, steps: int | None = None) -> tuple[bool, ...]:
        """What the mask alone says.

        Args:
            steps: length of a run, a count; None: that of the mask.
        Returns:
            Per step whether it is computed; none where there is no mask.
        """
        mask = tuple(map(bool, self.compute or ()))
        places = map(self._place, range(len(mask) if steps is None else steps))
        return tuple(not at or (at < len(mask) and mask[at]) for at in places)

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        threshold = self.threshold
        if guard or signal is None:
            if not self._place(step.index):
                run.memory = _Counts()
            return Decision(COMPUTE, signal, threshold, guard or "no residual yet")
        if isfinite(signal):
            counts = run.memory
            if threshold < 1:
                counts.change += signal
            if signal < threshold or threshold >= 1:
                counts.reused += 1
                return Decision(REUSE, signal, threshold, WITHIN)
        return Decision(COMPUTE, signal, threshold, "change above threshold")

    def computed(self, run: Run, step: Step) -> None:
        super().computed(run, step)
        run.memory.reused -= 1
