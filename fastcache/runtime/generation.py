# SPDX-License-Identifier: Apache-2.0
"""One generation that somebody announces: `cache.run`, or a pipeline's own call."""

from __future__ import annotations

import itertools
from typing import Any

from ..models.pipeline import Schedule
from .frames import OWN, Frame, innermost, method_of

_serials, _names = itertools.count(1), itertools.count(1)


class Generation(Frame):
    """The calls of one generation, from its first step to its last. A context manager.

    Runs begin where it does, and where it says that another loop does, so no timestep has to tell.

    Args:
        cache: whose.
        request: whom it serves; OWN: that of what is open around it, one of its own where that is a
            generation too, else the thread's.
        num_inference_steps: steps of its loop, where they are known beforehand.
        schedule: what a pipeline's scheduler and its attributes say about the loop that runs.
        method: the recipe of its calls, bound to the models; None: the cache's own; OWN: that of the generation
            around.
    """

    __slots__ = (
        "__weakref__",
        "_inherits",
        "_now",
        "_ticks",
        "loops",
        "method",
        "num_inference_steps",
        "schedule",
        "serial",
    )

    def __init__(
        self,
        cache: Any,
        request: Any = OWN,
        num_inference_steps: int | None = None,
        schedule: Schedule | None = None,
        method: Any = OWN,
    ) -> None:
        super().__init__(cache, request)
        self._inherits = method is OWN
        self.method = None if self._inherits else method
        self.num_inference_steps, self.schedule = num_inference_steps, schedule
        self.loops = (
            False  # every loop is announced: time has nothing to say about where a run begins
        )
        self._begin()

    def _begin(self) -> None:
        self.serial = next(_serials)  # of the loop that runs
        self._ticks, self._now = -1, None
        if self.schedule is not None:
            self.schedule.forget()

    def __enter__(self) -> Generation:
        around = innermost(self.cache)
        if self.asked is OWN and around is not None:
            self.asked = around.request if around.generation is None else fresh()
            self.request = self.asked
        if self._inherits and around is not None:
            self.method = method_of(around)
        self.resume()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.pause()
        self.cache.ended(self, kind is not None)

    def resume(self) -> None:
        """The calls that follow are of this generation, which goes on where it was paused."""
        self.push()
        self.generation = self

    def pause(self) -> None:
        """The calls that follow are not; what it holds stays."""
        self.pop()

    def loop(self, steps: int | None) -> None:
        """Another loop over timesteps begins, of so many steps where that is known."""
        self.loops = True
        self._begin()
        if self.schedule is not None:
            self.schedule.steps = steps

    # --- what it knows of the loop that runs ----------------------------------------------------------------

    def total(self, name: str) -> int | None:
        """Steps that the denoiser of that name takes in this loop."""
        if self.num_inference_steps is not None or self.schedule is None:
            return self.num_inference_steps
        return self.schedule.total(name)

    @property
    def evaluations(self) -> int:
        """Calls per step and branch: 2 for solvers such as Heun's."""
        return 1 if self.schedule is None else self.schedule.evaluations

    def tick(self) -> int | None:
        """How many evaluations of the solver came before, without a look at tensors on a device; None where
        no pipeline tells."""
        if self.schedule is not None and self.schedule.anew():
            self._begin()
            self.schedule.anew()
        now = None if self.schedule is None else self.schedule.now()
        if now is None:
            return None
        if now is not self._now:
            self._ticks, self._now = self._ticks + 1, now
        return self._ticks

    def step_of(self, evaluation: int | None) -> int | None:
        """The step that an evaluation belongs to."""
        if evaluation is None or self.schedule is None or self.evaluations == 1:
            return evaluation
        return self.schedule.step_of(evaluation)


def fresh() -> Any:
    """A request that nobody else has."""
    return ("run", next(_names))
