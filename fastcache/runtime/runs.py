# SPDX-License-Identifier: Apache-2.0
"""Where a call belongs: which request, which branch of guidance, which run, and which of its steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..models.adapter import BlockAdapter
from ..ops.alike import never
from ..policies import Step
from ..recipe import Recipe
from ..storage.pool import Slots, follow
from ..storage.state import State
from ..targets.base import BoundTarget
from .always import AlwaysComputes
from .context import Context
from .experts import Experts
from .notices import LOG
from .settings import Settings
from .signature import call_signature, known_by
from .steps import (
    BEGINS,
    DOUBTFUL,
    EVALUATION,
    NEVER,
    NEXT,
    TURNING,
    UNCLEAR,
    How,
    Moment,
    StepTracker,
)
from .trips import ALL, Trips

UNASKED: Any = object()  # nobody has asked yet what time it is


class Runs:
    """The runs of one denoiser.

    settings: what it shares with the others. name: of the model in its pipeline.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        model: nn.Module,
        recipe: Recipe,
        adapter: BlockAdapter,
        pool: Slots,
        targets: Iterable[BoundTarget],
    ) -> None:
        self.name, self.pool = name, pool
        self.one_batch = [target for target in targets if target.one_batch]
        self.callback, self.notices = settings.timestep_callback, settings.notices
        self.experts = Experts(name, pool, settings.pools)
        self.steps = StepTracker(model)
        asking = adapter.always_compute
        self.always = AlwaysComputes(asking, self.steps.names) if asking else None
        self.trips = Trips(self.steps, self.one_batch)
        self.timed = any(rule.when.needs_timestep for rule in recipe.rules)
        totals = (rule.when.num_inference_steps for rule in recipe.rules)
        self.planned = next((n for n in totals if n), None)  # steps, as the recipe has it
        # whether the number of a step is all that has to be known of it
        looks = self.timed or asking or self.one_batch or self.callback is not None or pool.streams
        self.by_number = not looks

    def locate(
        self, frame: Any, args: tuple, kwargs: dict, told: Any = UNASKED
    ) -> tuple[State, Step]:
        """The state that a call uses, and its step; a run begins where one has to.

        frame: what is open around it, a Frame or None. told: the timestep, where it was asked for before.
        """
        numbered = frame is not None and frame.one_call and frame.step_index is not None
        if numbered and self.by_number and told is UNASKED:
            found = self.following(frame, args, kwargs)
            if found is not None:
                return found
        context: Context | None = frame if frame is not None and frame.one_call else None
        generation = None if frame is None else frame.generation
        steps, moment, unclear, first = self.steps, NEVER, False, True
        if told is UNASKED:
            if self.callback is None:
                told = None if context is None else context.timestep
            else:
                told = steps.told(context, self.callback)
        if context is None or context.step_index is None:
            value, several = steps.argument(args, kwargs), self.trips.several
            if value is not None or told is not None or generation is not None:
                moment = steps.moment(told, generation, value)
            if context is None or context.calls:
                call, unclear, first = self.trips.unnamed(frame, moment, args, kwargs)
            elif several and (context.request, context.name) in several:
                call, unclear, first = self.trips.unnamed(frame, moment, args, kwargs)
            else:
                call = context
                call.first = moment, args, kwargs
        else:
            call = context
            if self.timed or generation is not None or told is not None:
                needed = self.timed and told is None
                value = steps.argument(args, kwargs) if needed else None
                moment = steps.moment(told, generation, value)
        if self.one_batch:
            self.refuse(call)
        key = (call.request, call.name)
        state = self.pool.states.get(key) or self.add(key)
        compute = call.compute
        if self.always is None or not self.always.asked(args, kwargs):
            signature = call_signature(args, kwargs)
        else:
            compute = True
            signature = call_signature(*self.always.without(args, kwargs))
        if state.signature != signature:
            if state.index and not self.steps.turned(state, call, moment):
                state.trip.members.discard(state.key)  # whatever the other branches do
            self.pool.adopt(state, signature)
        step = self.step(state, call, generation, moment, unclear, compute, first)
        if context is not None:
            context.calls += 1
        return state, step

    def following(self, call: Context, args: tuple, kwargs: dict) -> tuple[State, Step] | None:
        """The same for a call that says by its number that it is the very next step of its run, as most of such calls
        are; None for all others. Where `by_number`."""
        index, total = call.step_index, call.num_inference_steps
        state = self.pool.states.get((call.request, call.name))
        if (
            state is None
            or index != state.index
            or not index
            or call.timestep is not None
            or call.generation is not None
            or state.start
            or state.unclear
            or state.leapt
            or (total is not None and total != state.total)
            or state.key not in state.trip.members
            or not (state.known(args, kwargs) or self._fits(state, args, kwargs))
        ):
            return None
        call.calls += 1
        state.indexed, state.uncached_step = True, False
        state.armed_step, state.step_timestep = index, None
        step = tuple.__new__(
            Step, (index, state.total, None, call.sigma, False, call.compute, False)
        )
        return state, step

    @staticmethod
    def _fits(state: State, args: tuple, kwargs: dict) -> bool:
        """Whether the storage of a state is for such a call; if so, the next ones may be known by this one."""
        same = state.signature == call_signature(args, kwargs)
        if same and state.known is never:
            state.known = known_by(args, kwargs)
        return same

    def add(self, key: tuple[Any, str]) -> State:
        """A state for a context of a request, which has none."""
        for request in self.trips.gone():
            self.reset(request)
        state = self.pool.add(key)
        state.trip = self.trips.of(key[0])
        return state

    def step(
        self,
        state: State,
        call: Context,
        generation: Any,
        moment: Moment,
        unclear: bool = False,
        compute: bool = False,
        first: bool = True,
    ) -> Step:
        """The step that comes now in a state; another run begins there where this is its first.

        unclear: nothing tells which branch this is. first: it is the first branch that its step calls.
        """
        if self.pool.streams:
            follow(state)
        trip, known = state.trip, call.step_index
        if generation is not None:
            trip.enter(generation.serial)
        if not state.index or state.key in trip.members:
            index, how = self.steps.index(state, call, generation, moment)
        else:
            index, how = self.rejoins(state, call, generation, moment)
        if how != NEXT or not state.index or unclear or state.unclear or state.leapt:
            how = self._otherwise(state, call, generation, moment, how, unclear, first)
        state.indexed = known is not None
        index -= state.start
        time = None
        if moment is not NEVER:
            time = moment.time
            if known is None:
                index += trip.left_out(state, moment)
            self.note(state, moment)
        if call.num_inference_steps is not None:
            total = call.num_inference_steps - state.start
            if total != state.total:
                state.total = state.ends = total
        state.armed_step, state.step_timestep, state.uncached_step = index, time, False
        again = False
        if how != NEXT:
            compute, again = compute or how == TURNING, how == EVALUATION
        # as Step(...) does it, without a call into Python
        return tuple.__new__(Step, (index, state.total, time, call.sigma, False, compute, again))

    def _otherwise(
        self,
        state: State,
        call: Context,
        generation: Any,
        moment: Moment,
        how: How,
        unclear: bool,
        first: bool,
    ) -> How:
        """A call that is not simply the next one of its run: make its state ready, and say how it follows."""
        if how == TURNING:
            assert moment.clock is not None
            how = self.steps.learn(state, moment.clock)
        if how == BEGINS:
            if generation is None or state.serial == generation.serial:
                self.experts.end_the_other(call.request)
            self.pool.begin_anew(state)
            if first:  # whichever branch it is, the others begin after it
                unclear = False
        elif how in (DOUBTFUL, UNCLEAR) or unclear or state.unclear:
            state.doubt()
            if how == UNCLEAR and state.index == 1:
                self.doubt_first_steps(call.request)
        if how == UNCLEAR or unclear:
            self.notices.later("unclear", UNTOLD.format(model=self.name, name=call.name))
            state.unclear = True
        state.leapt = state.leapt and how in (BEGINS, TURNING)
        if not state.index:
            trip = state.trip
            if state.key in trip.members:
                trip.began(call if first else None)
            trip.members.add(state.key)
            self._begins(state, call, generation)
        return how

    def rejoins(
        self, state: State, call: Context, generation: Any, moment: Moment
    ) -> tuple[int, How]:
        """The step of a branch, where another one of its request has begun a run since its last.

        It is of that run too, unless nobody has announced it and it is the very next step: then it goes at a
        pace of its own.
        """
        known = call.step_index
        if generation is None and (known is None or known == state.index):
            index, how = self.steps.index(state, call, generation, moment)
            if known is not None or how == BEGINS or not state.trip.skipped(state, moment):
                return index, how
            state.leapt = state.leapt or how == TURNING
        return known or 0, BEGINS

    def note(self, state: State, moment: Moment) -> None:
        """Keep when the call of a state is, for those that follow."""
        if moment.place is not None:
            state.place, state.passed = moment.place, state.trip.passed
        if moment.mark is not None:
            state.mark, state.evaluation = moment.mark, moment.evaluation
        if moment.clock is not None:
            state.timestep = moment.clock

    def _begins(self, state: State, call: Context, generation: Any) -> None:
        """A run begins: how long it is, and whether another expert has had the steps before."""
        state.serial = 0 if generation is None else generation.serial
        state.total = call.num_inference_steps or (generation and generation.total(self.name))
        state.total = state.ends = state.total or self.planned
        state.start = self.experts.start(state.key[0], call.step_index or 0)
        LOG.debug("run of request %r, context %r begins", *state.key)

    def doubt_first_steps(self, request: Any) -> None:
        """A first step has come twice: those of the other branches may be of a run of one step, which is over."""
        for state in self.pool.states.values():
            if state.key[0] == request and state.index == 1:
                state.doubt()

    def refuse(self, call: Context) -> None:
        """Raise where guidance comes apart that has to be one batch."""
        states = self.pool.states.values()
        began = {s.key[1] for s in states if s.index and s.key[0] == call.request}
        for target in self.one_batch:
            target.refuse({call.name, *began})

    def reset(self, request: Any = ALL) -> None:
        """Forget the runs of one request, or all; their storage serves the next ones."""
        for key in [k for k in self.pool.states if request is ALL or k[0] == request]:
            self.pool.forget(key)
        self.trips.forget(request)
        if request is ALL:
            self.steps.clear()


# What is said where nothing tells branches apart.
UNTOLD = (
    "fastcache: {model} was called more than once at one step in context {name!r}, and nothing tells whether it "
    "is the same branch; such calls compute and nothing of them is reused. Give each branch or window a name of "
    "its own:\n    with cache.context('cond'):  # and 'uncond', 'window 1', ...\n        model(...)"
)


def abandon(pools: Iterable[Slots], request: Any) -> None:
    """Forget all contexts of a request: an exception passed through one of its calls."""
    for pool in pools:
        for key, state in pool.states.items():
            if key[0] == request:
                state.restart()
                state.trip.clear()
