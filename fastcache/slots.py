"""Storage of runs: one state per (request, context), spares for the next ones, and a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import signal
from .recipe import Recipe
from .state import State, Timeline, allocate

SPARES = 8  # storages of forgotten runs kept for the next ones, and complete runs kept, per model


class Slots:
    """The states of one denoiser. `ended` is called once for every run that is over."""

    def __init__(self, recipe: Recipe, ended: Callable[[State], None]) -> None:
        self.recipe, self.ended = recipe, ended
        self.states: dict[tuple[Any, str], State] = {}
        self.spares: list[State] = []
        self.finished: dict[tuple[Any, str], None] = {}  # complete runs, oldest first
        self.fixed = False  # compiled code may know the addresses of storage
        self.sizes: dict[Any, int] = {}  # bytes that a run takes, by the signature of its calls

    def new(self, key: tuple[Any, str]) -> State:
        state = State(key, len(self.recipe.rules))
        state.timelines = [Timeline(rule.what.depth) for rule in self.recipe.rules]
        return state

    def add(self, key: tuple[Any, str]) -> State:
        """A state for a context of a request, which has none."""
        state = self.states[key] = self.new(key)
        return state

    def adopt(self, state: State, signature: tuple) -> None:
        """Begin a run with storage for calls of this signature, taken from a spare where there is one."""
        if state.signature is not None:
            self.ended(state)
            self.release(state)
        self.finished.pop(state.key, None)
        spare = self._spare(signature)
        if spare is None:
            done = next((k for k in self.finished if self.states[k].signature == signature), None)
            if done is not None:
                self.forget(done)
                spare = self._spare(signature)
        self._take(state, spare or self.new(state.key))
        state.signature = signature
        state.restart()

    def release(self, state: State) -> None:
        """Give a state's storage to the spares, emptied; the state itself is left without."""
        if state.signature is not None and any(state.units):
            spare = self.new(state.key)
            self._take(spare, state)
            spare.signature = state.signature
            spare.restart()
            if not spare.away:
                self.spares.append(spare)
            del self.spares[:-SPARES]
        self._take(state, self.new(state.key))

    def send_away(self, state: State) -> None:
        """Move the storage of a state to host memory, in order with what the device has still to do."""
        state.move(_to_host)
        state.away, state.held = state.held, 0

    def bring_back(self, state: State, device: Any) -> None:
        """Move it back to the device, without waiting for it."""
        state.move(lambda t: allocate(t.shape, t.dtype, device).copy_(t, non_blocking=True))
        state.held, state.away = state.away, 0

    def drop(self, state: State) -> None:
        """Free the storage of a state; its run goes on."""
        self._take(state, self.new(state.key))
        state.halved = 0

    def forget(self, key: tuple[Any, str]) -> None:
        """Remove a state; its storage serves another."""
        state = self.states.pop(key)
        self.finished.pop(key, None)
        self.ended(state)
        self.release(state)

    def retire(self, state: State) -> None:
        """Keep few of the runs that are complete: a server may never reset, and never use a name again."""
        if state.key in self.finished:
            del self.finished[state.key]
        if state.complete:
            self.finished[state.key] = None
            if len(self.finished) > SPARES:
                self.forget(next(iter(self.finished)))

    def clear(self) -> None:
        self.states.clear()
        self.spares.clear()
        self.finished.clear()

    def nbytes(self) -> int:
        return sum(s.nbytes() for s in (*self.states.values(), *self.spares))

    def _spare(self, signature: tuple) -> State | None:
        found = next((s for s in self.spares if s.signature == signature), None)
        if found is not None:
            self.spares.remove(found)
        return found

    @staticmethod
    def _take(state: State, other: State) -> None:
        state.units, state.timelines, state.head = other.units, other.timelines, other.head
        state.held, state.away = other.held, other.away


def _to_host(t: Tensor) -> Tensor:
    host = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
    return host.copy_(t, non_blocking=True)


class Budget:
    """At most so many bytes of cached tensors after a call, over all denoisers of a cache.

    Beyond it spares are freed, then complete runs, then the run used least recently, which goes on without a
    cache until there is room for it again. Never an error: what does not fit is computed. offload: instead,
    that run's storage goes to host memory (pinned, where there is CUDA) and comes back for its next call.
    """

    def __init__(self, limit: int, offload: bool, warn: Callable[[str], None]) -> None:
        self.limit, self.offload, self.warn = limit, offload, warn
        self.members: list[Slots] = []
        self.calls = 0

    def refuses(self, slots: Slots, state: State, group: Any, device: Any) -> bool:
        """Whether the next step of a state has to do without storage; ranks of `group` agree."""
        refused = self._refuses(slots, state, device)
        if group is not None:
            refused = signal.any_rank(refused, group, device)
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

    def keep(self, slots: Slots, state: State, name: str) -> None:
        """After a call: note what the state holds, and free what is too much."""
        self.calls += 1
        state.held, state.used = state.nbytes(), self.calls
        if state.held:
            slots.sizes[state.signature] = max(state.held, slots.sizes.get(state.signature, 0))
        if self._make_room(0, state) > 0:
            self.warn(
                f"fastcache: max_bytes is {self.limit}, one context of {name} alone takes {state.held}; it "
                "is computed without a cache"
            )
            slots.drop(state)

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
