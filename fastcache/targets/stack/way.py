# SPDX-License-Identifier: Apache-2.0
"""How one call goes through a stack, block by block, as far as the host sees it without reading a value."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...models.block_io import BlockIO, Positions
from ..outputs import ReturnLayout

Call = tuple[
    int, int, bool
]  # list, block, and whether it got the very tensor that the one before returned


def version(t: Any) -> int:
    """How often a tensor was written into; -1 where that is not counted."""
    return t._version if isinstance(t, Tensor) and not t.is_inference() else -1


class Way:
    """The blocks that a call has run so far.

    calls: in order. left: the hidden states that the last one has returned. broken: whether something was seen
    that what was learnt of the stack does not allow for.
    """

    __slots__ = ("_version", "broken", "calls", "left")

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.left: Any = None
        self._version = -1
        self.broken = False

    def arrive(self, at: int, index: int, hidden: Any) -> bool:
        """A block is called with these hidden states; whether they are what the one before has returned."""
        direct = hidden is self.left and version(hidden) == self._version
        self.calls.append((at, index, direct))
        return direct

    def passed(
        self,
        io: BlockIO,
        output: Any,
        given: tuple[Any, Any],
        learnt: Positions | None,
        returns: ReturnLayout | None = None,
    ) -> None:
        """A block has run. given: the streams that it got. returns: how it is relied on to give them back."""
        self.leave(io.streams(output, *given, learnt)[0])
        if returns is not None:
            places = io.positions(output, *given, learnt)
            self.broken = self.broken or ReturnLayout.of(output, *places) != returns

    def leave(self, hidden: Any) -> None:
        """The block has returned these."""
        self.left, self._version = hidden, version(hidden)
