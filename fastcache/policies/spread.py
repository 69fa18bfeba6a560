# SPDX-License-Identifier: Apache-2.0
"""A schedule by its share of computed steps, spread over a run of any length; and how a plan is stretched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil

from ..checks import real, whole
from .base import COMPUTE, REUSE, Decision, Policy, Run, Step


@dataclass(frozen=True)
class Spread(Policy):
    """Compute a share of a run's steps: the first ones, and the others spread over the rest.

    Of n steps round(share n) are computed, at least the first ones and the last. With growth 1 the gaps are even;
    above 1 they grow towards the end, as positions that go by (i / m) ** growth.

    Args:
        share: of the steps that are computed, 0 to 1, above 0.
        first: steps computed at the start, a count >= 1.
        growth: exponent of the positions, 0.25 to 4.
        last: whether the last step is one of the computed ones.
        warmup, max_skips: guards of every `Policy`; `first` is the warm-up of this one.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range; the message names it.
    Source: ours. A run whose length is not known is spread evenly, without an end.
    """

    share: float = 0.5
    first: int = 2
    growth: float = 1.0
    warmup: int | None = field(default=0, kw_only=True)
    last: bool | None = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("share", 0.0, 1.0), ("growth", 0.25, 4.0)):
            value = real("Spread", name, getattr(self, name))
            if not low <= value <= high or not value:
                raise ValueError(
                    f"Spread: {name} is {value:g}, must be above {low:g}, up to {high:g}"
                )
            object.__setattr__(self, name, value)
        object.__setattr__(self, "first", whole("Spread", "first", self.first, 1))

    @property
    def oldest(self) -> float:
        longest = ceil(max(self.growth, 1 / self.growth) / self.share) + 1
        return min(longest, self.max_skips or longest)

    @property
    def never_reuses(self) -> bool:
        return self.share == 1

    def begin(self, total: int | None = None) -> Run:
        if total is None:
            return Run()
        known = self.share, self.first, self.growth, bool(self.last), total
        return Run(memory=_spread(*known))

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        if guard or step.index < self.first:
            return Decision(COMPUTE, reason=guard or "first steps")
        i = step.index
        if run.memory is None:
            due = int(i * self.share) > int((i - 1) * self.share)
        else:
            due = i in run.memory
        return Decision(COMPUTE if due else REUSE, reason="spread")


@lru_cache(maxsize=512)
def _spread(share: float, first: int, growth: float, last: bool, total: int) -> frozenset[int]:
    first = min(first, total)
    count = min(max(round(share * total), first + last), total)
    more, start = count - first, first - 1
    length = total - 1 - start
    parts = more if last else more + 1
    places = [start + length * (i / parts) ** growth for i in range(1, more + 1)]
    return frozenset(range(first)) | frozenset(distinct(places, start + 1, total - 1))


def distinct(places: Sequence[float], lowest: int, highest: int) -> list[int]:
    """Whole numbers near ascending places, each larger than the one before, in lowest..highest."""
    found: list[int] = []
    for i, place in enumerate(places):
        least = found[-1] + 1 if found else lowest
        most = highest - (len(places) - 1 - i)
        found.append(min(max(round(place), least), most))
    return found


@lru_cache(maxsize=512)
def stretched(marks: tuple[bool, ...], total: int) -> tuple[bool, ...]:
    """A plan for a run of another length: as large a share of its steps, at the same shares of the way.

    Args:
        marks: one per step, True for a computed one, the first of them True.
        total: steps of the run, a count >= 1.
    Returns:
        As many marks, the first of them True.
    """
    if len(marks) == total:
        return marks
    at = [i for i, mark in enumerate(marks) if mark] or [0]
    count = min(max(round(len(at) * total / len(marks)), 1), total)
    places = []
    for j in range(count):
        x = j * (len(at) - 1) / max(count - 1, 1)
        low = int(x)
        high = min(low + 1, len(at) - 1)
        place = at[low] + (x - low) * (at[high] - at[low])
        places.append(place * (total - 1) / max(len(marks) - 1, 1))
    due = set(distinct(places, 0, total - 1))
    return tuple(i in due for i in range(total))
