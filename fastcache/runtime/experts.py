# SPDX-License-Identifier: Apache-2.0
"""Two denoisers that share a run between them: one has its first steps, the other the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..models.pipeline import EXPERTS
from ..storage.pool import Slots
from ..storage.state import State


class Experts:
    """What one denoiser has to do with the other expert of its pipeline, if it is one.

    name: of the model in its pipeline. pool: its own states. pools: those of all denoisers.
    """

    def __init__(self, name: str, pool: Slots, pools: list[Slots]) -> None:
        self.expert, self.pool, self.pools = name in EXPERTS, pool, pools

    def start(self, request: Any, step: int) -> int:
        """The step index at which the stretch of this denoiser begins, in a run of it that begins at `step`."""
        if not self.expert:
            return 0
        if self.take_over(request):
            return step
        # another branch may be in it already
        states = self.pool.states.values()
        at = (s.start for s in states if s.key[0] == request and s.start + s.armed_step == step)
        return max(at, default=0)

    def take_over(self, request: Any) -> bool:
        """Whether the other expert has had the steps before; its storage is given back, since it had them."""
        found = False
        for pool, state in self._states(request):
            if state.index > 1:
                found = True
                pool.end_run(state)
                if not pool.fixed:
                    pool.drop(state)
                    state.fit(None)
                state.begin_run()
        for pool in self.pools if found else ():
            if pool is not self.pool and not pool.fixed:
                pool.spares.clear()
        return found

    def end_the_other(self, request: Any) -> None:
        """Nobody has announced that a run begins: what the other expert has had of the run before is over too."""
        for pool, state in self._states(request):
            if state.index:
                pool.begin_anew(state)

    def _states(self, request: Any) -> Iterator[tuple[Slots, State]]:
        """Of the other expert."""
        for pool in self.pools if self.expert else ():
            for state in pool.states.values() if pool is not self.pool else ():
                if state.key[0] == request:
                    yield pool, state
