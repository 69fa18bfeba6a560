# SPDX-License-Identifier: Apache-2.0
"""The requests of one denoiser, and which branch of guidance a call is that nobody has named."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from ..targets.base import BoundTarget
from .context import Context
from .frames import thread_request, when_thread_ends
from .steps import Moment, StepTracker
from .trip import Trip

ALL: Any = object()  # every request


class Trips:
    """One trip per request, as long as a state of it lives.

    one_batch: targets that want all branches in one call. several: contexts that were around several calls.
    """

    def __init__(self, steps: StepTracker, one_batch: Sequence[BoundTarget]) -> None:
        self.steps, self.one_batch = steps, one_batch
        self.several: set[tuple[Any, str]] = set()
        self._trips: weakref.WeakValueDictionary[Any, Trip] = weakref.WeakValueDictionary()
        self._last: Trip | None = None  # of an unnamed call, kept until a state of its own does
        self._gone: deque[Any] = deque()  # requests of threads that are no more

    def gone(self) -> Iterator[Any]:
        """The requests of threads that have ended since this was asked."""
        while self._gone:
            yield self._gone.popleft()

    def forget(self, request: Any) -> None:
        """Forget what is known of the branches of a request, or of all."""
        self.several -= {k for k in self.several if request is ALL or k[0] == request}
        self._trips.pop(request, None)
        # that of another request is still needed: its state may not have been made yet
        if request is ALL or (self._last is not None and self._last.request == request):
            self._last = None
        if request is ALL:
            self._trips.clear()

    def of(self, request: Any) -> Trip:
        """The steps of a request."""
        found = self._trips.get(request)
        if found is None:
            found = self._trips[request] = Trip(request)
            if request == thread_request():
                when_thread_ends(self._gone.append)
        return found

    def unnamed(
        self, frame: Any, moment: Moment, args: tuple, kwargs: dict
    ) -> tuple[Context, bool, bool]:
        """What stands for the context of a call without one of its own: the first branch of guidance, or another.

        Returns it, whether nothing tells which branch it is, and whether it is the first of its step.
        """
        request, name = thread_request() if frame is None else frame.request, "default"
        around = frame if frame is not None and frame.one_call else None
        trip = self._last
        if trip is None or trip.request != request:
            trip = self._last = self.of(request)
        if frame is not None and frame.generation is not None:
            trip.enter(frame.generation.serial)
        if around is not None:  # and around more than one call
            name = around.name
            if around.first is not None:  # nobody knew then that others would come
                self.several.add((request, name))
                trip.forget_branches()
                before, *given = around.first
                self.branch(trip, trip.again(before), *given)
                around.first = None
        again = trip.again(moment)
        number = self.branch(trip, again, args, kwargs)
        for target in self.one_batch if number else ():
            target.refuse_branch()
        call = trip.context(name, number)
        call.compute = around is not None and around.compute
        call.num_inference_steps = None if around is None else around.num_inference_steps
        call.sigma = None if around is None else around.sigma
        return call, trip.branches.unclear, not again

    def branch(self, trip: Trip, again: bool | None, args: tuple, kwargs: dict) -> int:
        """The branch of a call by what it is given."""
        steps = self.steps
        timestep = steps.argument(args, kwargs)
        given = dict(kwargs)
        latents = given.pop(steps.first, args[0] if args else None)
        rest = [v for v in (*args, *given.values()) if v is not latents and v is not timestep]
        return trip.branches.of(latents, timestep, rest, again)
