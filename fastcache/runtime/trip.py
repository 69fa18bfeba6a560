# SPDX-License-Identifier: Apache-2.0
"""What the branches of one request have in common on one denoiser."""

from __future__ import annotations

from typing import Any

from ..storage.state import State
from .branches import BranchDetector
from .context import Context
from .steps import Moment

LONG = 1024  # steps that are remembered


class Trip:
    """The steps that a request takes, whichever branch is called, and the branches that nobody has named.

    Alive as long as one of its states is.
    """

    __slots__ = (
        "__weakref__",
        "branches",
        "contexts",
        "last",
        "members",
        "passed",
        "places",
        "request",
        "serial",
    )

    def __init__(self, request: Any) -> None:
        self.request = request
        self.branches = BranchDetector()
        self.contexts: dict[tuple[str, int], Context] = {}  # in place of those that nobody opens
        self.last: tuple[Any, Any] = (None, None)  # mark and evaluation of the last unnamed call
        self.serial = 0  # of the announced loop
        self.members: set[Any] = set()  # keys of the states that have a step in the run
        # where the steps lie, and the branch that was there; None for several
        self.places: dict[float, tuple | None] = {}
        self.passed = 0  # steps until now

    def enter(self, serial: int) -> None:
        """An announced loop runs: what was known of branches is of another one."""
        if self.serial != serial:
            self.serial = serial
            self.clear()

    def clear(self) -> None:
        self.forget_branches()
        self.places.clear()
        self.members.clear()

    def forget_branches(self) -> None:
        self.branches.clear()
        self.last = (None, None)

    def context(self, name: str, number: int) -> Context:
        """In place of a context that nobody has opened: for branch `number` of those under a name."""
        found = self.contexts.get((name, number))
        if found is None:
            label = name if not number else f"{name}#{number + 1}"
            found = self.contexts[name, number] = Context(None, label, self.request)
        return found

    def began(self, call: Context | None) -> None:
        """Another run began, with that call where it was the first of its step."""
        self.places.clear()
        self.members.clear()
        for (_, number), context in self.contexts.items():
            if context is call:
                self.branches.began(number)

    def skipped(self, state: State, moment: Moment) -> bool:
        """Whether the run that goes on has had steps between the last call of a state and this one, or began here."""
        place = moment.place
        return place == next(iter(self.places), None) or self._between(state.place, place) > 0

    def again(self, moment: Moment) -> bool | None:
        """Whether an unnamed call belongs to the step of the one before; None where nothing tells."""
        now, before = (moment.mark, moment.evaluation), self.last
        self.last = now
        return None if moment.mark is None else now == before

    def left_out(self, state: State, moment: Moment) -> int:
        """Steps of the request since the last call of a state, which was not called in them.

        Told by branches that were called at the same steps before; 0 where there is none.
        """
        place = moment.place
        if place is None:
            return 0
        before, places = state.place, self.places
        if place not in places:
            if len(places) == LONG:
                places.clear()
            places[place], self.passed = state.key, self.passed + 1
        elif places[place] != state.key:
            places[place] = None
        if (
            self.passed - state.passed < 2
            or not state.index
            or places.get(before, state.key) is not None
        ):
            return 0
        return self._between(before, place)

    def _between(self, before: float, place: float | None) -> int:
        """Steps of the request between two places."""
        if place is None:
            return 0
        low, high = min(before, place), max(before, place)
        return sum(low < other < high for other in self.places)
