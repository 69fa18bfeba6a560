# SPDX-License-Identifier: Apache-2.0
"""Deciding for one rule: beforehand, or inside the model's forward with what is seen there.

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
from ..policies import COMPUTE, REUSE, Decision, Policy, Run, Step
from ..predictors import Predictor
from ..storage.group import SlotGroup
from ..storage.history import Timeline, facts_of, stage, staged
from ..storage.state import State
from .control import HEAD, PENDING, StepControl
from .guide import Guide, GuideSlots
from .meters import meter_for
from .meters.base import SignalSlots


class Part(NamedTuple):
    """What a target is bound with: the place of its rule in the recipe, the rule, and what the model shares."""

    index: int  # type: ignore[assignment]
    when: Policy
    what: Predictor
    control: StepControl
    group: Any = None  # ranks that share a sample
    model: Any = None  # whose part it is


class DecisionSlots(SlotGroup):
    """What the device keeps where it decides: skipped steps in a row, [1] int64; whether the host's guards ask to
    compute this step, [1] bool; of the last decision the change and whether it reused, [2] float64."""

    __slots__ = ("must", "seen", "skips")
    holds = ("skips", "must", "seen")
    must: Any
    seen: Any
    skips: Any


class RuleSlots(SlotGroup):
    """All that a rule keeps for a run beside its histories; guide and own are None where it has none.

    own: those of its target.
    """

    __slots__ = ("decision", "guide", "own", "signal")
    parts = ("signal", "decision", "guide", "own")
    decision: DecisionSlots
    guide: Any
    own: Any
    signal: SignalSlots


class RuleDecider:
    """How one rule decides.

    ready: whether a state holds something valid to reuse. meter: measures what the policy looks at, None where it
    looks at nothing. inside: that is seen only inside the model's forward. guide: where weights come from this step's
    own blocks. weighted: one set of weights serves the whole target. halves: a reused step sees half of a guidance
    batch.
    """

    __slots__ = (
        "_decide",
        "control",
        "group",
        "guide",
        "halves",
        "index",
        "inside",
        "looked_at",
        "max_misfit",
        "meter",
        "oldest",
        "own",
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
        own: Callable[[], SlotGroup] | None = None,
    ) -> None:
        self.index, self.when, self.what, self.control, self.group, model = part
        self.ready, self.guide, self.halves, self.own = ready, guide, halves, own
        self.weighted = weighted and bool(part.what.depth)
        self.uploads = part.what.depth > 1 or part.what.table
        self.meter = meter_for(part.when, part.index, guide, model)
        self.inside = part.when.decides_inside
        self.looked_at: Tensor | None = None  # by a rule that decides before the forward
        self.max_misfit: float | None = None if guide is None else guide.predictor.max_misfit
        self._decide = part.when.decide
        self.oldest = part.when.oldest
        # of the values computed at these steps, for this one
        self.weigh = self._weigh_in_run if part.what.per_run else part.what.weights

    def new_slots(self) -> RuleSlots:
        """What the rule keeps for a run beside its histories."""
        guide = None if self.guide is None else GuideSlots()
        own = None if self.own is None else self.own()
        return RuleSlots(signal=SignalSlots(), decision=DecisionSlots(), guide=guide, own=own)

    def decide(self, state: State, step: Step, signal: float | None = None) -> Decision:
        """The decision for a step; a wish to reuse is granted where there is something valid to reuse."""
        run = state.runs[self.index]
        if step.again and not self.when.runs_first_block and run.decision is not None:
            return run.decision  # a solver's further evaluation of a step
        decision = self._decide(run, step, signal)
        if decision.action != REUSE:
            return decision
        age = step.index - run.computed_at
        if not self.ready(state):
            reason = "nothing valid to reuse"
        elif age > run.in_a_row and age > self.oldest:  # more steps have gone by than were decided
            reason = "too old"
        elif self.max_misfit is not None and self._misfits(state, run, self.max_misfit):
            reason = "misfit of the last step"
        else:
            return decision
        self.when.computed(run, step)
        run.decision = decision._replace(action=COMPUTE, reason=reason)
        return run.decision

    def _misfits(self, state: State, run: Run, most: float) -> bool:
        """Whether the step before was reused and its guide explained too badly; reads one number then."""
        if run.in_a_row < 2:
            return False
        return not sync.mean(state.slots[self.index].guide.misfit, self.group) <= most

    def _weigh_in_run(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        """The weights where they differ by the length of the run."""
        weights: Any = self.what.weights
        found: tuple[float, ...] = weights(steps, step, self.control.state.total)
        return found

    # --- with what a signal shows ---------------------------------------------------------------------------

    def look(self, state: State, step: Step, args: tuple, kwargs: dict) -> float | None:
        """The number that a call shows before its forward begins; None without one."""
        meter = self.meter
        assert meter is not None
        if step.again:  # decided, and what it is held against belongs to the first evaluation
            return None
        value = self.looked_at = meter.of_call(step, args, kwargs)
        if value is None:
            meter.missed(state)
            return self._read(state, None)
        return self._read(state, meter.measure(state, value, None))

    def note_looked_at(self, state: State, action: str) -> None:
        """Have later steps measured against what was looked at, the decision having fallen."""
        meter, value, self.looked_at = self.meter, self.looked_at, None
        if state.evicted or state.without:
            return  # a run without storage takes none from the others
        if meter is not None and value is not None and (action == COMPUTE or meter.every_step):
            meter.keep(state, value, None)

    def around(self, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """The model's output, of which the meter takes note where it looks there."""
        output = run(*args, **kwargs)
        if self.control.actions[self.index] == COMPUTE:
            assert self.meter is not None
            self.meter.of_output(self.control.state, output)
        return output

    def measure(self, y: Tensor, x: Tensor | None) -> None:
        """Measure y, or y - x, inside the forward, and decide by it unless compiled code waits for the number."""
        if not self.inside:
            return
        control = self.control
        meter: Any = self.meter
        state: State = control.state
        if control.phase == HEAD:  # `prepare_head` has seen what there is to measure against
            meter.measure_head(state, y, x)
            return
        if meter.needs_history:
            self.decide_with(self.measured(state, y, x))
        elif self.group is None:
            self.decide_by(meter.number(state, y, x))
        else:
            self.decide_with(meter.measure(state, y, x))

    def measured(self, state: State, y: Any, x: Tensor | None) -> Tensor | None:
        """What the device gives for y, or for y - x; None where there is nothing to measure it against."""
        meter = self.meter
        assert meter is not None
        if not meter.needs_history:
            return meter.measure(state, y, x)
        if not self.ready(state):
            return None
        self.upload_prior(state)
        return meter.measure(state, y, x)

    def decide_with(self, measured: Tensor | None) -> None:
        """Decide the running step with what was measured; the one device read of a step."""
        self.decide_by(self._read(self.control.state, measured))

    def decide_by(self, signal: float | None) -> None:
        """Decide the running step by a number; None where there is none."""
        control = self.control
        state, step = control.state, control.step
        decision = self.decide(state, step, signal)
        control.decisions[self.index] = decision
        control.actions[self.index] = decision.action
        if decision.action == REUSE and self.weighted:
            weights = self.weigh(state.timelines[self.index].steps, step.index)
            control.weights[self.index] = weights
            if self.guide is not None:
                self.guide.stage(state, self.index, weights)

    def _read(self, state: State, measured: Tensor | None) -> float | None:
        """What was measured as a number; ranks that share a sample agree on it."""
        meter, group = self.meter, self.group
        assert meter is not None
        if group is not None and (measured is None or not self.ready(state)):
            # the other ranks wait for a number: join them with none, so that all compute
            nothing = torch.full(meter.shape(state), math.nan, device=state.device)
            sync.agreed(nothing, group, veto=True)
            return None
        return None if measured is None else meter.read(measured, group)

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
        steps = state.timelines[self.index].steps
        self.guide.stage(state, self.index, self.weigh(steps, state.armed_step))

    def prepare_head(self, state: State) -> bool:
        """Get ready for a step in two parts; False where there is nothing yet to decide it by."""
        meter = self.meter
        assert meter is not None
        if not meter.needs_history:
            return meter.prepare_head(state)
        if not self.ready(state):
            return False
        self.upload_prior(state)
        return meter.prepare_head(state)

    def left_by_head(self, state: State) -> Tensor:
        """What the first part of a step has measured."""
        assert self.meter is not None
        return self.meter.left(state)

    def compute_instead(self, reason: str) -> None:
        """Turn the decision of the running step into computing."""
        control, index = self.control, self.index
        if control.decisions[index].action == PENDING:
            self.decide_with(None)
        elif control.decisions[index].action == REUSE:
            self.when.computed(control.state.runs[index], control.step)
        control.actions[index] = COMPUTE
        control.decisions[index] = control.decisions[index]._replace(action=COMPUTE, reason=reason)
