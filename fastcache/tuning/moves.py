# SPDX-License-Identifier: Apache-2.0
"""The closed loop: from the best schedule, move, add and leave out computed steps, and judge whole runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

from ..calibration.nearby import Marks, computed_of, near, with_steps
from .candidates import Candidate, masked
from .goal import Goal
from .lab import Lab, Trial

TRIED = 40  # plans

# which of these plans in place of a trial's come first
Likeliest = Callable[[Trial, list[Marks]], list[Marks]]


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


def _left_out(marks: Marks) -> Iterator[Marks]:
    for i in reversed(computed_of(marks)[1:]):
        yield with_steps(marks, out=[i])


def _added(marks: Marks) -> Iterator[Marks]:
    """One more in the middle of a row of reused steps, the longest row first."""
    ends = [*computed_of(marks), len(marks)]
    rows = [(b - a, (a + b) // 2) for a, b in pairwise(ends) if b - a > 1]
    for _, middle in sorted(rows, key=lambda row: (-row[0], row[1])):
        yield with_steps(marks, more=[middle])
