# SPDX-License-Identifier: Apache-2.0
"""What is remembered for one skipped value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..predictors import Predictor
from .allocate import FP8
from .fitted import Fitted
from .history import Timeline
from .quantized import Quantized
from .ring import Ring
from .stream import Stream
from .table import Blank, Table


def make_store(
    predictor: Predictor, value: Tensor, timeline: Timeline, dtype: torch.dtype | None = None
) -> Stream:
    """The storage that a predictor needs for one tensor. dtype: what floating values are kept in."""
    if not predictor.depth:
        return Blank(value)
    if predictor.table:
        return Table(value, timeline, predictor.dtype)
    if predictor.fitted is not None:
        return Fitted(value, timeline, dtype, predictor.fitted, predictor.tokens)
    if dtype is None or not value.is_floating_point():
        return Ring(value, timeline)
    return Quantized(value, timeline) if dtype == FP8 else Ring(value, timeline, dtype)


class Unit:
    """One skippable value: a tensor, or the tensors of a tuple, and how to give it back.

    held: shape, dtype and device of each value that the streams are made for. entry: shape of what the value
    is computed from, where that is looked at. way: how the call that made it went through its stack. first,
    last: number of the first and the latest uninterrupted store, to be held against the timeline.
    """

    __slots__ = (
        "entry",
        "first",
        "held",
        "last",
        "shared",
        "streams",
        "template",
        "touched",
        "way",
    )

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.held: tuple = ()
        self.template: Any = None
        self.entry: Any = None
        self.way: Any = None
        self.shared = False  # its module runs twice in a step: no single value, never reused
        self.forget()

    def forget(self) -> None:
        self.first, self.last = 0, -1
        self.touched = False  # written to in the running step

    def make(
        self, values: Sequence[Tensor], timeline: Timeline, make_store: Callable[..., Any]
    ) -> None:
        """Have storage for such values. make_store: (value, timeline) -> a stream."""
        self.streams = [make_store(value, timeline) for value in values]
        self.held = tuple((v.shape, v.dtype, v.device) for v in values)

    def like(self, timeline: Timeline, make_store: Callable[..., Any]) -> Unit:
        """Empty storage for the same values of another request."""
        new = Unit()
        new.template, new.entry, new.way = self.template, self.entry, self.way
        values = [torch.empty(shape, dtype=dtype, device=at) for shape, dtype, at in self.held]
        new.make(values, timeline, make_store)
        return new

    def fits(self, values: Sequence[Tensor], half: bool = False) -> bool:
        """Whether there is storage for these values. half: they are of half a guidance batch."""
        if len(values) != len(self.held):
            return False
        for value, (shape, dtype, device) in zip(values, self.held, strict=True):
            now = value.shape
            if half and now and 2 * now[0] == shape[0]:
                now, shape = now[1:], shape[1:]
            if now != shape or value.dtype != dtype or value.device != device:
                return False
        return True

    def stored(self, pushes: int, traced: bool) -> None:
        """Note that the running step has stored a value, as push number `pushes`; perhaps in traced code."""
        self.touched = False
        if self.last != pushes - 1:
            self.first = pushes
        self.last = pushes
        if traced:  # which could not mark it
            for stream in self.streams:
                stream.mark()

    def ready(self, timeline: Timeline) -> bool:
        """Whether every step that the timeline still holds is held here too."""
        held = len(timeline.steps)
        if (
            self.shared
            or self.last != timeline.pushes - 1
            or self.first > timeline.pushes - held
            or (not held and timeline.depth)
        ):
            return False
        for stream in self.streams:  # once per step: a generator takes three times as long
            if stream.lent and not stream.unmodified():
                return False
        return True
