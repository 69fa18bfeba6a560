# SPDX-License-Identifier: Apache-2.0
"""A table of differences, and a value that is always zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import direct
from .allocate import put, stacked
from .history import Timeline
from .ring import weighted, wide
from .stream import Stream

_update = direct("taylor_update_")


class Table(Stream):
    """A difference table of one tensor, refreshed in place: TaylorSeer's factors."""

    __slots__ = ("timeline",)
    kept = ("rows",)

    def __init__(self, value: Tensor, timeline: Timeline, dtype: torch.dtype | None) -> None:
        super().__init__(value.dtype)
        self.timeline = timeline
        self.hold(stacked(value, timeline.depth, dtype or value.dtype))

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        value = y if x is None else y - x
        if torch.compiler.is_compiling():
            for slot, scale in zip(self.slots, self.timeline.staged.scale.unbind(0), strict=True):
                following = (wide(value) - slot[0].to(wide(value).dtype)) * scale
                put(slot, value)
                value = following
            return
        _update(self.views, value, 1.0 / self.timeline.gap(step), len(self.timeline.steps))

    def predict(self, base: Tensor | None, weights: Sequence[float]) -> Tensor:
        if torch.compiler.is_compiling():
            total: Any = None if base is None else wide(base)
            for slot, weight in zip(
                self.slots, self.timeline.staged.weights.unbind(0), strict=True
            ):
                term = wide(slot[0].to(self.dtype)) * weight
                total = term if total is None else total + term
            return total.to(self.dtype)
        return weighted(self.views[: len(weights)], weights, base, self.dtype)


class Blank(Stream):
    """No history: a skipped tensor becomes zeros of the same shape."""

    __slots__ = ("device", "shape")

    def __init__(self, value: Tensor) -> None:
        super().__init__(value.dtype)
        self.shape, self.device = value.shape, value.device

    def predict(self, base: Tensor | None, weights: Sequence[float]) -> Tensor:
        return (
            torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            if base is None
            else base.clone()
        )
