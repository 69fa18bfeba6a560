# SPDX-License-Identifier: Apache-2.0
"""A normalisation right behind the blocks that the residual spans too: it runs as a part of the last block."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...models.block_io import BlockIO, Positions
from ...policies import REUSE
from ..install import hooked_class, put_back, refuse_copy
from ..outputs import ReturnLayout
from .layout import Stack

CLOSING = "_fastcache_closing"


class PassedBy:
    """Mixed into the class of such a module while a cache is attached to it: the model's own call finds it done."""

    __reduce_ex__ = refuse_copy

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        closing = self.__dict__.get(CLOSING)
        if closing is not None and args and closing.is_done():
            return args[0]
        return super().__call__(*args, **kwargs)  # type: ignore[misc]


class Closing:
    """The module that the image stream goes through right after the last block, and how far this call is.

    done: the last block has run it, and the model has not called it yet.
    """

    def __init__(self, stack: Stack, name: str, module: nn.Module) -> None:
        self.stack, self.name, self.module = stack, name, module
        self.control, self.done = stack.control, False

    def install(self) -> None:
        self.module.__dict__[CLOSING] = self
        self.module.__class__ = hooked_class(type(self.module), PassedBy)

    def remove(self) -> None:
        self.module.__dict__.pop(CLOSING, None)
        put_back(self.module, PassedBy)

    def after(
        self,
        io: BlockIO,
        output: Any,
        hidden: Any,
        encoder: Any,
        learnt: Positions | None,
        returns: ReturnLayout,
    ) -> Any:
        """What the last block has returned, its image stream normalised. Traced by torch.compile.

        hidden, encoder: what it was called with. learnt: places that a recording call has seen. returns: how it
        returns its streams.
        """
        left, text, extra = io.taken_apart(output, hidden, encoder, learnt)
        normed = self.module(left)
        self.done = True
        return returns.build(normed, text, extra)

    def is_done(self) -> bool:
        """Whether the model's call of the module has nothing left to do. Traced by torch.compile."""
        if not self.control.active:
            return False
        if self.done:
            self.done = False
            return True
        return self.control.actions[self.stack.rule] == REUSE

    def check(self, last: bool) -> None:
        """Raise unless the model has called it, the blocks of the last list having run last."""
        if self.done or not last:
            raise ValueError(
                f"target: the model does not put what its last block returns through {self.name!r}, as "
                "BlockAdapter(norm=...) says; name the module that it does, or leave norm out"
            )
