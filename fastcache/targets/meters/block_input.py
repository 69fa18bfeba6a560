# SPDX-License-Identifier: Apache-2.0
"""The relative L1 change of the first block's timestep-modulated input, decided before that block runs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...models.block_io import BlockIO
from ...models.modulation import Modulated
from ...ops import direct
from ...storage.allocate import allocate
from ...storage.ring import tail
from ...storage.state import State
from .change import Change

_modulated = direct("modulated_l1")
_modulated_store = direct("modulated_l1_")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that the kernels take


class BlockInputChange(Change):
    """A change of what the first block attends over: the embedders have run when it is known, and no block.

    Where a LayerNorm makes it, one kernel normalises, modulates, measures and, if every step is measured against,
    stores: the value then goes about as a `Modulated`, and is never made elsewhere.
    """

    at_input = True

    def of_block(self, io: BlockIO, block: Any, args: tuple, kwargs: dict) -> Any:
        if not self.per_sample:
            parts = io.modulated_parts(block, args, kwargs)
            if parts is not None and parts.hidden.dtype in DTYPES:
                hidden, scale, shift, eps = parts
                return Modulated(hidden.detach(), scale.detach(), shift.detach(), eps)
        return io.modulated(block, args, kwargs).detach()

    def measure(self, state: State, y: Any, x: Tensor | None) -> Tensor | None:
        if isinstance(y, Tensor):
            return super().measure(state, y, x)
        slots = self._slots(state)
        if not slots.kept_reference or not self._fits(state, y):
            return None
        return self._sums(state, y)

    def keep(self, state: State, y: Any, x: Tensor | None) -> None:
        if isinstance(y, Tensor):
            super().keep(state, y, x)
            return
        slots, like = self._slots(state), y.hidden
        held = slots.reference
        if self.every_step and slots.kept_reference and self._fits(state, y):
            return  # stored when it was measured
        if held is None or not self._fits(state, y) or held.device != like.device:
            slots.reference = allocate(like.shape, like.dtype, like.device)
        self._store(state, y)

    def keep_again(self, state: State, value: Any) -> None:
        if isinstance(value, Tensor) or not self.every_step or not self._fits(state, value):
            self.keep(state, value, None)

    def measure_head(self, state: State, y: Any, x: Tensor | None) -> None:
        if isinstance(y, Tensor):
            super().measure_head(state, y, x)
        elif self._fits(state, y):
            self._slots(state).sums.copy_(self._sums(state, y))
        else:  # of another length
            self._slots(state).sums.fill_(math.nan)

    def _fits(self, state: State, y: Modulated) -> bool:
        """Whether what is held is of such a value, or of twice as many samples."""
        held, like = self._slots(state).reference, y.hidden
        if held is None or held.dtype != like.dtype:
            return False
        return held.shape[1:] == like.shape[1:] and held.shape[0] >= like.shape[0]

    def _sums(self, state: State, y: Modulated) -> Tensor:
        before = tail(self._slots(state).reference, y.hidden)
        hidden, scale, shift, eps = y
        if not self.every_step:
            return _modulated(hidden, scale, shift, before, eps)
        return self._store(state, y)

    def _store(self, state: State, y: Modulated) -> Tensor:
        before = tail(self._slots(state).reference, y.hidden)
        hidden, scale, shift, eps = y
        return _modulated_store(before, hidden, scale, shift, before, eps)
