# SPDX-License-Identifier: Apache-2.0
"""Several states read and written as one, for a call whose samples belong to different requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .allocate import Unfit
from .state import State
from .stream import Stream
from .unit import Unit


class Member(Protocol):
    """One sample of a call whose samples belong to different requests.

    state: of its request. actions, weights: per rule, what was decided of its step.
    """

    state: State
    actions: list[str]
    weights: list[Sequence[float]]

    def arm(self) -> None:
        """Have the control hold what was decided of it."""

    def note(self) -> None:
        """Take over what the control holds: a decision has fallen inside the call."""


def apart(value: Any, count: int) -> Sequence[Any]:
    """A value of `count` samples, sample by sample: a tensor [count, ...], a named tuple with such in it, or what all
    have in common, as a tensor [1, ...] is. Raises Unfit for a tensor of another length. Traced by torch.compile."""
    if isinstance(value, Tensor):
        if value.shape[:1] == (count,):
            return value.split(1)
        if value.shape[:1] != (1,):
            raise Unfit(f"{tuple(value.shape)} is not one sample for each of {count}")
    elif isinstance(value, tuple):
        fields = [apart(field, count) for field in value]
        return [type(value)(*row) for row in zip(*fields, strict=True)]
    return [value] * count


class Together(Stream):
    """One value of several states, each of which has a sample of it, in their order.

    streams: those of the value. states: whose they are. weights: of each one's prediction, by the time that is made.
    guided: these lie on the device. Traced by torch.compile, which finds others on the device too.
    """

    __slots__ = ("guided", "states", "streams", "weights")

    def __init__(
        self,
        streams: Sequence[Stream],
        states: Sequence[State],
        weights: Sequence[Any],
        guided: bool,
    ) -> None:
        super().__init__(streams[0].dtype)
        self.streams, self.states, self.weights, self.guided = streams, states, weights, guided

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        count = len(self.streams)
        steps = [0] * count
        if not torch.compiler.is_compiling():
            steps = [state.armed_step for state in self.states]
        rows = zip(self.streams, apart(y, count), apart(x, count), steps, strict=True)
        for stream, new, old, at in rows:
            stream.store(new, old, at)

    def predict(self, base: Tensor | None, weights: Any) -> Tensor:
        count = len(self.streams)
        each: Sequence[Any] = [()] * count
        if self.guided or not torch.compiler.is_compiling():
            each = self.weights
        rows = zip(self.streams, apart(base, count), each, strict=True)
        return torch.cat([stream.predict(one, w) for stream, one, w in rows])


class Group:
    """What a call of several requests has in the place of a state, as far as one rule reads it.

    samples: in their order. weights: of the prediction of each, a list that its streams read. units, slots: by rule,
    as a `State` has them. way: how the first blocks went, where others are still to come. signature: of the call that
    each sample would be.
    """

    __slots__ = (
        "armed_step",
        "made",
        "samples",
        "signature",
        "slots",
        "steps_until_full_batch",
        "timelines",
        "units",
        "way",
        "weights",
    )

    def __init__(
        self, samples: Sequence[Member], rule: int, made: dict[Any, Unit], weights: list[Any]
    ) -> None:
        self.samples, self.made, self.weights = samples, made, weights
        self.units, self.slots = {rule: dict(made)}, dict[int, Any]()
        self.timelines = samples[0].state.timelines  # their depth is read
        self.signature = samples[0].state.signature
        self.armed_step = self.steps_until_full_batch = 0
        self.way: Any = None

    def settle(self, rule: int) -> None:
        """The call has computed: what it has stored is its states'; where it stored otherwise, they hold nothing."""
        whole = self.units[rule] == self.made
        for state in (sample.state for sample in self.samples):
            if not whole:
                state.units[rule].clear()
            for number, unit in state.units[rule].items():
                unit.touched = self.made[number].touched


def joined(samples: Sequence[Member], rule: int, weights: list[Any], guided: bool) -> Group | None:
    """The samples as one; None unless the state of each holds one of the same values, gone through the same way.

    weights: of the prediction of each. guided: a guide leaves them on the device.
    """
    states = [sample.state for sample in samples]
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
            Together([u.streams[at] for u in units], states, weights, guided)
            for at in range(len(unit.streams))
        ]
    return Group(samples, rule, made, weights) if made else None
