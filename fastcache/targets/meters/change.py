# SPDX-License-Identifier: Apache-2.0
"""The relative L1 change of a value, here of the first block's residual."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import sync
from ...ops import direct
from ...ops.short import change_against
from ...storage.allocate import allocate, strides_of
from ...storage.ring import tail
from ...storage.state import State
from .base import Meter, SignalSlots

_sums = direct("residual_l1")
_sums_into = direct("residual_l1_into_")
_store = direct("residual_store_")


class Change(Meter):
    """sum|v - v'| / sum|v'|, v' the reference: both sums in one pass over memory."""

    def _slots(self, state: State) -> SignalSlots:
        return state.slots[self.rule].signal

    def measure(self, state: State, y: Tensor, x: Tensor | None) -> Tensor | None:
        slots: SignalSlots = state.slots[self.rule].signal
        if not slots.kept_reference:
            return None
        if x is None or torch.is_grad_enabled():
            y, x = self._pair(slots, y, x)
        before = slots.reference
        if before.shape != y.shape:
            before = tail(before, y)
            if before.shape != y.shape:  # of another length
                return None
        return _sums(y, x, before, self.per_sample)

    def number(self, state: State, y: Tensor, x: Tensor | None) -> float | None:
        slots: SignalSlots = state.slots[self.rule].signal
        against = slots.against
        if x is not None and against is not None and slots.kept_reference and not self.per_sample:
            found = against(y, x)
            if found is not None:
                return found
        measured = self.measure(state, y, x)
        return None if measured is None else self.read(measured, None)

    def keep(self, state: State, y: Tensor, x: Tensor | None) -> None:
        slots = self._slots(state)
        if torch.compiler.is_compiling():
            tail(slots.reference, y).copy_(y if x is None else y - x)
            return
        held = slots.reference
        if (
            held is None
            or held.shape[1:] != y.shape[1:]
            or held.shape[0] < y.shape[0]
            or (held.dtype, held.device) != (y.dtype, y.device)
        ):
            slots.reference = allocate(y.shape, y.dtype, y.device, strides_of(y))
            slots.form, slots.against = (y.shape, y.dtype), change_against(slots.reference)
            if x is None:
                slots.nothing = allocate(y.shape, y.dtype, y.device, strides_of(y))
        if x is None:
            tail(slots.reference, y).copy_(y, non_blocking=True)
        else:
            _store(tail(slots.reference, y), y, x)

    def went_well(self, state: State) -> None:
        slots = self._slots(state)
        slots.kept_reference = slots.reference is not None  # None where the first block never ran

    def prepare_head(self, state: State) -> bool:
        slots = self._slots(state)
        if not slots.kept_reference:
            return False
        if slots.sums is None:
            shape, device = self.when.sums(slots.reference), slots.reference.device
            slots.sums = allocate(shape, torch.float32, device)
        return True

    @staticmethod
    def _pair(slots: SignalSlots, y: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is measured, as a difference of two."""
        y = y.detach() if y.requires_grad else y
        if x is None:
            return y, tail(slots.nothing, y)
        return y, x.detach() if x.requires_grad else x

    def measure_head(self, state: State, y: Tensor, x: Tensor | None) -> None:
        slots = self._slots(state)
        y, x = self._pair(slots, y, x)
        before, sums = tail(slots.reference, y), slots.sums
        if before.shape != y.shape:  # of another length
            sums.fill_(math.nan)
            return
        sums = tail(sums, y.flatten(1)) if self.per_sample else sums
        _sums_into(sums, y, x, before, self.per_sample)

    def left(self, state: State) -> Tensor:
        return self._slots(state).sums

    def shape(self, state: State) -> tuple[int, ...]:
        held = self._slots(state).reference  # without one, no rank has one
        return (1,) if held is None else self.when.sums(held)

    def read(self, measured: Tensor, group: Any) -> float:
        return sync.relative_change(measured, group)
