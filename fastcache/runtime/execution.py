# SPDX-License-Identifier: Apache-2.0
"""Running the model's forward as decided, or without a cache where there is no room for one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..ops import dispatch
from ..policies import COMPUTE, REUSE
from ..storage.allocate import NoRoom, Unfit
from ..storage.pool import Slots
from ..storage.state import SPENT, State
from ..targets.bind import BoundModel
from .compiling import NOTHING, eagerly
from .gradients import ASKED_FOR, asked_for, has_gradient, refuse_training, refusing
from .notices import LOG
from .settings import Settings

NO_ROOM = "no room for a cache"


class Executor:
    """Runs the forward of one denoiser."""

    def __init__(
        self,
        settings: Settings,
        model: nn.Module,
        original: Callable,
        bound: BoundModel,
        pool: Slots,
    ) -> None:
        self.model, self.original, self.pool = model, original, pool
        self.control, self.targets = bound.control, bound.targets
        # what stands around the forward, the innermost first
        self.wrappers: list[Any] = [target for target in reversed(bound.targets) if target.wraps]
        deciders = [target.decider for target in bound.targets]
        self.wrappers += [d for d in deciders if d.meter is not None and d.meter.at_output]
        # what has to be seen to predict in a reused step, if anything has
        self.counted = next((target for target in bound.targets if target.counted), None)
        self.budget, self.group = settings.budget, settings.process_group
        self.notices, self.kernels = settings.notices, settings.backend
        self.lock, self.stats = settings.lock, settings.stats
        # nothing stands around the forward of a step whose storage exists
        self.plain = not self.wrappers and self.kernels == dispatch.AUTO
        self.differentiable = False  # by its parameters, as the last computed step in grad mode was
        self.cuts: tuple = ()  # how stacks were cut by the last recording call

    def execute(self, state: State, args: tuple, kwargs: dict, run: Callable | None) -> Any:
        """The model's output for the step that `control` holds. run: stands in for the forward, once storage exists."""
        control, graded = self.control, torch.is_grad_enabled()
        control.inside = True
        try:
            if graded:
                refuse_training(self.model)
                if asked_for(args, kwargs):
                    return self._differentiated(state, args, kwargs)
            if control.step.again and control.computes:
                state.uncached_step = True  # what the step stores, its first evaluation has stored
                return self.original(*args, **kwargs)
            if self.budget is not None and not state.without:
                state.uncached_step = self.budget.refuses(
                    self.pool, state, self.group, state.device
                )
            if not (state.uncached_step or state.without):
                try:
                    try:
                        recorded = control.begin_step(self.targets)
                        if not recorded:
                            output = self.record(args, kwargs)
                        elif self.plain:
                            output = (run or self.original)(*args, **kwargs)
                        else:
                            with self.backend():
                                output = self.around(run or self.original, args, kwargs)
                        counted = self.counted
                        if (
                            counted is None
                            or control.predicted == counted.segments
                            or not counted.unanswered()
                        ):
                            return self._graded(output) if graded else output
                    except Unfit as error:
                        LOG.debug("what is held does not fit: %s", error)
                    return self._anew(state, args, kwargs)
                except NoRoom as error:
                    self.give_up(state, error)
            return self._without(state, args, kwargs, state.without or NO_ROOM)
        finally:
            control.inside = control.active = False

    def _anew(self, state: State, args: tuple, kwargs: dict) -> Any:
        """What was to be reused does not fit this call, which has shown it half way: compute it, and learn anew."""
        for timeline, target in zip(state.timelines, self.targets, strict=True):
            timeline.clear()
            if self.control.actions[target.rule] != COMPUTE:
                target.decider.compute_instead("what is held does not fit this call")
        self.pool.drop(state)
        self.control.batch = "full"
        self.control.begin_step(self.targets)
        return self.record(args, kwargs)

    def record(self, args: tuple, kwargs: dict) -> Any:
        """A call that allocates storage, and that shows how the model drives what is hooked."""
        LOG.debug("recording: storage is allocated for %s", self.control.state.key)
        with self.backend(), eagerly(True):
            output = self.around(self.original, args, kwargs)
            for target in self.targets:
                target.finish()  # which may store what it has seen
        for target in self.targets:
            output = target.unalias_outputs(output)
        self.cuts = tuple(target.layout_key for target in self.targets)
        return output

    def around(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """The model's output, by the forward with what stands around it."""
        for target in self.wrappers:
            forward = partial(target.around, forward)
        return forward(*args, **kwargs)

    def backend(self) -> contextlib.AbstractContextManager:
        """The kernels that the cache was enabled with, in force."""
        return NOTHING if self.kernels == dispatch.AUTO else dispatch.backend(self.kernels)

    def fell_back(self, op: str, why: str) -> None:
        """Count that the reference ran in place of a kernel on a large tensor, if in a call of this model."""
        if not self.lock.acquire(blocking=False):
            return  # another thread is in a call, so the op is not this model's
        try:
            if self.control.inside:
                self.stats.fallbacks[op] += 1
                self.notices.later(
                    f"fallback {op}",
                    f"fastcache: {op} runs on the reference, in several passes over memory: {why}",
                )
        finally:
            self.lock.release()

    def give_up(self, state: State, error: NoRoom) -> None:
        """Out of memory for storage: the rest of the run goes without; the step is computed anew."""
        if self.group is not None:  # the other ranks would go on reusing
            raise error
        self.pool.drop(state)
        state.without = NO_ROOM
        self.control.end_step()
        self.notices.once(
            "fastcache: out of memory for a cache; runs that find none are computed without"
        )

    def _differentiated(self, state: State, args: tuple, kwargs: dict) -> Any:
        """A step whose gradient is asked for: the model's own forward, since a reused value has none."""
        self.notices.later(
            ASKED_FOR,
            f"fastcache: {ASKED_FOR}, so its steps are computed; call the model under torch.no_grad() where no "
            "gradient is needed",
        )
        return self._without(state, args, kwargs, ASKED_FOR)

    def _graded(self, output: Any) -> Any:
        """The output of a step in grad mode: that of a reused one says so where its gradient is asked for."""
        if REUSE not in self.control.actions:
            self.differentiable = has_gradient(output)
            return output
        return refusing(output) if self.differentiable or has_gradient(output) else output

    def _without(self, state: State, args: tuple, kwargs: dict, why: str) -> Any:
        """A step that uses no storage: all that was to be reused is computed."""
        state.uncached_step = True
        for timeline, target in zip(state.timelines, self.targets, strict=True):
            timeline.clear()
            if (
                why != SPENT or self.control.actions[target.rule] != COMPUTE
            ):  # which says why itself
                target.decider.compute_instead(why)
        with eagerly(True):
            return self.original(*args, **kwargs)
