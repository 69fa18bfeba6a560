# SPDX-License-Identifier: Apache-2.0
"""Steps that are decided before their call, which may run inside a graph of torch.compile(model)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..models.registry import keeps
from ..policies import REUSE, Run, Step
from ..recipe import Recipe
from ..storage.allocate import NoRoom
from ..storage.state import State
from ..targets.control import StepControl
from .commit import Committer
from .context import Context
from .decision import Decider
from .execution import Executor
from .frames import Frame, Owner, innermost, method_of
from .gradients import asked_for
from .runs import UNASKED, Runs, abandon
from .settings import Settings
from .signature import call_signature
from .steps import NEXT, Moment


class Prepared(NamedTuple):
    """A step decided before its call, which may run inside a graph."""

    state: State
    step: Step
    runs: list[Run]  # what the policies remembered before
    frame: Context


class Ahead:
    """What one denoiser does before calls that may run inside a graph, and inside them."""

    def __init__(
        self,
        owner: Owner,
        settings: Settings,
        name: str,
        recipe: Recipe,
        original: Callable,
        control: StepControl,
        rooms: tuple[Runs, Decider, Executor, Committer],
    ) -> None:
        self.owner, self.settings, self.name = owner, settings, name
        self.original, self.control = original, control
        self.runs, self.decider, self.executor, self.committer = rooms
        self.pool, self.targets = self.runs.pool, self.executor.targets
        self.looks = recipe.needs_signal  # in every context: a decision needs the call itself
        self.looks_where = (
            "FirstBlockCache decides inside the forward"
            if recipe.decides_inside
            else f"{recipe.name} decides by what the model is called with"
        )
        self.calibrates = any(
            rule.when.calibrates for rule in recipe.rules
        )  # which is done eagerly
        self.owns_graphs = False  # fastcache.compile drives this model
        self.untraceable = False  # torch.compile(model) has given up on the forward
        self.prepared: Prepared | None = None

    # --- inside a graph -----------------------------------------------------------------------------------

    def traced(self, args: tuple, kwargs: dict) -> Any:
        """The model's forward inside a graph: a context outside it has prepared everything."""
        control = self.control
        if self.looks:
            raise RuntimeError(
                f"fastcache: {self.looks_where}, which torch.compile(model) cannot "
                "trace; use fastcache.compile(model)"
            )
        if not control.active:
            raise RuntimeError(
                "fastcache: a compiled model was called without a context of its own, so no step was decided; "
                "open `with cache.context(name):` around each call, one at a time in a thread, or use "
                "fastcache.compile(model)"
            )
        control.seen = self.runs.steps.argument(args, kwargs)
        graded = torch.is_grad_enabled()
        if (
            keeps(kwargs)
            or call_signature(args, kwargs) != control.state.signature
            or (graded and asked_for(args, kwargs))
        ):
            control.end_step()  # this call runs uncached
            output = self.original(*args, **kwargs)
            control.signature_missed = True
            return output
        if graded and REUSE in control.actions:
            with torch.no_grad():  # it has no gradient, and inside a graph nothing can say so later
                output = self.executor.around(self.original, args, kwargs)
        else:
            output = self.executor.around(self.original, args, kwargs)
        control.end_step()
        return output

    def note_untraced(self) -> None:
        """torch.compile(model) could not trace the forward: all of it runs uncompiled."""
        self.untraceable = self.looks  # further contexts do not try again
        self.settings.notices.once(
            f"fastcache: {self.name} runs uncompiled inside torch.compile(model), because "
            + (self.looks_where if self.untraceable else "no context is open around the call")
            + "; use fastcache.compile(model)"
        )

    # --- before it ----------------------------------------------------------------------------------------

    def expect_graphs(self) -> None:
        """Some of the model may be compiled from now on: storage that exists is marked as staying in place."""
        if not self.control.may_be_compiled:
            self.control.may_be_compiled = self.pool.fixed = True
            for state in (*self.pool.states.values(), *self.pool.spares):
                state.make_static()

    def prepare(self, frame: Context) -> bool:
        """Get ready for a call that may run inside a graph; False where it must run eagerly.

        Where nothing was ever traced there is nothing to do: `graph_begins` says when that changes.
        """
        if self.owns_graphs or self.looks:
            return self.owns_graphs or not self.untraceable
        compiled = self.control.may_be_compiled
        if compiled:
            frame.lock()
        state = self.pool.states.get((frame.request, frame.name))
        if state is None or state.uncached_step or state.away:
            self.withdraw()
            return False
        if state.index and not compiled and not self.calibrates:
            return True  # the last step has left storage; this is asked again where something is traced
        if not self._recorded(state):
            self.withdraw()
            return False
        if compiled:  # the step is decided here, before the call
            self._decide(frame, state)
        return True

    def _recorded(self, state: State) -> bool:
        """Whether all storage exists, so that a call may run inside a graph."""
        for target in self.targets:
            if not target.recorded(state):
                return False
        return True

    def graph_begins(self) -> None:
        """Called when torch.compile is about to trace something, perhaps this model."""
        if self.control.inside:
            if not self.control.may_be_compiled:
                self.expect_graphs()
                self.upload(self.control.state)
                for target in self.targets:
                    target.graph_begins()
        elif self.prepared is None and not self.control.may_be_compiled:
            frame = innermost(self.owner)
            if frame is None or not frame.one_call or method_of(frame) is not None:
                return  # runs with a recipe of their own prepare nothing
            if self.settings.own and frame.lock(
                0
            ):  # no waiting: torch holds a lock of its own here
                self.expect_graphs()
                self.prepare(frame)

    def upload(self, state: State) -> None:
        """Give compiled code what it has to know of the running step."""
        try:
            self.decider.upload(state)
        except NoRoom as error:
            self.executor.give_up(state, error)

    def _decide(self, frame: Context, state: State) -> None:
        """Decide the step before its call. Two open contexts of one thread, none inside the other, could
        each be meant by a compiled call: then neither is armed, and the call says so."""
        crossed = self.prepared is not None and not frame.within(self.prepared.frame)
        self.withdraw()
        if crossed:
            return
        self.owner.hook()
        steps, generation = self.runs.steps, frame.generation
        moment = steps.moment(steps.told(frame, self.runs.callback), generation, None)
        step = self.runs.step(state, frame, generation, moment, compute=frame.compute)
        before = [run.copy() for run in state.runs]  # none where a run begins
        self.decider.decide(state, step)
        self.upload(state)
        if state.without:
            return
        self.control.begin_step(self.targets)
        self.control.signature_missed, self.control.seen = False, None
        self.prepared = Prepared(state, step, before, frame)

    # --- after it, or instead -----------------------------------------------------------------------------

    def take(self, call: Frame | None, args: tuple, kwargs: dict) -> tuple[State | None, Any]:
        """The state and the step that a context has prepared, for a call that runs eagerly after all.

        Where it would be decided otherwise now, the prepared step is taken back; what is returned then is None
        and the timestep, where that was asked for already.
        """
        assert self.prepared is not None
        state, step, _, frame = self.prepared
        told = UNASKED
        if call is frame and not frame.calls:
            if self.runs.one_batch:
                self.runs.refuse(frame)
            told = step.timestep
            fits = state.signature == call_signature(args, kwargs)
            always = self.runs.always
            if fits and not (always is not None and always.asked(args, kwargs)):
                steps, generation = self.runs.steps, frame.generation
                known = told is not None or frame.step_index is not None
                timed = self.runs.timed
                needed = told is None and (timed or not known)
                now = steps.moment(
                    told, generation, steps.argument(args, kwargs) if needed else None
                )
                # where nobody has told the time, the model's own argument may
                same = now.time == step.timestep or not timed
                if same and (known or self._goes_on(state, frame, now)):
                    self.runs.note(state, now)
                    state.step_timestep = now.time
                    frame.calls += 1
                    self.prepared = None
                    self.control.step = step._replace(timestep=now.time)
                    return state, self.control.step
        self.withdraw()
        return None, told

    def _goes_on(self, state: State, frame: Context, now: Moment) -> bool:
        """Whether a call is the next step of its run, by what it is given."""
        if state.trip.left_out(state, now):
            return False
        return self.runs.steps.index(state, frame, frame.generation, now)[1] == NEXT

    def withdraw(self) -> None:
        """Take back decisions that were prepared for a graph and not used."""
        prepared, self.prepared = self.prepared, None
        if prepared is not None:
            self.control.end_step()
            prepared.state.runs = prepared.runs

    def commit_prepared(self, frame: Context, failed: bool) -> None:
        """Account for what happened inside a context, if a call was prepared for it."""
        if self.prepared is None or self.prepared.frame is not frame:
            return
        if failed or self.control.active:  # or it held no call
            self.withdraw()
            return
        (state, step, _, _), self.prepared = self.prepared, None
        if self.control.signature_missed:  # another shape: the next call allocates
            self.pool.forget(state.key)
        else:
            frame.calls += 1
            self.committer.commit(state, step)
            if frame.step_index is None and frame.generation is None and step.timestep is None:
                self._notice_new_run(state, step)

    def _notice_new_run(self, state: State, step: Step) -> None:
        """Notice a new run that began inside a graph, where no timestep could be looked at beforehand."""
        steps = self.runs.steps
        now = steps.moment(None, None, self.control.seen).clock
        before, state.timestep = state.timestep, now if now is not None else state.timestep
        if now is None or before is None or not step.index or not steps.backwards(before, now):
            return
        reused = any(d.action == REUSE for d in self.control.decisions)
        abandon([self.pool], state.key[0])
        if reused:
            raise RuntimeError(
                f"fastcache: a new run began in context {state.key[1]!r} inside a compiled model, unseen from "
                "outside, and its first step has reused the old one's; call cache.reset() between runs, "
                "or give cache.context(step_index=...) or num_inference_steps"
            )
