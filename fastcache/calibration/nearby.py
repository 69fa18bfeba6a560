# SPDX-License-Identifier: Apache-2.0
"""Schedules near another one, and the way from one to the next that should come nearer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from ..predictors import Predictor
from .outlook import Outlook

REACH = 3  # steps that a computed one is moved by
ROUNDS = 8  # of moves, at most
GAIN = 0.05  # dB that a move has to bring

Marks = tuple[bool, ...]


def climbed(
    outlook: Outlook, what: Predictor, marks: Marks, allowed: Callable[[Marks], bool]
) -> Marks:
    """The schedule that moving single steps leads to, always the move that should bring most."""
    best = outlook.expected(what, marks)
    for _ in range(ROUNDS):
        tried = filter(allowed, near(marks))
        top = max(tried, key=lambda m: outlook.expected(what, m), default=marks)
        if outlook.expected(what, top) < best + GAIN:
            break
        marks, best = top, outlook.expected(what, top)
    return marks


def near(marks: Marks) -> Iterator[Marks]:
    """Plans of as many computed steps that differ in the place of one, or of all from one on."""
    yield from _shifted(marks)
    for stride in (s for reach in range(1, REACH + 1) for s in (reach, -reach)):
        for i in computed_of(marks)[1:]:
            if 0 < i + stride < len(marks) and not marks[i + stride]:
                yield with_steps(marks, out=[i], more=[i + stride])


def with_steps(marks: Marks, out: Sequence[int] = (), more: Sequence[int] = ()) -> Marks:
    return tuple((m and i not in out) or i in more for i, m in enumerate(marks))


def computed_of(marks: Marks) -> list[int]:
    """The steps that are computed, ascending."""
    return [i for i, m in enumerate(marks) if m]


def marked(computed: Collection[int], total: int) -> Marks:
    """The marks of a run of so many steps that computes these."""
    return tuple(i in computed for i in range(total))


def _shifted(marks: Marks) -> Iterator[Marks]:
    """All steps from one on a step earlier or later, but for a computed last one: one gap changes, and the last."""
    end = len(marks) - marks[-1]  # a computed last step stays
    for stride in (1, -1):
        for i in [s for s in computed_of(marks) if 0 < s < end]:
            some = [s + stride for s in computed_of(marks) if i <= s < end]
            if some[-1] < end and not (stride < 0 and marks[some[0]]):
                kept = with_steps(marks, out=range(i, end))
                yield with_steps(kept, more=some)
