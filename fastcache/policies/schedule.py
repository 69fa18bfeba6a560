# SPDX-License-Identifier: Apache-2.0
"""Rules that know only where a step lies: every n-th, inside a timestep range, or a given mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import ceil, floor, inf, isqrt

from ..checks import distance, flag, interval_of, marks_of, real, whole
from .base import COMPUTE, REUSE, Decision, Policy, Run, Step
from .spread import stretched

ROUNDING = 1e-9  # steps, by which a product of distances may miss a whole number


@dataclass(frozen=True)
class Interval(Policy):
    """Compute the warm-up, then every n-th step.

    Computed are: step < warmup, step == phase + floor(k n) for a whole k, step >= stop.

    Args:
        n: distance of computed steps, a number >= 1; 1 computes every step, 3.35 mixes gaps of 3 and 4.
        phase: index of a step that is due. None puts the first due step n after the last one of the
            warm-up.
        stop: index of the step from which everything is computed; None: never.
        warmup, max_skips, last: guards of every `Policy`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: TaylorSeer (arXiv 2503.06923), schedule of diffusers 0.42.1.
    """

    n: float = 5
    phase: int | None = None
    stop: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "n", distance("Interval", "n", self.n))
        for name in ("phase", "stop"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, whole("Interval", name, getattr(self, name), 0))

    @property
    def oldest(self) -> float:
        return min(ceil(self.n) - 1, self.max_skips or self.n)

    @property
    def never_reuses(self) -> bool:
        return self.n == 1

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        phase = self.phase if self.phase is not None else max((self.warmup or 0) - 1, 0)
        if guard:
            return Decision(COMPUTE, reason=guard)
        if self.stop is not None and step.index >= self.stop:
            return Decision(COMPUTE, reason="past stop")
        past = step.index - phase
        due = floor(ceil(past / self.n - ROUNDING) * self.n + ROUNDING) == past
        return Decision(COMPUTE, reason="interval") if due else Decision(REUSE, reason="interval")


@dataclass(frozen=True)
class Growing(Policy):
    """Compute the first steps, then leave gaps that grow by one step up to `n`: 1, 1, 1, 2, 3, ... n, n.

    With n 4 and first 4 computed are 0, 1, 2, 3, 5, 8, 12, 16, 20, ...

    Args:
        n: largest distance of computed steps, a count >= 1; 1 computes every step.
        first: steps computed at the start, a count >= 1.
        last: whether the last step is computed, in runs whose length is known.
        warmup, max_skips: guards of every `Policy`; `first` is the warm-up of this one.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: ours, from searches of schedules on the trained models.
    """

    n: int = 4
    first: int = 4
    warmup: int | None = field(default=0, kw_only=True)
    last: bool | None = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "first"):
            object.__setattr__(self, name, whole("Growing", name, getattr(self, name), 1))

    @property
    def never_reuses(self) -> bool:
        return self.n == 1

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        if guard or step.index < self.first:
            return Decision(COMPUTE, reason=guard or "first steps")
        past = step.index - self.first + 1
        largest = self.n * (self.n + 1) // 2 - 1
        if past <= largest:
            # 2 + 3 + ... + k is a triangular number less one, and eight of those plus one are a square
            square = 8 * (past + 1) + 1
            due = isqrt(square) ** 2 == square
        else:
            due = (past - largest) % self.n == 0
        return Decision(COMPUTE if due else REUSE, reason="growing gaps")


@dataclass(frozen=True)
class TimestepRange(Policy):
    """Inside lo < timestep < hi compute only every n-th call; outside compute all.

    The count runs from the start of the run, not from entry into the range.

    Args:
        n: distance of computed calls inside the range, a count >= 1; 1 computes every call.
        timesteps: (lo, hi), the range, in the model's scale; both ends lie outside it.
        conditional_only: whether to reuse only in calls that see just the conditional half of a
            guidance batch.
        warmup, max_skips, last: guards of every `Policy`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range, or not lo < hi; the message names it.
    Source: Pyramid Attention Broadcast (arXiv 2408.12588), FasterCache (arXiv 2410.19355), diffusers 0.42.1.
    """

    n: int = 2
    timesteps: tuple[float, float] = (100, 800)
    conditional_only: bool = False
    needs_timestep = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "n", whole("TimestepRange", "n", self.n, 1))
        object.__setattr__(
            self, "timesteps", interval_of("TimestepRange", "timesteps", self.timesteps)
        )
        flag("TimestepRange", "conditional_only", self.conditional_only)

    @property
    def oldest(self) -> float:
        return min(self.n - 1, self.max_skips or self.n)

    @property
    def never_reuses(self) -> bool:
        return self.n == 1

    @property
    def reuses_within(self) -> tuple[float, float]:
        return self.timesteps

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        lo, hi = self.timesteps
        t = step.timestep
        if guard:
            return Decision(COMPUTE, t, reason=guard)
        if t is None or not lo < t < hi:
            return Decision(
                COMPUTE, t, reason="outside the timestep range" if t is not None else "no timestep"
            )
        if step.index % self.n == 0:
            return Decision(COMPUTE, t, reason="interval")
        if self.conditional_only and not step.guidance_skipped:
            return Decision(COMPUTE, t, reason="full guidance batch")
        return Decision(REUSE, t, reason="interval")


@dataclass(frozen=True)
class Broadcast(Policy):
    """Compute all steps but the `steps` - 1 that follow each of the listed timesteps.

    Pyramid Attention Broadcast does so with the feed-forward modules of its first blocks: timesteps
    (676, 788, 864) with steps 2 for Open-Sora 1.2.

    Args:
        timesteps: in the model's scale; the first step at or below one of them (at or above, where
            time runs upwards) is computed and starts a broadcast.
        steps: length of a broadcast with its computed step, a count >= 1; 1 computes every step.
        warmup, max_skips, last: guards of every `Policy`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range, or `timesteps` is empty; the message names it.
    Source: Pyramid Attention Broadcast (arXiv 2408.12588), its repository's settings for Open-Sora 1.2.
    """

    timesteps: tuple[float, ...] = ()
    steps: int = 2
    needs_timestep = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.timesteps, str) or not hasattr(self.timesteps, "__iter__"):
            raise TypeError(f"Broadcast: timesteps is {self.timesteps!r}, must be numbers")
        listed = tuple(real("Broadcast", "timesteps", t) for t in self.timesteps)
        if not listed:
            raise ValueError("Broadcast: timesteps is empty, must hold at least one")
        object.__setattr__(self, "timesteps", listed)
        object.__setattr__(self, "steps", whole("Broadcast", "steps", self.steps, 1))

    @property
    def oldest(self) -> float:
        return min(self.steps - 1, self.max_skips or self.steps)

    @property
    def never_reuses(self) -> bool:
        return self.steps == 1

    def begin(self, total: int | None = None) -> Run:
        return Run(memory=(0, None))  # steps left of the broadcast, timestep of the step before

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        left, before = run.memory
        t = step.timestep
        starts = t is not None and any(
            t == at or (before is not None and min(t, before) <= at < max(t, before))
            for at in self.timesteps
        )
        run.memory = (self.steps - 1 if starts else max(left - 1, 0), t)
        if guard or starts or not left:
            return Decision(COMPUTE, t, reason=guard or "no broadcast")
        return Decision(REUSE, t, reason="broadcast")


@dataclass(frozen=True)
class Mask(Policy):
    """Compute exactly the steps marked True (or 1); steps past the end compute.

    Args:
        compute: one entry per step, True (1) for a computed and False (0) for a reused one;
            `fastcache.steps_mask` writes some by name.
        scaled: whether a run of another length, where that is known, computes as large a share of its steps at
            the same shares of the way; else its steps go by their number.
        warmup, max_skips, last: guards of every `Policy`, none unless given: the mask says it all.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: `compute` is empty or holds another number; the message names it.
    Source: step masks as in cache-dit 1.5.3 (`steps_computation_mask`).
    """

    compute: Sequence[bool | int] = ()
    scaled: bool = False
    warmup: int | None = field(default=0, kw_only=True)
    last: bool | None = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "compute", marks_of("Mask", "compute", self.compute))
        flag("Mask", "scaled", self.scaled)

    @property
    def oldest(self) -> float:
        if self.scaled:
            return self.max_skips or inf
        rows = (len(list(row)) for computed, row in groupby(self.compute) if not computed)
        longest = max(rows, default=0)
        return min(longest, self.max_skips or longest)

    @property
    def never_reuses(self) -> bool:
        return all(self.compute)

    def begin(self, total: int | None = None) -> Run:
        marks = tuple(map(bool, self.compute))
        return Run(memory=(total, stretched(marks, total) if self.scaled and total else marks))

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        _, marks = run.memory
        if guard or step.index >= len(marks):
            return Decision(COMPUTE, reason=guard or "past the mask")
        return Decision(COMPUTE if marks[step.index] else REUSE, reason="mask")
