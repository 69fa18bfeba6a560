# SPDX-License-Identifier: Apache-2.0
"""What changes in the model's input latents, decided before the forward begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import sync
from ...models.block_io import LATENTS, model_input
from ...policies import Step
from ...storage.allocate import NoRoom
from ...storage.state import State
from .base import SignalSlots
from .change import Change


def together(value: Any) -> Any:
    """Values of samples apart, each without a batch, as one tensor; anything else as it is."""
    if isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
        alike = all(v.shape == value[0].shape for v in value)
        return torch.stack(tuple(value)) if alike else torch.cat([v.flatten() for v in value])
    return value


class InputChange(Change):
    """The relative L1 change of the latents as they come: nothing of the model has run when it is known."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sums: tuple[int, ...] = (1,)  # their shape in the running step

    def latents(self, args: tuple, kwargs: dict) -> Any:
        """What the model is called with; a ValueError where that is no tensor."""
        value = together(model_input(args, kwargs))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = (
                f"of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise ValueError(
                f"when: {type(self.when).__name__} looks at the latents that the model is called with, one of "
                f"{', '.join(LATENTS)} or the first argument, and that is {found}; it must be a tensor of floats. "
                "Give the latents by their name"
            )
        return value.detach()

    def of_call(self, step: Step, args: tuple, kwargs: dict) -> Tensor | None:
        value: Tensor = self.latents(args, kwargs)
        self.sums = self.when.sums(value)
        return value

    def fetch(self, state: State, like: Tensor) -> SignalSlots:
        """What is kept, on the device of a value: the storage of a run may be on its way back from host memory."""
        slots = self._slots(state)
        if slots.kept_reference and slots.reference.device != like.device:
            slots.move(lambda t: t.to(like.device, non_blocking=True))
        return slots

    def measure(self, state: State, y: Tensor, x: Tensor | None) -> Tensor | None:
        self.fetch(state, y)
        return super().measure(state, y, x)

    def keep(self, state: State, y: Tensor, x: Tensor | None) -> None:
        """Where there is no room nothing is kept, and the next step is computed."""
        slots = self._slots(state)
        try:
            super().keep(state, y, x)
            slots.kept_reference = True
        except NoRoom:
            slots.kept_reference = False

    def shape(self, state: State) -> tuple[int, ...]:
        return self.sums


class InputDistance(InputChange):
    """The L2 norm of what the latents differ by."""

    def measure(self, state: State, y: Tensor, x: Tensor | None) -> Tensor | None:
        slots = self.fetch(state, y)
        if not slots.kept_reference:
            return None
        square = (y.float() - slots.reference.float()).square()
        return (
            square.flatten(1).sum(1, keepdim=True) if self.per_sample else square.sum().reshape(1)
        )

    def read(self, measured: Tensor, group: Any) -> float:
        return sync.norm(measured, group)
