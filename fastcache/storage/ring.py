# SPDX-License-Identifier: Apache-2.0
"""The last raw values of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import direct
from ..ops.passes import in_passes
from ..ops.short import sum_over
from .allocate import Unfit, put, stacked
from .history import Timeline
from .stream import Stream

_store = direct("residual_store_")


_apply = direct("residual_apply_")


_combine = direct("linear_combine_")


_combine_device = direct("linear_combine_device_")


KERNEL_TERMS = 8  # in one launch


def tail(row: Tensor, like: Tensor | None) -> Tensor:
    """The row, or the end of its batch where only that is asked for: a conditional half comes last."""
    if like is None or row.dim() != like.dim() or row.shape[0] == like.shape[0]:
        return row
    return row[row.shape[0] - like.shape[0] :]


def end_of(value: Tensor, x: Tensor, whole: int) -> Tensor:
    """A value of a batch of `whole`, for the batch of x; a value without that batch as it is."""
    if x.shape[0] == whole or value.shape[:1] != (whole,):
        return value
    return value[whole - x.shape[0] :]


def fitting(row: Tensor, base: Tensor | None) -> Tensor:
    """The row, or the end of its batch, to be added to `base`. Raises Unfit where that has another shape."""
    if base is None or row.shape == base.shape:
        return row
    if row.shape[1:] != base.shape[1:] or row.shape[0] < base.shape[0]:
        raise Unfit(f"what enters has shape {tuple(base.shape)}, it had {tuple(row.shape)}")
    return row[row.shape[0] - base.shape[0] :]


def wide(t: Tensor) -> Tensor:
    """In the precision that sums are computed in."""
    return t if t.dtype == torch.float64 else t.float()


def part(rows: Tensor, like: Tensor | None) -> Tensor:
    """Stacked rows, or of each the end of its batch, as `tail` has it."""
    if like is None or like.shape[0] == rows.shape[1]:
        return rows
    return rows[:, rows.shape[1] - like.shape[0] :]


def thinned(value: Tensor, tokens: int, stacked: bool = False) -> Tensor:
    """Every n-th token of a value [..., tokens, width], or of stacked rows; all of what has no tokens."""
    return value[..., ::tokens, :] if tokens > 1 and value.dim() - stacked > 2 else value


# Before torch 2.13 the C++ that Inductor writes for a transposed value names its row before it is known.
WRITES_ROWS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def picked(rows: Sequence[Tensor], place: Tensor) -> Tensor:
    """The row whose number `place` holds, in compiled code that reads all of them anyway.

    By comparing, not by an index: Inductor's C++ of torch 2.11 reads a row at an index before it has worked
    the index out, where the value that it is added to is transposed.
    """
    row = rows[0]
    for number, other in enumerate(rows[1:], 1):
        row = torch.where(place == number, other, row)
    return row


class Ring(Stream):
    """The last `depth` raw values of one tensor, stacked in one buffer.

    shape: of a row. plain: its dtype, where values are kept as they are; else None. added: what adds rows to a base at
    once.
    """

    __slots__ = ("added", "plain", "shape", "timeline", "version")
    kept: ClassVar[tuple[str, ...]] = ("rows",)

    def __init__(self, value: Tensor, timeline: Timeline, dtype: torch.dtype | None = None) -> None:
        super().__init__(value.dtype)
        self.timeline, self.version = timeline, 0
        self.hold(stacked(value, timeline.depth, dtype or value.dtype))

    def hold(self, buffer: Tensor) -> None:
        super().hold(buffer)
        row = self.views[0]
        self.shape, self.plain = row.shape, self.dtype if row.dtype is self.dtype else None
        self.added = sum_over(self.views, self.dtype)

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        """Keep y, or y - x, in the oldest row. A conditional half goes to the second half of the row."""
        if torch.compiler.is_compiling():
            value = y if x is None else wide(y) - wide(x)
            value = value.to(self.buffer.dtype)
            self._write(part(self.buffer, value), value)
            return
        view = tail(self.views[self.timeline.next_row], y)
        if x is None:
            view.copy_(y)
        else:
            _store(view, y, x)
        self.mark()

    def stored_alias(self, y: Tensor) -> Tensor:
        row = self.views[self.timeline.next_row]
        alike = type(y) is Tensor and (y.dtype, y.shape) == (row.dtype, row.shape)
        if self.hand_out_copies or y.requires_grad or not alike or y.stride() != row.stride():
            return y
        self.lent = True
        return row.detach()

    def predict(self, base: Tensor | None, weights: Sequence[float] | Tensor) -> Tensor:
        """base + sum of weights * rows, newest first; a plain reuse without a base is the row itself.

        weights: none while compiling, whose own are on the device.
        """
        if isinstance(weights, Tensor):
            return self.predict_weighted(base, weights)
        if not weights:
            return self._predict_compiled(base)
        if weights == (1.0,):
            row = self.views[self.timeline.rows[0]]
            if base is None:
                return self._handed_out(row)
            if base.dtype is self.plain and base.shape == self.shape:
                return base + row  # the kernel's bits and passes, with a sixth of its call overhead
        rows = self.timeline.rows[: len(weights)]
        if base is not None:
            found = self.added(base, rows, weights)
            if found is not None:
                return found
        return weighted([self.views[r] for r in rows], weights, base, self.dtype)

    def _handed_out(self, row: Tensor) -> Tensor:
        """A row in the place of a value: itself, where what is written into it is noticed."""
        if self.timeline.depth > 1 or self.hand_out_copies or row.dtype != self.dtype:
            return row.to(self.dtype, copy=True)
        self.lent = True
        return row.detach()

    def advance(self, weights: Sequence[float]) -> Tensor:
        """The sum of weights * rows, which becomes the newest row: in place, unless that would round it."""
        row, rows = self.views[self.timeline.next_row], self.timeline.rows[: len(weights)]
        if row.dtype != self.dtype:
            predicted = self.predict(None, weights)
            self.store(predicted, None, 0)
            return predicted
        weighted([self.views[r] for r in rows], weights, None, self.dtype, row)
        self.mark()
        if self.hand_out_copies:
            return row.clone()
        self.lent = True
        return row.detach()

    def _write(self, held: Tensor, value: Tensor) -> None:
        """Put a value into the row that is next, in compiled code."""
        if self.timeline.depth == 1:
            put(held, value)
        elif WRITES_ROWS or held.device.type != "cpu" or value.is_contiguous():
            held.index_copy_(0, self.timeline.staged.row, value[None])
        else:
            for i, row in enumerate(held.unbind(0)):
                row.copy_(torch.where(self.timeline.staged.row == i, value, row))

    def _read(self, held: Tensor) -> list[Tensor]:
        """All rows, newest first, in compiled code."""
        if self.timeline.depth == 1:
            return [held[0]]
        rows = held.unbind(0)
        return [picked(rows, place) for place in self.timeline.staged.order.unbind(0)]

    def newest_first(self, like: Tensor | None, tokens: int = 1) -> list[Tensor]:
        """As many rows as are kept, newest first, for the batch of `like`; every n-th token of them."""
        if torch.compiler.is_compiling():
            return self._read(thinned(part(self.buffer, like), tokens, stacked=True))
        return [thinned(fitting(self.views[r], like), tokens) for r in self.timeline.places]

    def predict_weighted(self, base: Tensor | None, weights: Tensor) -> Tensor:
        """weights[0] * base + weights[1:] * as many rows, newest first, weights on the device."""
        rows = self.newest_first(base)[: weights.shape[0] - 1]
        if torch.compiler.is_compiling():
            terms = rows if base is None else [base, *rows]
            first = 1 if base is None else 0
            total = wide(terms[0]) * weights[first]
            for i, term in enumerate(terms[1:], first + 1):
                total = total + wide(term) * weights[i]
            return total.to(self.dtype)
        out = torch.empty_like(rows[0], dtype=self.dtype)
        if base is None:
            _combine_device(out, rows, weights[1:].contiguous())
        else:
            _combine_device(out, [base, *rows], weights)
        return out

    def mark(self) -> None:
        self.version = self.buffer._version

    def unmodified(self) -> bool:
        """Whether nobody has written into the buffer since: rows themselves are handed out."""
        if self.buffer._version == self.version:
            return True
        self.hand_out_copies = True
        return False

    def _predict_compiled(self, base: Tensor | None) -> Tensor:
        rows = self.newest_first(base)
        if len(rows) == 1:
            row = rows[0]
            if base is None:
                return row.to(self.dtype, copy=True)
            return (wide(base) + wide(row)).to(self.dtype)
        total: Any = None if base is None else wide(base)
        for i, row in enumerate(rows):
            term = wide(row) * self.timeline.staged.weights[i]
            total = term if total is None else total + term
        return total.to(self.dtype)

    def addresses(self) -> list[Tensor]:
        """All that compiled code may read from or write to."""
        return [*self.tensors(), *self.views]

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        unmodified = self.unmodified()
        super().move(to)
        self.version = self.buffer._version if unmodified else -1  # -1: never again


def weighted(
    rows: list[Tensor],
    weights: Sequence[float],
    base: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """base + sum weights * rows in one launch, and one more per seven terms beyond eight; without a base the sum
    alone, also into `out`, which may be one of the rows.

    rows: of one buffer. base: of their shape, or of the end of their batch.
    """
    if base is not None:
        rows = [fitting(row, base) for row in rows]
        out = torch.empty_like(rows[0], dtype=dtype)
        if len(rows) == 1 and weights[0] == 1.0:
            _apply(out, base, rows[0])
            return out
        terms, factors = [base, *rows], [1.0, *weights]
    else:
        if out is None:
            out = torch.empty_like(rows[0], dtype=dtype)
        terms, factors = list(rows), list(weights)
    if 0.0 in factors:
        used = [i for i, w in enumerate(factors) if w != 0.0] or [0]
        terms, factors = [terms[i] for i in used], [factors[i] for i in used]
    if len(terms) <= KERNEL_TERMS:
        _combine(out, terms, factors)
    else:
        in_passes(_combine, KERNEL_TERMS, out, terms, factors)
    return out
