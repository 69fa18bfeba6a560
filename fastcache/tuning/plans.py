# SPDX-License-Identifier: Apache-2.0
"""Schedules for predictors at one step count, by what a calibrated run lets expect of them."""

from __future__ import annotations

from typing import NamedTuple

from ..calibration.nearby import Marks, climbed, marked
from ..calibration.outlook import Outlook
from ..policies import Interval
from ..predictors import Predictor
from ..recipe import Recipe
from ..targets.spec import Stack
from .candidates import PREDICTORS, SHAPES, Candidate, masked, shaped

STARTS = 2  # schedules of a predictor that single steps are moved from
LONG = 100  # steps of a run from which on moves are too many


class Planned(NamedTuple):
    """A candidate whose schedule is known beforehand."""

    candidate: Candidate
    predictor: str
    marks: Marks
    expected: float  # dB, on the outlook's scale


class Plans:
    """What there is to try in runs of one step count.

    Args:
        outlook: of such runs.
        steps: what `num_inference_steps` is; the outlook has as many as the denoiser takes.
    """

    def __init__(self, outlook: Outlook, steps: int) -> None:
        self.outlook, self.steps = outlook, steps
        self.predictors = tuple(name for name, what in PREDICTORS.items() if outlook.knows(what))
        self._spread: dict[tuple[str, int], list[Planned]] = {}
        # by computed steps, what moving steps has led to
        self._moved: dict[int, dict[Marks, None]] = {}
        self._moved_for: set[tuple[str, int]] = set()

    def kind(self, predictor: str) -> str:
        """Of all candidates with this predictor."""
        return Candidate("", Recipe(Interval(2), PREDICTORS[predictor]), self.steps).kind

    def spread(self, predictor: str, computed: int) -> list[Planned]:
        """A predictor on every shape of at most so many computed steps, the best first."""
        key = predictor, computed
        if key not in self._spread:
            taken = self.outlook.steps
            made = (shaped(predictor, s, self.steps, taken, computed) for s in SHAPES)
            found = (self.planned(c) for c in made if c is not None)
            planned = (p for p in found if p is not None)
            self._spread[key] = sorted(planned, key=lambda p: -p.expected)
        return self._spread[key]

    def all(self, predictor: str, computed: int) -> list[Planned]:
        """These, and what moving single steps as the outlook says leads to, for this predictor and others."""
        what, moved = PREDICTORS[predictor], self._moved.setdefault(computed, {})
        if (predictor, computed) not in self._moved_for and self.outlook.steps <= LONG:
            self._moved_for.add((predictor, computed))
            for start in self.spread(predictor, computed)[:STARTS]:
                moved[self._climbed(what, start.marks)] = None
        found = {p.marks: p for p in self.spread(predictor, computed)}
        for marks in moved:
            name = f"{predictor}, planned"
            planned = self.planned(masked(marks, what, Stack(), name, self.steps))
            if planned is not None and sum(planned.marks) <= computed:
                found.setdefault(planned.marks, planned)
        return list(found.values())

    def _climbed(self, what: Predictor, marks: Marks) -> Marks:
        """Where moving single steps leads to, but for those that a run begins with."""
        first = max(what.needs, 2)

        def alike(plan: Marks) -> bool:
            return plan[:first] == marks[:first]

        return climbed(self.outlook, what, marks, alike)

    def expecting(self, candidate: Candidate, marks: Marks) -> Planned | None:
        """A candidate whose run is known to compute these steps; None where the outlook says nothing of it."""
        rule, *others = candidate.recipe.rules if candidate.recipe is not None else ()
        if others or rule.where != Stack() or len(marks) != self.outlook.steps:
            return None
        if not self.outlook.knows(rule.what):
            return None
        name = next((n for n, what in PREDICTORS.items() if what == rule.what), repr(rule.what))
        return Planned(candidate, name, marks, self.outlook.expected(rule.what, marks))

    def planned(self, candidate: Candidate) -> Planned | None:
        """A candidate whose schedule is known beforehand; None where the outlook says nothing of it."""
        try:
            plan = candidate.recipe.plan(self.outlook.steps) if candidate.recipe else None
        except ValueError:  # it decides while it runs
            return None
        marks = () if plan is None else marked(plan.computed, len(plan))
        return self.expecting(candidate, marks)

    def instead(self, recipe: Recipe, plans: list[Marks]) -> list[Planned]:
        """A recipe on other schedules; none where the outlook says nothing of them."""
        rule = recipe.rules[0]
        made = (masked(m, rule.what, rule.where, "moved", self.steps) for m in plans)
        found = (self.expecting(c, m) for c, m in zip(made, plans, strict=True))
        return [p for p in found if p is not None]
