# SPDX-License-Identifier: Apache-2.0
"""What every way of remembering one tensor has in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .allocate import static


class Stream:
    """The history of one tensor. These defaults are those of a stream that holds nothing.

    kept: names of the attributes that hold tensors. dtype: of the values that it predicts. views: rows of the
    buffer, at addresses that compiled code knows. slots: the same as [1, ...], for it to write into.
    lent: some row itself was handed out. hand_out_copies: a consumer has written into what it was handed.
    """

    __slots__ = ("buffer", "dtype", "hand_out_copies", "lent", "slots", "views")
    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.hand_out_copies, self.lent = dtype, False, False
        self.buffer: Any = None
        self.views: list[Tensor] = []
        self.slots: list[Tensor] = []

    @property
    def rows(self) -> Tensor:
        """The buffer; whoever sets it sets the views of its rows too."""
        return self.buffer

    @rows.setter
    def rows(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.views, self.slots = list(buffer.unbind(0)), list(buffer.split(1))

    def hold(self, buffer: Tensor) -> None:
        """Keep everything in this buffer from now on; its rows stay in place."""
        self.rows = buffer
        for t in (*self.views, *self.slots):
            static(t)

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        """Keep y, or y - x, as the value of a step."""

    def predict(self, base: Tensor | None, weights: Sequence[float]) -> Tensor:
        """What stands in for the value: base, if there is one, plus the weighted sum of what is held."""
        raise NotImplementedError

    def stored_alias(self, y: Tensor) -> Tensor:
        """The row that y was just copied to, in its place, so that not both stay alive; y where they differ."""
        return y

    def mark(self) -> None:
        """Note the state of the buffer after a store."""

    def unmodified(self) -> bool:
        """Whether nobody else has written into the buffer since."""
        return True

    def forget(self) -> None:
        """Nothing to do: whether a row is valid is known beside it."""

    def owners(self, label: str) -> Iterator[tuple[str, Stream]]:
        """Itself, by name."""
        yield label, self

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [getattr(self, name) for name in self.kept]

    def make_static(self) -> None:
        """Tell compiled code that what is held stays where it is."""
        for t in (*self.tensors(), *self.views, *self.slots):
            static(t)

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep everything in other storage from now on."""
        if self.buffer is not None:
            self.hold(to(self.buffer))
