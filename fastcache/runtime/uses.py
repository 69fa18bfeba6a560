# SPDX-License-Identifier: Apache-2.0
"""How long the storage of a run is of use, where its schedule is known before step 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..policies import REUSE
from ..recipe import Recipe
from ..storage.state import JUDGED, State

KEPT = 64  # lengths of runs whose plans are kept


class Played(NamedTuple):
    """What a run does. rows: by rule, the action of every step; steps: the same by step; end: after how many steps
    nothing reads its storage."""

    rows: Sequence[Sequence[str]]
    steps: list[tuple[str, ...]]
    end: int


class Uses:
    """The plans of a recipe, by the length of the run."""

    def __init__(self, recipe: Recipe) -> None:
        policies = [rule.when for rule in recipe.rules]
        self.recipe = recipe
        # nor does one go as planned whose timesteps are not known yet, or whose storage is what it is for
        self.plans = not any(p.needs_signal or p.needs_timestep or p.calibrates for p in policies)
        self.known: dict[int, Played] = {}

    def end(self, total: int | None) -> int | None:
        """After how many steps nothing reads the storage of a run any more: by its plan the last one that reuses, else
        all of them."""
        if total is None or not self.plans or total > JUDGED:  # longer than a run remembers
            return total
        return self.played(total).end

    def went_as_planned(self, state: State) -> bool:
        """Whether a run has taken the steps of its plan so far."""
        if state.total is None or not self.plans or state.total > JUDGED:
            return False
        steps = self.played(state.total).steps
        return [record.actions for record in state.records] == steps[: state.index]

    def played(self, total: int) -> Played:
        """A run of so many steps, of a recipe that looks at nothing."""
        if total not in self.known:
            if len(self.known) == KEPT:
                self.known.clear()
            rows = self.recipe.plan(total).rows
            steps = list(zip(*rows, strict=True))
            reads = [i for i, actions in enumerate(steps) if REUSE in actions]
            self.known[total] = Played(rows, steps, reads[-1] + 1 if reads else total)
        return self.known[total]
