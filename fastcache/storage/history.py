# SPDX-License-Identifier: Apache-2.0
"""Which steps a history holds, on the host and for compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .allocate import allocate, static, upload


class Timeline:
    """Which steps a history holds, newest first; shared by all tensors that one rule caches."""

    __slots__ = ("depth", "pushes", "rows", "staged", "steps")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.staged: Any = None  # a Staged, once compiled code asks for it
        self.clear()

    def clear(self) -> None:
        self.steps: tuple[int, ...] = ()
        self.rows: tuple[int, ...] = ()
        self.pushes = 0

    def push(self, step: int) -> None:
        """Record that every unit has stored its value for `step` in `next_row`."""
        if self.depth:
            row = self.next_row
            if (
                step in self.steps or row in self.rows[: self.depth - 1]
            ):  # a second value for the same step
                held = zip(self.steps, self.rows, strict=True)
                kept = [(s, r) for s, r in held if s != step and r != row]
                self.steps, self.rows = tuple(s for s, _ in kept), tuple(r for _, r in kept)
            self.rows = (row, *self.rows)[: self.depth]
            self.steps = (step, *self.steps)[: self.depth]
        self.pushes += 1

    @property
    def places(self) -> tuple[int, ...]:
        """As many rows as are kept, newest first; the oldest value stands for those that are still to come."""
        missing = self.depth - len(self.rows)
        return self.rows if not missing else (*self.rows, *(self.rows[-1:] or (0,)) * missing)

    @property
    def next_row(self) -> int:
        return self.pushes % self.depth if self.depth else 0

    def gap(self, step: int) -> int:
        """Steps since the newest value; 1 where there is none or time stood still."""
        return max(step - self.steps[0], 1) if self.steps else 1


def padded(count: int) -> int:
    """Elements of 4 bytes that take whole 16 bytes, where compiled code expects a tensor to begin."""
    return -(-count // 4) * 4


KNOWN = 256  # kinds of steps whose facts stay on the device, per history


class Staged:
    """The same facts as small device tensors, for compiled code: written by the host before a step.

    They lie in one piece of memory, so a step takes one copy; facts that came before lie on the device
    already, and a schedule repeats itself, so after its first rounds nothing comes from the host. Those of a run
    whose schedule is known come in one copy when it begins.
    """

    __slots__ = ("foreseen", "known", "now", "order", "packed", "row", "scale", "weights")

    def __init__(self, depth: int, device: torch.device) -> None:
        depth = max(depth, 1)
        sizes = [padded(2 * depth), padded(2), padded(depth), padded(depth)]
        self.packed = allocate((sum(sizes),), torch.int32, device)
        order, row, weights, scale = self.packed.split(sizes)
        self.order = static(order.view(torch.int64)[:depth])  # ring rows, newest first
        self.row = static(row.view(torch.int64)[:1])  # where the next value goes
        self.weights = static(weights.view(torch.float32)[:depth])  # newest first
        # per order: 1 / gap, or 0 where invalid
        self.scale = static(scale.view(torch.float32)[:depth])
        self.now: tuple = ()  # what the device holds
        self.known: dict[tuple, Tensor] = {}
        self.foreseen = 0  # steps of the run whose facts were uploaded when it began

    def write(self, *facts: tuple[float, ...]) -> None:
        """Have the device hold this order, row, weights and scale, as tuples."""
        if facts == self.now:
            return
        if facts not in self.known:
            if len(self.known) == KNOWN:
                self.known.clear()
            self.known[facts] = upload(_packed(facts), self.packed.device)
        self.packed.copy_(self.known[facts])
        self.now = facts

    def foresee(self, run: Sequence[tuple]) -> None:
        """Have the facts of all steps of a run lie on the device, in one copy."""
        room = KNOWN - len(self.known)
        new = [facts for facts in dict.fromkeys(run) if facts not in self.known][:room]
        if new:
            rows = upload(torch.stack([_packed(facts) for facts in new]), self.packed.device)
            self.known.update(zip(new, rows.unbind(0), strict=True))
        self.foreseen = len(run)


def _packed(facts: tuple[tuple[float, ...], ...]) -> Tensor:
    """The order, row, weights and scale of a step as a `Staged` keeps them, on the host."""
    parts = []
    for values, dtype in zip(facts, 2 * [torch.int64] + 2 * [torch.float32], strict=True):
        part = torch.tensor(values, dtype=dtype).view(torch.int32)
        parts.append(torch.nn.functional.pad(part, (0, padded(len(part)) - len(part))))
    return torch.cat(parts)


def facts_of(timeline: Timeline, weights: Sequence[float], step: int) -> tuple:
    """What compiled code needs for a step: the order, row, weights and scale of a `Staged`."""
    depth, held, scale = max(timeline.depth, 1), len(timeline.steps), 1.0 / timeline.gap(step)
    return (
        timeline.places or (0,),
        (timeline.next_row,),
        (*weights, *[0.0] * (depth - len(weights))),
        tuple(scale if j < held else 0.0 for j in range(depth)),
    )


def staged(timeline: Timeline, device: torch.device) -> Staged:
    """Where the device holds what compiled code needs of a history."""
    if timeline.staged is None:
        timeline.staged = Staged(timeline.depth, device)
    return timeline.staged


def stage(timeline: Timeline, weights: Sequence[float], step: int, device: torch.device) -> None:
    """Have the device hold what compiled code needs for this step; small, asynchronous, no wait."""
    staged(timeline, device).write(*facts_of(timeline, weights, step))
