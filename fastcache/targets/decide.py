"""Deciding for one rule: beforehand, or inside the model's forward with what its first block shows.

A policy says what it wants. What it wants to reuse is confirmed here, by looking whether there is something
valid to reuse; the weights of its prediction are a step of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import sync
from ..ops import direct
from ..policies import COMPUTE, REUSE, Decision, Policy, Run, Step
from ..predictors import Predictor
from ..storage.history import Timeline, facts_of, stage, staged
from ..storage.ring import tail
from ..storage.state import State
from .control import HEAD, PENDING, StepControl
from .guide import Guide

residual_change = direct("residual_l1")
_change_into = direct("residual_l1_into_")


class Part(NamedTuple):
    """What a target is bound with: the place of its rule in the recipe, the rule, and what the model shares."""

    index: int  # type: ignore[assignment]
    when: Policy
    what: Predictor
    control: StepControl
    group: Any = None  # ranks that share a sample


class RuleDecider:
    """How one rule decides.

    ready: whether a state holds something valid to reuse. guide: where weights come from this step's own blocks.
    weighted: one set of weights serves the whole target. halves: a reused step sees half of a guidance batch.
    """

    __slots__ = (
        "_decide",
        "control",
        "group",
        "guide",
        "halves",
        "index",
        "max_misfit",
        "measures",
        "per_sample",
        "ready",
        "uploads",
        "weigh",
        "weighted",
        "what",
        "when",
    )

    def __init__(
        self,
        part: Part,
        ready: Callable[[State], bool],
        guide: Guide | None = None,
        weighted: bool = True,
        halves: bool = False,
    ) -> None:
        self.index, self.when, self.what, self.control, self.group = part
        self.ready, self.guide, self.halves = ready, guide, halves
        self.weighted = weighted and bool(part.what.depth)
        self.uploads = part.what.depth > 1 or part.what.table
        self.measures = part.when.measures if part.when.needs_signal else ""
        self.per_sample: bool = part.when.per_sample
        self.max_misfit: float | None = None if guide is None else guide.predictor.max_misfit
        self._decide = part.when.decide
        self.weigh = part.what.weights  # of the values computed at these steps, for this one

    def decide(self, state: State, step: Step, signal: float | None = None) -> Decision:
        """The decision for a step; a wish to reuse is granted where there is something valid to reuse."""
        run = state.runs[self.index]
        decision = self._decide(run, step, signal)
        if decision.action != REUSE:
            return decision
        if not self.ready(state):
            reason = "nothing valid to reuse"
        elif self.max_misfit is not None and self._misfits(state, run, self.max_misfit):
            reason = "misfit of the last step"
        else:
            return decision
        self.when.computed(run, step)
        return decision._replace(action=COMPUTE, reason=reason)

    def _misfits(self, state: State, run: Run, most: float) -> bool:
        """Whether the step before was reused and its guide explained too badly; reads one number then."""
        if run.in_a_row < 2:
            return False
        return not sync.mean(state.head["misfit"], self.group) <= most

    # --- inside the model's forward -----------------------------------------------------------------------

    def measure(self, hidden: Tensor, x: Tensor) -> None:
        """Measure what the first block made of x, and decide by it unless compiled code waits for the number."""
        if not self.measures:
            return
        control, measured = self.control, None
        state: State = control.state
        if self.measures == "misfit":
            measured = self._misfit(state, hidden, x)
        elif "kept" in state.head:  # a computed step has left a residual
            before, per_sample = tail(state.head["residual"], x), self.per_sample
            if control.phase == HEAD:
                sums = state.head["sums"]
                sums = tail(sums, x.flatten(1)) if per_sample else sums
                _change_into(sums, hidden.detach(), x.detach(), before, per_sample)
            else:
                measured = first_change(hidden, x, before, per_sample)
        if control.phase != HEAD:
            self.decide_with(measured)

    def _misfit(self, state: State, hidden: Tensor, x: Tensor) -> Tensor | None:
        """How well this step's guide follows from its history, on the device; None without a history."""
        assert self.guide is not None
        if self.control.phase != HEAD:
            if not self.ready(state):
                return None
            self.upload_prior(state)
        self.guide.see(state, self.index, REUSE, self.guide.of(hidden, x))
        return state.head["misfit"]

    def decide_with(self, measured: Tensor | None) -> None:
        """Decide the running step with what was measured; the one device read of a step."""
        control = self.control
        state, step = control.state, control.step
        decision = self.decide(state, step, self._read(state, measured))
        control.decisions[self.index] = decision
        control.actions[self.index] = decision.action
        if decision.action == REUSE and self.weighted:
            weights = self.weigh(state.timelines[self.index].steps, step.index)
            control.weights[self.index] = weights
            if self.guide is not None:
                self.guide.stage(state, weights)

    def _read(self, state: State, measured: Tensor | None) -> float | None:
        """What was measured as a number; ranks that share a sample agree on it."""
        group = self.group
        if group is not None and (measured is None or not self.ready(state)):
            # the other ranks wait for a number: join them with none, so that all compute
            held = state.head.get("residual")  # without one, no rank has one
            shape = (1,) if held is None else self.when.sums(held)
            sync.agreed(torch.full(shape, math.nan, device=state.device), group)
            return None
        if measured is None:
            return None
        if self.measures == "misfit":
            return sync.mean(measured, group)
        return sync.relative_change(measured, group)

    # --- for compiled code, and without storage -------------------------------------------------------------

    def upload(self, state: State) -> None:
        """Have the device hold what compiled code needs for this step, also for one still to be decided."""
        if not self.uploads:
            return
        timeline, action = state.timelines[self.index], self.control.actions[self.index]
        weights: Sequence[float] = ()
        if self.guide is None:  # a guide finds its weights on the device
            if action == REUSE:
                weights = self.control.weights[self.index]
            elif action == PENDING and timeline.steps:
                weights = self.weigh(timeline.steps, state.armed_step)
        stage(timeline, weights, state.armed_step, state.device)

    def foresee(self, state: State, actions: Sequence[str]) -> None:
        """Have the device hold what `upload` will give it in a run of these actions, in one copy.

        A run that goes otherwise is none the worse for it: `upload` then copies what is not there.
        """
        timeline, told = Timeline(state.timelines[self.index].depth), []
        for step, action in enumerate(actions):
            reused = action == REUSE and self.guide is None and self.weighted
            told.append(
                facts_of(timeline, self.weigh(timeline.steps, step) if reused else (), step)
            )
            if action == COMPUTE or self.what.feeds_back:
                timeline.push(step)
        staged(state.timelines[self.index], state.device).foresee(told)

    def foreseen(self, state: State) -> bool:
        """Whether that was done for a run as long as this one, or is not needed."""
        held = state.timelines[self.index].staged
        return not self.uploads or (held is not None and held.foreseen == state.total)

    def upload_prior(self, state: State) -> None:
        """Give the guide the weights that its ridge pulls toward, and compiled code the order of its rows."""
        assert self.guide is not None
        self.guide.stage(state, self.weigh(state.timelines[self.index].steps, state.armed_step))

    def compute_instead(self, reason: str) -> None:
        """Turn the decision of the running step into computing."""
        control, index = self.control, self.index
        if control.decisions[index].action == PENDING:
            self.decide_with(None)
        elif control.decisions[index].action == REUSE:
            self.when.computed(control.state.runs[index], control.step)
        control.actions[index] = COMPUTE
        control.decisions[index] = control.decisions[index]._replace(action=COMPUTE, reason=reason)


def first_change(hidden: Tensor, x: Tensor, before: Tensor, per_sample: bool = False) -> Tensor:
    """The two sums of the residual hidden - x against the one before, [2], or per sample [B, 2]."""
    hidden = hidden.detach() if hidden.requires_grad else hidden
    x = x.detach() if x.requires_grad else x
    return residual_change(hidden, x, before, per_sample)
