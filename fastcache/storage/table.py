"""A table of differences, and a value that is always zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import direct
from .allocate import put, stacked, static
from .history import Timeline
from .ring import weighted

_update = direct("taylor_update_")


class Table:
    """A difference table of one tensor, refreshed in place: TaylorSeer's factors.

    views: the factors, [...] each. slots: the same memory as [1, ...], for compiled code to write into.
    """

    __slots__ = ("buffer", "dtype", "slots", "timeline", "views")

    def __init__(self, value: Tensor, timeline: Timeline, dtype: torch.dtype | None) -> None:
        self.timeline, self.dtype = timeline, value.dtype
        self._keep_in(stacked(value, timeline.depth, dtype or value.dtype))

    def _keep_in(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.views = [static(view) for view in buffer.unbind(0)]
        self.slots = [static(slot) for slot in buffer.split(1)]

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        value = y if x is None else y - x
        if torch.compiler.is_compiling():
            for slot, scale in zip(self.slots, self.timeline.staged.scale.unbind(0), strict=True):
                following = (value.float() - slot[0].float()) * scale
                put(slot, value)
                value = following
            return
        _update(self.views, value, 1.0 / self.timeline.gap(step), len(self.timeline.steps))

    def predict(self, base: Tensor | None, weights: Sequence[float]) -> Tensor:
        if torch.compiler.is_compiling():
            total: Any = None if base is None else base.float()
            for slot, weight in zip(
                self.slots, self.timeline.staged.weights.unbind(0), strict=True
            ):
                term = slot[0].to(self.dtype).float() * weight
                total = term if total is None else total + term
            return total.to(self.dtype if base is None else base.dtype)
        return weighted(self.views[: len(weights)], weights, base, self.dtype)

    def stored_alias(self, y: Tensor) -> Tensor:
        return y

    def mark(self) -> None:
        """Nothing to note: a table is never handed out."""

    def unmodified(self) -> bool:
        return True

    def tensors(self) -> list[Tensor]:
        return [self.buffer]

    def addresses(self) -> list[Tensor]:
        return [self.buffer, *self.views, *self.slots]

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        self._keep_in(to(self.buffer))


class Blank:
    """No history: a skipped tensor becomes zeros of the same shape."""

    __slots__ = ("device", "dtype", "shape")

    def __init__(self, value: Tensor) -> None:
        self.shape, self.dtype, self.device = value.shape, value.dtype, value.device

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        """Nothing is kept."""

    def predict(self, base: Tensor | None, weights: Sequence[float]) -> Tensor:
        return (
            torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            if base is None
            else base.clone()
        )

    def stored_alias(self, y: Tensor) -> Tensor:
        return y

    def mark(self) -> None:
        """Nothing to note."""

    def unmodified(self) -> bool:
        return True

    def tensors(self) -> list[Tensor]:
        return []

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Nothing is held."""
