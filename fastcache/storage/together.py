# SPDX-License-Identifier: Apache-2.0
"""Several states read and written as one, for a call whose samples belong to different requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .allocate import Unfit
from .state import State
from .stream import Stream
from .unit import Unit


class Together(Stream):
    """One value of several states, each of which has a sample of it, in their order.

    streams: those of the value. states: whose they are. weights: of each one's prediction.
    """

    __slots__ = ("states", "streams", "weights")

    def __init__(
        self,
        streams: Sequence[Stream],
        states: Sequence[State],
        weights: Sequence[Sequence[float]],
    ) -> None:
        super().__init__(streams[0].dtype)
        self.streams, self.states, self.weights = streams, states, weights

    def _samples(self, value: Tensor) -> tuple[Tensor, ...]:
        if value.shape[:1] != (len(self.streams),):
            raise Unfit(f"{tuple(value.shape)} is not one sample for each of {len(self.streams)}")
        return value.split(1)

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        before = [None] * len(self.streams) if x is None else self._samples(x)
        after = self._samples(y)
        for stream, state, new, old in zip(self.streams, self.states, after, before, strict=True):
            stream.store(new, old, state.armed_step)

    def predict(self, base: Tensor | None, weights: Any) -> Tensor:
        bases = [None] * len(self.streams) if base is None else self._samples(base)
        each = zip(self.streams, bases, self.weights, strict=True)
        return torch.cat([stream.predict(one, w) for stream, one, w in each])


class Group:
    """What a call of several requests has in the place of a state, as far as one rule reads it.

    states: those of its samples, in their order. units: by rule, as a `State` has them.
    """

    __slots__ = ("armed_step", "made", "states", "steps_until_full_batch", "timelines", "units")

    def __init__(self, states: Sequence[State], rule: int, made: dict[Any, Unit]) -> None:
        self.states, self.made = states, made
        self.units = {rule: dict(made)}
        self.timelines = states[0].timelines  # their depth is read
        self.armed_step = self.steps_until_full_batch = 0

    def settle(self, rule: int) -> None:
        """The call has computed: what it has stored is its states'; where it stored otherwise, they hold nothing."""
        whole = self.units[rule] == self.made
        for state in self.states:
            if not whole:
                state.units[rule].clear()
            for number, unit in state.units[rule].items():
                unit.touched = self.made[number].touched


def joined(states: Sequence[State], rule: int, weights: Sequence[Sequence[float]]) -> Group | None:
    """The states as one; None unless each holds one sample of the same values, gone through the same way."""
    first, made = states[0].units[rule], dict[Any, Unit]()
    if any(state.units[rule].keys() != first.keys() for state in states):
        return None
    for number, unit in first.items():
        units = [state.units[rule][number] for state in states]
        alike = all(
            (u.template, u.held, u.entry, u.way) == (unit.template, unit.held, unit.entry, unit.way)
            for u in units
        )
        shapes = [*(shape for shape, _, _ in unit.held), unit.entry]
        if not alike or any(shape[:1] != (1,) for shape in shapes):
            return None
        made[number] = together = Unit()
        together.template, together.way = unit.template, unit.way
        count = len(states)
        together.entry = torch.Size((count, *unit.entry[1:]))
        together.held = tuple(
            (torch.Size((count, *shape[1:])), dtype, device) for shape, dtype, device in unit.held
        )
        together.streams = [
            Together([u.streams[at] for u in units], states, weights)
            for at in range(len(unit.streams))
        ]
    return Group(states, rule, made) if made else None
