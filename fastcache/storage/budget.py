# SPDX-License-Identifier: Apache-2.0
"""The bytes that all cached tensors of a cache may take."""

from __future__ import annotations

import weakref
from typing import Any

from .. import sync
from ..checks import flag, whole
from .allocate import NoRoom
from .pool import Slots
from .state import State


class Budget:
    """At most so many bytes of cached tensors after a call, over all denoisers of a cache.

    Beyond it spares are freed, then runs of which nothing is read any more, then the run used least recently, which
    goes on without a cache until there is room for it again. Never an error: what does not fit is computed.

    offload: instead, that run's storage goes to host memory (pinned, where there is CUDA) and comes back for its
    next call. Runs take turns, as a rule in the same order: so the one whose turn comes last goes first, and while a
    call runs the storage of the next one is fetched.
    """

    def __init__(self, limit: int, offload: bool, members: list[Slots]) -> None:
        self.limit, self.offload, self.members = limit, offload, members
        self.calls = 0
        self.last: Any = None  # weakly, the state of the last call

    def refuses(self, slots: Slots, state: State, group: Any, device: Any) -> bool:
        """Whether the next step of a state has to do without storage; ranks of `group` agree."""
        refused = self._refuses(slots, state, device)
        if group is not None:
            refused = sync.any_rank(refused, group, device)
        return refused

    def _refuses(self, slots: Slots, state: State, device: Any) -> bool:
        size = slots.sizes.get(state.signature, 0)
        if size > self.limit:
            return True
        if state.evicted:  # it comes back when others have finished
            running = sum(s.held for m in self.members for s in m.states.values() if not s.spent)
            if running - state.held + size > self.limit:
                return True
            state.evicted = False
        if not state.held:
            self._make_room(max(size, state.away), state)
        if state.away:
            try:
                slots.bring_back(state, device)
            except NoRoom:
                slots.let_go(state)
                return True
        if self.offload:
            self._fetch_ahead(state, max(size, state.held))
        return False

    def keep(self, slots: Slots, state: State) -> int:
        """After a call: note what the state holds, and free what is too much.

        Returns the bytes of the state where they alone are too many; it is left without, then. 0 otherwise.
        """
        self.calls += 1
        if self.offload:
            before = None if self.last is None else self.last()
            self.last = weakref.ref(state)
            if before is not None:
                before.next = self.last
        state.held, state.used = state.nbytes(), self.calls
        if state.held:
            slots.sizes[state.signature] = max(state.held, slots.sizes.get(state.signature, 0))
        if self._make_room(0, state) <= 0:
            return 0
        alone = state.held
        slots.drop(state)
        return alone

    def _fetch_ahead(self, state: State, size: int) -> None:
        """Fetch the storage of the run that was called after this one the last time, if it is away.

        size: bytes of the state whose call begins. What is fetched takes no room from the two of them, nor from runs
        that would have to do without a cache for it.
        """
        following = None if state.next is None else state.next()
        if following is None or not following.away or following.away + size > self.limit:
            return
        slots = next((m for m in self.members if m.states.get(following.key) is following), None)
        if slots is None or self._make_room(following.away, state, following) > 0:
            return
        try:
            slots.fetch(following, following.device)
        except NoRoom:
            slots.let_go(following)

    def _make_room(self, more: int, keep: State, ahead: State | None = None) -> int:
        """Free the least useful storage until `more` bytes fit; what is still too much is returned.

        ahead: the run that they are for, if it is not the one that is called: only what can be fetched again is sent
        away for it.
        """
        over = more - self.limit
        over += sum(s.held for m in self.members for s in (*m.states.values(), *m.spares))
        for slots in self.members:
            while slots.spares and over > 0:
                over -= slots.spares.pop(0).held
        if over > 0:
            every = [(m, s) for m in self.members for s in m.states.values()]
            turns = self._turns(keep)
            for slots, state in sorted(
                every, key=lambda pair: (not pair[1].spent, -turns.get(pair[1], 0), pair[1].used)
            ):
                if over <= 0 or not state.held or state is keep or state is ahead:
                    continue
                goes = self.offload and not (slots.fixed or state.spent)
                if goes or ahead is None or state.spent:
                    over -= state.held
                    self._free(slots, state, goes)
        return over

    def _turns(self, state: State) -> dict[State, int]:
        """The states whose calls follow, by how many calls from now, as far as turns were taken before; the others
        come later than all of them."""
        if not self.offload:
            return {}
        turns: dict[State, int] = {}
        following = state.next
        while following is not None and (found := following()) not in (None, state, *turns):
            turns[found] = len(turns) + 1
            following = found.next
        others = (s for m in self.members for s in m.states.values() if s not in turns)
        return {**dict.fromkeys(others, len(turns) + 1), **turns}

    def _free(self, slots: Slots, state: State, goes: bool) -> None:
        """Send the storage of a state away, where it is to come back and the host has room; else let go of it."""
        if goes:
            try:
                slots.send_away(state)
                return
            except NoRoom:
                pass
        slots.let_go(state)


def budget_of(max_bytes: Any, offload: Any, pools: list[Slots]) -> Budget | None:
    """The budget that `enable` was given; None without one. Raises TypeError or ValueError that names the argument."""
    if max_bytes is not None:
        limit = whole("enable", "max_bytes", max_bytes, 0)
        return Budget(limit, flag("enable", "offload", offload), pools)
    if offload:
        raise ValueError("enable: offload is True, needs max_bytes, beyond which to offload")
    return None
