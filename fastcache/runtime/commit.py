# SPDX-License-Identifier: Apache-2.0
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
from .uses import Uses


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
        uses: Uses,
    ) -> None:
        self.uses = uses
        self.name, self.control, self.targets, self.pool = name, control, targets, pool
        self.stats, self.notices, self.budget = settings.stats, settings.notices, settings.budget
        # place, whether predicted values enter the history too, what the target does after a computed step,
        # and whether it does so after a reused one
        self.rows = tuple(
            (i, rule.what.feeds_back, target.commit, target.decider.halves)
            for i, (rule, target) in enumerate(zip(recipe.rules, targets, strict=True))
        )
        self.after_reuse = any(feeds_back or always for _, feeds_back, _, always in self.rows)

    def commit(self, state: State, step: Step) -> None:
        """Account for the step that `control` holds."""
        control, index = self.control, step.index
        decisions = control.decisions
        if not state.uncached_step and (self.after_reuse or COMPUTE in control.actions):
            self._note_stored(state, index)
        state.index = index + 1
        decision = decisions[0]
        if len(decisions) > 1:
            decision = next((d for d in decisions if d.action == REUSE), decision)
        action, signal, threshold, reason = decision
        if action == REUSE:
            if signal is None:
                signal = self._late_signal(state, decision)
        elif reason == "past the calibrated steps":
            self.notices.once(
                f"fastcache: steps past the {state.total} of num_inference_steps have no ratio and are "
                "computed. Give the run's length with cache.context(num_inference_steps=...)"
            )
        request, context = state.key
        actions = tuple(control.actions)
        record = tuple.__new__(  # as Record(...) does it, without a call into Python
            Record,
            (
                request,
                context,
                index,
                action,
                signal,
                threshold,
                reason,
                step.timestep,
                actions,
                self.name,
            ),
        )
        state.records.append(record)
        self.stats.add(record)
        ends, pool = state.ends, self.pool
        if (ends is not None and index + 1 >= ends) or pool.finished:
            self._retire(state, ends)
        if self.budget is not None and (alone := self.budget.keep(self.pool, state)):
            self.notices.once(
                f"fastcache: max_bytes is {self.budget.limit}, one context of {self.name} alone takes {alone}; "
                "it is computed without a cache"
            )

    def _retire(self, state: State, ends: int | None) -> None:
        """A run is spent, or another one is: keep few of them. One that did not go by its plan is spent at its end,
        and so is a compiled one, which runs its last steps with storage too."""
        if ends is not None and state.spent and not state.complete:
            if self.pool.fixed or not self.uses.went_as_planned(state):
                state.ends = state.total
        self.pool.retire(state)

    def _note_stored(self, state: State, index: int) -> None:
        """What this step has left in storage is in order from now on."""
        control = self.control
        for i, feeds_back, commit, always in self.rows:
            action = control.decisions[i].action
            if action == COMPUTE or feeds_back:
                timeline = state.timelines[i]
                for unit in state.units[i].values():
                    if unit.touched:
                        unit.stored(timeline.pushes, control.may_be_compiled)
                timeline.push(index)
            if action == COMPUTE or always:
                commit(state, action)

    def _late_signal(self, state: State, decision: Decision) -> Any:
        """What a reused step was decided by, where only the device knows; None otherwise."""
        slots = state.slots[self.control.decisions.index(decision)]
        if slots.guide is not None:
            return slots.guide.misfit.clone()
        if slots.decision.seen is not None:  # the device has decided
            return slots.decision.seen.clone()
        return None
