"""The relative L1 change of the first block's timestep-modulated input, decided before that block runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...models.block_io import BlockIO
from .change import Change


class BlockInputChange(Change):
    """A change of what the first block attends over: the embedders have run when it is known, and no block."""

    at_input = True

    def of_block(self, io: BlockIO, block: Any, args: tuple, kwargs: dict) -> Tensor:
        return io.modulated(block, args, kwargs).detach()
