# SPDX-License-Identifier: Apache-2.0
"""How long the storage of a run is of use, where its schedule is known before step 0."""

from __future__ import annotations

from ..policies import REUSE
from ..recipe import Recipe
from ..storage.state import JUDGED, State

KEPT = 64  # lengths of runs whose plans are kept


class Uses:
    """The plans of a recipe, by the length of the run."""

    def __init__(self, recipe: Recipe) -> None:
        policies = [rule.when for rule in recipe.rules]
        self.recipe = recipe
        # nor is a run played through whose timesteps are not known yet, or whose storage is what it is for
        self.plans = not any(p.needs_signal or p.needs_timestep or p.calibrates for p in policies)
        self.known: dict[int, tuple[int, list[tuple]]] = {}

    def end(self, total: int | None) -> int | None:
        """After how many steps nothing reads the storage of a run any more: by its plan the last one that reuses, else
        all of them."""
        if total is None or not self.plans or total > JUDGED:  # longer than a run remembers
            return total
        return self._plan(total)[0]

    def went_as_planned(self, state: State) -> bool:
        """Whether a run has taken the steps of its plan so far."""
        if state.total is None or not self.plans or state.total > JUDGED:
            return False
        steps = self._plan(state.total)[1]
        return [record.actions for record in state.records] == steps[: state.index]

    def _plan(self, total: int) -> tuple[int, list[tuple]]:
        """After how many steps nothing is read, and the actions of every step."""
        if total not in self.known:
            if len(self.known) == KEPT:
                self.known.clear()
            steps = list(zip(*self.recipe.plan(total).rows, strict=True))
            reads = [i for i, actions in enumerate(steps) if REUSE in actions]
            self.known[total] = (reads[-1] + 1 if reads else total), steps
        return self.known[total]
