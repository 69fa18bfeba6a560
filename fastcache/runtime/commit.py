"""Accounting for a step that went well: histories, the record, and room for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..policies import COMPUTE, REUSE, Decision, Step
from ..recipe import Recipe
from ..storage.pool import Slots
from ..storage.state import State
from ..targets.base import BoundTarget
from ..targets.control import StepControl
from .settings import Settings
from .stats import Record


class Committer:
    """The books of one denoiser."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        recipe: Recipe,
        control: StepControl,
        targets: Sequence[BoundTarget],
        pool: Slots,
    ) -> None:
        self.name, self.control, self.targets, self.pool = name, control, targets, pool
        self.stats, self.notices, self.budget = settings.stats, settings.notices, settings.budget
        # place, whether predicted values enter the history too, what the target does after a computed step,
        # and whether it does so after a reused one
        self.rows = tuple(
            (i, rule.what.feeds_back, target.commit, target.decider.halves)
            for i, (rule, target) in enumerate(zip(recipe.rules, targets, strict=True))
        )

    def commit(self, state: State, step: Step) -> None:
        """Account for the step that `control` holds."""
        control = self.control
        decisions = control.decisions
        for i, feeds_back, commit, always in () if state.uncached_step else self.rows:
            action = decisions[i].action
            computed = action == COMPUTE
            if computed or feeds_back:
                timeline = state.timelines[i]
                for unit in state.units[i].values():
                    if unit.touched:
                        unit.stored(timeline.pushes, control.may_be_compiled)
                timeline.push(step.index)
            if computed or always:
                commit(state, action)
        state.index = step.index + 1
        decision = decisions[0]
        if len(decisions) > 1:
            decision = next((d for d in decisions if d.action == REUSE), decision)
        if decision.reason == "past the calibrated steps":
            self.notices.once(
                f"fastcache: steps past the {state.total} of num_inference_steps have no ratio and are "
                "computed. Give the run's length with cache.context(num_inference_steps=...)"
            )
        signal: Any = decision.signal
        if signal is None and decision.action == REUSE:
            signal = self._late_signal(state, decision)
        record = Record(
            state.key[0],
            state.key[1],
            step.index,
            decision.action,
            signal,
            decision.threshold,
            decision.reason,
            step.timestep,
            tuple(control.actions),
            self.name,
        )
        state.records.append(record)
        self.stats.add(record)
        self.pool.retire(state)
        if self.budget is not None and (alone := self.budget.keep(self.pool, state)):
            self.notices.once(
                f"fastcache: max_bytes is {self.budget.limit}, one context of {self.name} alone takes {alone}; "
                "it is computed without a cache"
            )

    def _late_signal(self, state: State, decision: Decision) -> Any:
        """What a reused step was decided by, where only the device knows; None otherwise."""
        slots = state.slots[self.control.decisions.index(decision)]
        if slots.guide is not None:
            return slots.guide.misfit.clone()
        if slots.decision.seen is not None:  # the device has decided
            return slots.decision.seen.clone()
        return None
