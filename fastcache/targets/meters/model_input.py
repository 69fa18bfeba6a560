"""The relative L1 change of the model's input latents, decided before the forward begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...models.block_io import model_input
from ...storage.allocate import NoRoom
from ...storage.state import State
from .change import Change


class InputChange(Change):
    """A change of the latents as they come: nothing of the model has run when it is known."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sums: tuple[int, ...] = (1,)  # their shape in the running step

    def of_call(self, args: tuple, kwargs: dict) -> Tensor:
        value = model_input(args, kwargs)
        if isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
            # latents of samples apart, each without a batch
            alike = all(v.shape == value[0].shape for v in value)
            value = torch.stack(tuple(value)) if alike else torch.cat([v.flatten() for v in value])
        if not isinstance(value, Tensor):
            raise ValueError(
                f"when: {type(self.when).__name__} looks at the latents that the model is called with, the first "
                f"argument or hidden_states, and that is a {type(value).__name__}; it must be a tensor"
            )
        self.sums = self.when.sums(value)
        return value.detach()

    def measure(self, state: State, y: Tensor, x: Tensor | None) -> Tensor | None:
        slots = self._slots(state)
        if slots.kept_reference and slots.reference.device != y.device:
            # the storage of this run is on its way back from host memory
            slots.move(lambda t: t.to(y.device, non_blocking=True))
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
