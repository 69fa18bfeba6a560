# SPDX-License-Identifier: Apache-2.0
"""The bytes that all cached tensors of a cache may take."""

from __future__ import annotations

from typing import Any

from .. import sync
from ..checks import flag, whole
from .pool import Slots
from .state import State


class Budget:
    """At most so many bytes of cached tensors after a call, over all denoisers of a cache.

    Beyond it spares are freed, then complete runs, then the run used least recently, which goes on without a
    cache until there is room for it again. Never an error: what does not fit is computed. offload: instead,
    that run's storage goes to host memory (pinned, where there is CUDA) and comes back for its next call.
    """

    def __init__(self, limit: int, offload: bool, members: list[Slots]) -> None:
        self.limit, self.offload, self.members = limit, offload, members
        self.calls = 0

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
            running = sum(s.held for m in self.members for s in m.states.values() if not s.complete)
            if running - state.held + size > self.limit:
                return True
            state.evicted = False
        if not state.held:
            self._make_room(max(size, state.away), state)
        if state.away:
            slots.bring_back(state, device)
        return False

    def keep(self, slots: Slots, state: State) -> int:
        """After a call: note what the state holds, and free what is too much.

        Returns the bytes of the state where they alone are too many; it is left without, then. 0 otherwise.
        """
        self.calls += 1
        state.held, state.used = state.nbytes(), self.calls
        if state.held:
            slots.sizes[state.signature] = max(state.held, slots.sizes.get(state.signature, 0))
        if self._make_room(0, state) <= 0:
            return 0
        alone = state.held
        slots.drop(state)
        return alone

    def _make_room(self, more: int, keep: State) -> int:
        """Free the least useful storage until `more` bytes fit; what is still too much is returned."""
        over = more - self.limit
        over += sum(s.held for m in self.members for s in (*m.states.values(), *m.spares))
        for slots in self.members:
            while slots.spares and over > 0:
                over -= slots.spares.pop(0).held
        if over > 0:
            every = [(m, s) for m in self.members for s in m.states.values() if s is not keep]
            for slots, state in sorted(
                every, key=lambda pair: (not pair[1].complete, pair[1].used)
            ):
                if over > 0 and state.held:
                    over -= state.held
                    if self.offload and not (slots.fixed or state.complete):
                        slots.send_away(state)
                    else:
                        state.evicted = True
                        slots.drop(state)
        return over


def budget_of(max_bytes: Any, offload: Any, pools: list[Slots]) -> Budget | None:
    """The budget that `enable` was given; None without one. Raises TypeError or ValueError that names the argument."""
    if max_bytes is not None:
        limit = whole("enable", "max_bytes", max_bytes, 0)
        return Budget(limit, flag("enable", "offload", offload), pools)
    if offload:
        raise ValueError("enable: offload is True, needs max_bytes, beyond which to offload")
    return None
