# SPDX-License-Identifier: Apache-2.0
"""A model of many blocks that do next to nothing, to see what Python costs."""

from __future__ import annotations

import contextlib
from typing import Any

from torch import Tensor, nn

BLOCKS = 57  # FLUX: 19 double and 38 single blocks


class Block(nn.Module):
    """Returns what it is given."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Head(Block):
    """The first one does a little, or FirstBlockCache would compare nothing with nothing."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 0.5


def model_class() -> type[nn.Module]:
    """A model of trivial blocks; with diffusers installed one that its hooks accept."""
    bases: tuple[type, ...] = (nn.Module,)
    with contextlib.suppress(ImportError):
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
        from diffusers.models.cache_utils import CacheMixin

        for kind in (Block, Head):
            row = TransformerBlockMetadata(
                return_hidden_states_index=0, return_encoder_hidden_states_index=None
            )
            TransformerBlockRegistry.register(kind, row)
        bases = (nn.Module, CacheMixin)

    def init(self: Any, blocks: int) -> None:
        nn.Module.__init__(self)
        self.transformer_blocks = nn.ModuleList([Head(), *(Block() for _ in range(blocks - 1))])

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states)
        return hidden_states

    return type("TrivialModel", bases, {"__init__": init, "forward": forward})
