# SPDX-License-Identifier: Apache-2.0
"""Storage of runs: one state per (request, context), spares for the next ones, and a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .allocate import allocate, device_of, on_host
from .group import SlotGroup
from .history import Timeline
from .state import SPENT, EndedRun, State

SPARES = 8  # storages of forgotten runs kept for the next ones, and complete runs kept, per model

SPARE = "for the next run"  # what a picture calls storage that no run uses


class Slots:
    """The states of one denoiser.

    depths: values per history, one per rule. groups: what makes what a rule keeps else, one per rule.
    """

    def __init__(
        self, depths: Sequence[int], groups: Sequence[Callable[[], SlotGroup]] = ()
    ) -> None:
        self.depths, self.groups = tuple(depths), tuple(groups)
        self.ended: list[EndedRun] = []  # runs that are over, for whoever accounts for them
        self.states: dict[tuple[Any, str], State] = {}
        self.spares: list[State] = []
        self.finished: dict[tuple[Any, str], None] = {}  # spent runs, oldest first
        self.aside: Any = None  # the CUDA stream that fetches storage ahead of its use
        self.streams = torch.cuda.is_available()  # calls may come on different ones
        self.fixed = False  # compiled code may know the addresses of storage
        self.sizes: dict[Any, int] = {}  # bytes that a run takes, by the signature of its calls

    def new(self, key: tuple[Any, str]) -> State:
        state = State(key, len(self.depths))
        state.timelines = [Timeline(depth) for depth in self.depths]
        state.slots = [make() for make in self.groups]
        return state

    def add(self, key: tuple[Any, str]) -> State:
        """A state for a context of a request, which has none."""
        state = self.states[key] = self.new(key)
        return state

    def adopt(self, state: State, signature: tuple) -> None:
        """Begin a run with storage for calls of this signature, taken from a spare where there is one."""
        if state.signature is not None:
            self.end_run(state)
            self.release(state)
        self.finished.pop(state.key, None)
        spare = self._spare(signature)
        if spare is None:
            done = next((k for k in self.finished if self.states[k].signature == signature), None)
            if done is not None:
                self._give_up(done)
                spare = self._spare(signature)
        self._take(state, spare or self.new(state.key))
        state.fit(signature)
        state.begin_run()  # a spare is empty

    def end_run(self, state: State) -> None:
        """Note that the run of a state is over, if it had a step."""
        if state.index:
            pushes = state.timelines[0].pushes
            self.ended.append(
                EndedRun(state.key, state.records, state.measured, pushes, state.total)
            )

    def begin_anew(self, state: State) -> None:
        """Begin another run in the storage that a state has."""
        self.end_run(state)
        self.finished.pop(state.key, None)
        spare = None if any(state.units) else self._spare(state.signature)
        if spare is not None:  # others have taken its own
            self._take(state, spare)
        state.restart()

    def release(self, state: State) -> None:
        """Give a state's storage to the spares, emptied; the state itself is left without."""
        if state.signature is not None and any(state.units):
            spare = self.new(state.key)
            self._take(spare, state)
            spare.signature = state.signature
            if self.streams:
                follow(spare)
            spare.empty()
            if not spare.away:
                self.spares.append(spare)
            del self.spares[:-SPARES]
        self._take(state, self.new(state.key))

    def send_away(self, state: State) -> None:
        """Move the storage of a state to host memory, in order with what the device has still to do.

        Raises NoRoom where there is none; of the state nothing is of use then.
        """
        if self.streams:
            follow(state)
        state.move(on_host)
        state.away, state.held = state.held, 0

    def bring_back(self, state: State, device: Any) -> None:
        """Move it back to the device, without waiting for it. Raises NoRoom as `send_away` does."""

        def fetched(t: Tensor) -> Tensor:
            return allocate(t.shape, t.dtype, device, t.stride()).copy_(t, non_blocking=True)

        if self.streams:
            follow(state)
        state.move(fetched)
        state.held, state.away = state.away, 0

    def fetch(self, state: State, device: Any) -> None:
        """The same beside what the device does meanwhile: its next call waits, by `follow`, for the stream of the
        copies. Not run on a GPU yet."""
        if torch.device(device).type != "cuda":
            self.bring_back(state, device)
            return
        now, before = torch.cuda.current_stream(device), state.stream
        if self.aside is None:
            self.aside = torch.cuda.Stream(device)
        aside = self.aside

        def fetched(t: Tensor) -> Tensor:
            new = allocate(t.shape, t.dtype, device, t.stride())  # of this stream's memory
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                new.copy_(t, non_blocking=True)
            new.record_stream(aside)
            return new

        if before is not None:  # which has sent it away
            aside.wait_stream(before)
        state.move(fetched)
        state.held, state.away, state.stream = state.away, 0, aside

    def drop(self, state: State) -> None:
        """Free the storage of a state; its run goes on."""
        self._take(state, self.new(state.key))
        state.steps_until_full_batch = 0

    def forget(self, key: tuple[Any, str]) -> None:
        """Remove a state; its storage serves another."""
        state = self.states.pop(key)
        self.finished.pop(key, None)
        self.end_run(state)
        self.release(state)

    def let_go(self, state: State) -> None:
        """Free the storage of a state: its run goes on without until there is room again, or to its end where nothing
        would read it."""
        if state.spent and not state.complete:
            state.without = SPENT
        else:
            state.evicted = True
        self.drop(state)

    def retire(self, state: State) -> None:
        """Keep few of the runs that are spent: a server may never reset, and never use a name again."""
        if state.key in self.finished:
            del self.finished[state.key]
        if state.spent:
            self.finished[state.key] = None
            if len(self.finished) > SPARES:
                self._give_up(next(iter(self.finished)))

    def _give_up(self, key: tuple[Any, str]) -> None:
        """Let the storage of a spent run serve another; the run itself is forgotten once it is complete."""
        state = self.states[key]
        if state.complete:
            self.forget(key)
            return
        del self.finished[key]
        self.release(state)
        state.without = SPENT

    def clear(self) -> None:
        self.states.clear()
        self.spares.clear()
        self.finished.clear()

    def held(self) -> dict[str, int]:
        """Bytes per context, and of storage that waits for the next run; empty ones are left out."""
        alone = len({request for request, _ in self.states}) == 1
        sizes: dict[str, int] = {}
        for (request, context), state in self.states.items():
            name = context if alone else f"{request} {context}"
            sizes[name] = sizes.get(name, 0) + state.nbytes()
        sizes[SPARE] = sum(state.nbytes() for state in self.spares)
        return {name: size for name, size in sizes.items() if size}

    def nbytes(self) -> int:
        return sum(s.nbytes() for s in (*self.states.values(), *self.spares))

    def _spare(self, signature: tuple) -> State | None:
        found = next((s for s in self.spares if s.signature == signature), None)
        if found is not None:
            self.spares.remove(found)
        return found

    @staticmethod
    def _take(state: State, other: State) -> None:
        state.units, state.timelines, state.slots = other.units, other.timelines, other.slots
        state.held, state.away, state.stream = other.held, other.away, other.stream


def follow(state: State) -> None:
    """Let this thread's CUDA stream wait for the one that used a state's storage last. Not run on a GPU yet."""
    device = device_of(state.signature)
    if device.type == "cpu":
        return
    before, now = state.stream, torch.cuda.current_stream(device)
    state.stream = now
    if before is not None and before != now:
        now.wait_stream(before)
        for t in state.tensors():
            if t.device == device:  # and not before it is done may its memory serve others
                t.record_stream(now)
