# SPDX-License-Identifier: Apache-2.0
"""The closed loop: from the best schedule, move, add and leave out computed steps, and judge whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from .candidates import Candidate, masked
from .goal import Goal
from .lab import Lab, Trial

TRIED = 40  # plans
REACH = 3  # steps that a computed one is moved by

Marks = tuple[bool, ...]
Likeliest = Callable[
    [Trial, list[Marks]], list[Marks]
]  # which of these plans in place of a trial's come first


def improve(lab: Lab, goal: Goal, start: Trial, budget: float, likeliest: Likeliest) -> None:
    """Try plans near that of a trial, each nearer one from there on. Nothing where its plan is not one for all."""
    recipe = start.candidate.recipe
    if recipe is None or len(recipe.rules) > 1 or len(start.marks) != start.taken:
        return
    best, tried = start, {start.marks}
    rule, steps = recipe.rules[0], start.candidate.steps
    while len(tried) <= TRIED and lab.spent < budget:
        around = _around(lab, goal, best)
        plan = next((m for plans in around for m in likeliest(best, plans) if m not in tried), None)
        if plan is None:
            return
        tried.add(plan)
        moved = sum(a != b for a, b in zip(plan, start.marks, strict=True)) // 2
        name = f"{start.candidate.name}, {max(moved, 1)} moved"
        candidate = masked(plan, rule.what, rule.where, name, steps)
        best = _judged(lab, goal, candidate, best)


def _judged(lab: Lab, goal: Goal, candidate: Candidate, best: Trial) -> Trial:
    """The better of the two, on every seed that the best was judged on; the first that tells ends it."""
    trial = lab.trial(candidate)
    for seed in best.psnr:
        trial = lab.measure(candidate, seed)
        if trial.error:
            return best
        if goal.most is not None and trial.psnr[seed] < best.psnr[seed] and len(trial.psnr) == 1:
            return best
        if goal.error is not None and trial.psnr[seed] < goal.error - 1:
            return best
    return trial if goal.rank(lab, trial) > goal.rank(lab, best) else best


def _around(lab: Lab, goal: Goal, best: Trial) -> Iterator[list[Marks]]:
    """Plans near the best one's, those first that may bring more."""
    marks, kind = best.marks, best.candidate.kind
    if goal.planned is None:
        yield list(_left_out(marks))
    elif lab.cost.affordable(kind, best.taken, goal.planned) > sum(marks):
        yield list(_added(marks))
    yield list(dict.fromkeys(near(marks)))


def near(marks: Marks) -> Iterator[Marks]:
    """Plans of as many computed steps that differ in the place of one, or of all from one on."""
    yield from _shifted(marks)
    for stride in (s for reach in range(1, REACH + 1) for s in (reach, -reach)):
        for i in _steps(marks)[1:]:
            if 0 < i + stride < len(marks) and not marks[i + stride]:
                yield _with(marks, out=[i], more=[i + stride])


def _with(marks: Marks, out: Sequence[int] = (), more: Sequence[int] = ()) -> Marks:
    return tuple((m and i not in out) or i in more for i, m in enumerate(marks))


def _steps(marks: Marks) -> list[int]:
    return [i for i, m in enumerate(marks) if m]


def _left_out(marks: Marks) -> Iterator[Marks]:
    for i in reversed(_steps(marks)[1:]):
        yield _with(marks, out=[i])


def _added(marks: Marks) -> Iterator[Marks]:
    """One more in the middle of a row of reused steps, the longest row first."""
    ends = [*_steps(marks), len(marks)]
    rows = [(b - a, (a + b) // 2) for a, b in pairwise(ends) if b - a > 1]
    for _, middle in sorted(rows, key=lambda row: (-row[0], row[1])):
        yield _with(marks, more=[middle])


def _shifted(marks: Marks) -> Iterator[Marks]:
    """All steps from one on a step earlier or later, but for a computed last one: one gap changes, and the last."""
    end = len(marks) - marks[-1]  # a computed last step stays
    for stride in (1, -1):
        for i in [s for s in _steps(marks) if 0 < s < end]:
            some = [s + stride for s in _steps(marks) if i <= s < end]
            if some[-1] < end and not (stride < 0 and marks[some[0]]):
                kept = _with(marks, out=range(i, end))
                yield _with(kept, more=some)
