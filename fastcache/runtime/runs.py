"""Where a call belongs: which request, which branch of guidance, which run, and which of its steps."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..models.adapter import BlockAdapter
from ..models.pipeline import EXPERTS
from ..policies import Step
from ..recipe import Recipe
from ..storage.pool import Slots, follow
from ..storage.state import State
from ..targets.base import BoundTarget
from .context import Context
from .frames import thread_request, when_thread_ends
from .notices import LOG
from .settings import Settings
from .signature import call_signature
from .steps import BEGINS, EVALUATION, NEVER, TURNING, UNCLEAR, Moment, StepTracker
from .trip import Trip

ALL: Any = object()  # every request


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
        self.model, self.name, self.pool = model, name, pool
        self.one_batch = [target for target in targets if target.one_batch]
        self.callback, self.pools, self.notices = (
            settings.timestep_callback,
            settings.pools,
            settings.notices,
        )
        self.steps = StepTracker(model)
        at = self.steps.names.index
        names = adapter.always_compute
        # arguments that make a call compute where they are given, and their places
        self.always = [(n, at(n) if n in self.steps.names else -1) for n in names]
        self.trips: weakref.WeakValueDictionary[Any, Trip] = weakref.WeakValueDictionary()
        self.unnamed_trip: Trip | None = None  # the last one, kept until a state of its own does
        self.gone: deque[Any] = deque()  # requests of threads that are no more
        totals = (rule.when.num_inference_steps for rule in recipe.rules)
        self.planned = next((n for n in totals if n), None)  # steps, as the recipe has it

    def locate(
        self, frame: Any, args: tuple, kwargs: dict, told: Any = UNASKED
    ) -> tuple[State, Step]:
        """The state that a call uses, and its step; a run begins where one has to.

        frame: what is open around it, a Frame or None. told: the timestep, where it was asked for before.
        """
        generation = None if frame is None else frame.generation
        context: Context | None = frame if frame is not None and frame.one_call else None
        steps, unclear, first = self.steps, False, True
        if told is UNASKED:
            if self.callback is not None:
                told = steps.told(context, self.callback)
            else:
                told = None if context is None else context.timestep
        if context is None or context.step_index is None:
            moment = steps.moment(told, generation, steps.argument(args, kwargs))
            if context is None or context.calls:
                call, unclear, first = self.unnamed(frame, moment, args, kwargs)
            else:
                call = context
                call.first = moment, args, kwargs
        else:
            call = context
            moment = steps.moment(told, generation, None) if told or generation else NEVER
        if self.one_batch or torch.is_grad_enabled():
            self.refuse(call)
        key = (call.request, call.name)
        state = self.pool.states.get(key) or self.add(key)
        compute = call.compute
        if self.always and self.asked(args, kwargs):
            compute = True
            signature = call_signature(*self.without(args, kwargs))
        else:
            signature = call_signature(args, kwargs)
        if state.signature != signature:
            self.pool.adopt(state, signature)
        step = self.step(state, call, generation, moment, unclear, compute, first)
        if context is not None:
            context.calls += 1
        return state, step

    def add(self, key: tuple[Any, str]) -> State:
        """A state for a context of a request, which has none."""
        while self.gone:
            self.reset(self.gone.popleft())
        request = key[0]
        state = self.pool.add(key)
        state.trip = self.trip(request)
        return state

    def trip(self, request: Any) -> Trip:
        found = self.trips.get(request)
        if found is None:
            found = self.trips[request] = Trip(request)
            if request == thread_request():
                when_thread_ends(self.gone.append)
        return found

    def unnamed(
        self, frame: Any, moment: Moment, args: tuple, kwargs: dict
    ) -> tuple[Context, bool, bool]:
        """What stands for the context of a call without one of its own: the first branch of guidance, or another.

        Returns it, whether nothing tells which branch it is, and whether it is the first of its step.
        """
        request, name = thread_request() if frame is None else frame.request, "default"
        trip = self.unnamed_trip = self.trip(request)
        if frame is not None and frame.generation is not None:
            trip.enter(frame.generation.serial)
        if frame is not None and frame.one_call:  # and around more than one call
            name = frame.name
            if frame.first is not None:  # nobody knew then that others would come
                trip.clear()
                before, *given = frame.first
                self.branch(trip, trip.again(before), *given)
                frame.first = None
        again = trip.again(moment)
        number = self.branch(trip, again, args, kwargs)
        for target in self.one_batch if number else ():
            target.refuse_branch()
        return trip.context(name, number), trip.branches.unclear, not again

    def branch(self, trip: Trip, again: bool | None, args: tuple, kwargs: dict) -> int:
        """The branch of a call by what it is given."""
        steps = self.steps
        timestep = steps.argument(args, kwargs)
        given = dict(kwargs)
        latents = given.pop(steps.first, args[0] if args else None)
        values = [(k, v) for k, v in given.items() if v is not timestep and v is not latents]
        rest = [v for v in args if v is not latents and v is not timestep]
        return trip.branches.of(latents, timestep, [*rest, *(v for _, v in values)], again)

    def asked(self, args: tuple, kwargs: dict) -> bool:
        """Whether an argument is given that makes a call compute."""
        for name, place in self.always:
            given = kwargs.get(name)
            if given is None and len(args) > place >= 0:
                given = args[place]
            if given is not None:
                return True
        return False

    def without(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A call with None in place of those arguments."""
        names = {name for name, _ in self.always}
        places = {place for _, place in self.always}
        return (
            tuple(None if i in places else v for i, v in enumerate(args)),
            {k: None if k in names else v for k, v in kwargs.items()},
        )

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
        index, how = self.steps.index(state, call, generation, moment)
        trip = state.trip
        if how == TURNING:
            assert moment.clock is not None
            how = self.steps.learn(state, moment.clock)
        if how == BEGINS:
            self.pool.begin_anew(state)
            if first:  # whichever branch it is, the others begin after it
                trip.began(call)
                unclear = False
        elif how == UNCLEAR or unclear or state.unclear:
            state.doubt()
        if how == UNCLEAR or unclear:
            self.notices.later("unclear", UNTOLD.format(model=self.name, name=call.name))
        state.unclear = how == UNCLEAR or unclear
        if call.step_index is None and moment is not NEVER:
            index += trip.left_out(state, moment)
        if not state.index:
            self._begins(state, call, generation)
        index -= state.start
        if call.num_inference_steps is not None:
            state.total = call.num_inference_steps - state.start
        state.armed_step, state.step_timestep, state.uncached_step = index, moment.time, False
        if moment is not NEVER:
            self.note(state, moment)
        compute = compute or how == TURNING
        return Step(index, state.total, moment.time, call.sigma, False, compute, how == EVALUATION)

    def note(self, state: State, moment: Moment) -> None:
        """Keep when the call of a state is, for those that follow."""
        state.trip.called(state, moment)
        if moment.mark is not None:
            state.mark, state.evaluation = moment.mark, moment.evaluation
        if moment.clock is not None:
            state.timestep = moment.clock

    def _begins(self, state: State, call: Context, generation: Any) -> None:
        """A run begins: how long it is, and whether another expert has had the steps before."""
        state.serial = 0 if generation is None else generation.serial
        state.total = call.num_inference_steps or (generation and generation.total(self.name))
        state.total = state.total or self.planned
        if self.name in EXPERTS and len(self.pools) > 1:
            step, request = call.step_index or 0, state.key[0]
            state.start = step if self._take_over(request) else self._joined(request, step)
        LOG.debug("run of request %r, context %r begins", *state.key)

    def _joined(self, request: Any, step: int) -> int:
        """Where the stretch of steps began that another branch, which is at this step, is in."""
        states = self.pool.states.values()
        at = (s.start for s in states if s.key[0] == request and s.start + s.armed_step == step)
        return max(at, default=0)

    def _take_over(self, request: Any) -> bool:
        """Whether another expert has had the steps before; its storage is given back, since it had them."""
        found = False
        for pool in self.pools:
            for state in pool.states.values() if pool is not self.pool else ():
                if state.key[0] == request and state.index > 1:
                    found = True
                    pool.end_run(state)
                    if not pool.fixed:
                        pool.drop(state)
                        state.signature = None
                    state.begin_run()
            if found and pool is not self.pool and not pool.fixed:
                pool.spares.clear()
        return found

    def refuse(self, call: Context) -> None:
        """Raise where a call cannot be cached: one of guidance that comes apart, or one that is trained on."""
        if self.one_batch:
            states = self.pool.states.values()
            began = {s.key[1] for s in states if s.index and s.key[0] == call.request}
            for target in self.one_batch:
                target.refuse({call.name, *began})
        training = torch.is_grad_enabled() and self.model.training
        if training and any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "target: the model is in training mode with gradients on; a cached step has no gradient. "
                "Call model.eval(), run under torch.no_grad(), or cache.disable() first"
            )

    def reset(self, request: Any = ALL) -> None:
        """Forget the runs of one request, or all; their storage serves the next ones."""
        for key in [k for k in self.pool.states if request is ALL or k[0] == request]:
            self.pool.forget(key)
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
