# SPDX-License-Identifier: Apache-2.0
"""How much the model's output changes with its input, decided before the forward begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import sync
from ...policies import Step
from ...storage.allocate import NoRoom, allocate
from ...storage.state import State
from ..outputs import first_value
from .model_input import InputChange, together


class OutputSlope(InputChange):
    """(|v' - v''| / |x' - x''|) |x - x'| / |v'|, |.| the mean: of latents x and outputs v, those with a dash of
    the last computed step, with two of the one before. Four sums say it, in which the numbers of elements cancel.
    """

    at_output = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.entered: Tensor | None = None  # what the running step was called with
        self.moved: Tensor | None = None  # by how much that has changed

    def of_call(self, step: Step, args: tuple, kwargs: dict) -> Tensor | None:
        value = super().of_call(step, args, kwargs)
        assert value is not None and self.signal is not None
        self.entered = None
        return every(value, self.signal.stride)

    def measure(self, state: State, y: Tensor, x: Tensor | None) -> Tensor | None:
        slots = self.fetch(state, y)
        self.moved = self._sum(y.float() - slots.reference) if slots.kept_reference else None
        if self.moved is None or not slots.slopes:
            return None
        return torch.cat((self.moved, slots.sums), -1)

    def keep(self, state: State, y: Tensor, x: Tensor | None) -> None:
        """Only once the output is there: input and output of a step belong together."""
        self.entered = y

    def of_output(self, state: State, output: Any) -> None:
        entered, self.entered = self.entered, None
        value = together(first_value(output))
        if not isinstance(value, Tensor):
            raise ValueError(
                f"when: {type(self.when).__name__} compares what the model returns, and that is a "
                f"{type(value).__name__}; it must be a tensor"
            )
        if entered is None:
            return
        assert self.signal is not None
        now, slots = every(value.detach(), self.signal.stride), self._slots(state)
        try:
            self._learn(slots, entered, now.float())
        except NoRoom:
            slots.kept_reference, slots.slopes = False, 0

    def _learn(self, slots: Any, entered: Tensor, now: Tensor) -> None:
        size = self._sum(now)
        if slots.reference is None or slots.output is None or slots.sums is None:
            slots.reference = allocate(entered.shape, torch.float32, entered.device)
            slots.output = allocate(now.shape, torch.float32, now.device)
            slots.sums = allocate((*size.shape[:-1], 3), torch.float32, now.device)
        if slots.kept_reference and self.moved is not None:
            slots.sums.copy_(torch.cat((self._sum(now - slots.output), self.moved, size), -1))
            slots.slopes += 1
        slots.reference.copy_(entered, non_blocking=True)
        slots.output.copy_(now, non_blocking=True)
        slots.kept_reference = True

    def _sum(self, value: Tensor) -> Tensor:
        """Of absolute values: [1], or [B, 1] where every sample is judged by itself."""
        return (
            value.abs().flatten(1).sum(1, keepdim=True)
            if self.per_sample
            else value.abs().sum().reshape(1)
        )

    def read(self, measured: Tensor, group: Any) -> float:
        return sync.expected_change(measured, group)


def every(value: Tensor, stride: int) -> Tensor:
    """Every how many-th token of [B, tokens, C], or pixel of [B, C, ...]."""
    if stride == 1 or value.dim() < 2:
        return value
    return value[:, ::stride] if value.dim() < 4 else value.flatten(2)[:, :, ::stride]
