"""Which steps a history holds, on the host and for compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .allocate import allocate


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
            self.rows = (self.next_row, *self.rows)[: self.depth]
            self.steps = (step, *self.steps)[: self.depth]
        self.pushes += 1

    @property
    def next_row(self) -> int:
        return self.pushes % self.depth if self.depth else 0

    def gap(self, step: int) -> int:
        """Steps since the newest value; 1 where there is none or time stood still."""
        return max(step - self.steps[0], 1) if self.steps else 1


class Staged:
    """The same facts as small device tensors, for compiled code: filled by the host before a step."""

    __slots__ = ("filled", "order", "row", "scale", "weights")

    def __init__(self, depth: int, device: torch.device) -> None:
        depth = max(depth, 1)
        self.weights = allocate((depth,), torch.float32, device)  # newest first
        self.order = allocate((depth,), torch.int64, device)  # ring rows, newest first
        self.row = allocate((1,), torch.int64, device)  # where the next value goes
        self.scale = allocate(
            (depth,), torch.float32, device
        )  # per order: 1 / gap, or 0 where invalid
        self.filled: dict[str, Sequence[float]] = {}  # what each tensor holds

    def fill(self, name: str, values: Sequence[float]) -> None:
        """Copy to the device what is not there yet."""
        if self.filled.get(name) != values:
            t = getattr(self, name)
            t.copy_(torch.tensor(values, dtype=t.dtype))
            self.filled[name] = values


def stage(timeline: Timeline, weights: Sequence[float], step: int, device: torch.device) -> None:
    """Copy what compiled code needs for this step to the device; small, asynchronous, no wait."""
    s = timeline.staged
    if s is None:
        s = timeline.staged = Staged(timeline.depth, device)
    depth = len(s.weights)
    s.fill("order", (*timeline.rows, *(r for r in range(depth) if r not in timeline.rows)))
    s.fill("row", (timeline.next_row,))
    s.fill("weights", (*weights, *[0.0] * (depth - len(weights))))
    held, scale = len(timeline.steps), 1.0 / timeline.gap(step)
    s.fill("scale", tuple(scale if j < held else 0.0 for j in range(depth)))
