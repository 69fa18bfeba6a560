# SPDX-License-Identifier: Apache-2.0
"""cache-dit's Taylor calibrator: its table refreshed in one pass, and read as a weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...ops import direct

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
combine = direct("linear_combine_")
refresh = direct("taylor_update_")


class Table(list[Tensor | None]):
    """The factors of a state as cache-dit reads them, None where there is nothing yet; all rows are our own."""

    def __init__(self, like: Tensor, order: int) -> None:
        super().__init__([None] * order)
        self.rows = [torch.empty_like(like) for _ in range(order)]

    def show(self, valid: int) -> None:
        self[:] = [*self.rows[:valid], *[None] * (len(self.rows) - valid)]


def fits(*tensors: Any) -> bool:
    """Whether our kernels take these tensors together: plain ones of one shape, dtype and device, without gradients."""
    first, *others = tensors
    if type(first) is not Tensor or first.dtype not in DTYPES:
        return False
    dtype, shape, place = first.dtype, first.shape, first.get_device()
    for t in others:
        if (
            type(t) is not Tensor
            or t.dtype is not dtype
            or t.shape != shape
            or t.get_device() != place  # its number: its device would be a new object
        ):
            return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def terms(state: Any) -> tuple[list[Any], list[float]]:
    """The factors of a state's forecast for its current step, and their weights."""
    elapsed = state.current_step - state.last_non_approximated_step
    factors = []
    for factor in state.state["dY_current"]:
        if factor is None:
            break
        factors.append(factor)
    return factors, [elapsed**i / math.factorial(i) for i in range(len(factors))]


def update(theirs: Any) -> Callable[[Any, Any], None]:
    """`TaylorSeerState.update` that refreshes the table in place."""

    def refreshed(self: Any, Y: Any) -> None:
        window = self.current_step - self.last_non_approximated_step
        if type(Y) is not Tensor or not fits(Y) or (window == 0 and self.current_step > 1):
            theirs.update(self, Y)
            return
        known = [t for t in self.state["dY_current"] if t is not None]
        if known and known[0].shape != Y.shape:
            self.reset()
            known = []
        table = self.state["dY_current"]
        valid = len(known) if self.current_step > 1 else 0
        if type(table) is not Table or (known and not fits(Y, *known)):
            table = Table(Y, self.order)
            for row, factor in zip(table.rows, known, strict=False):
                row.copy_(factor)
        refresh(table.rows, Y, 1 / window if valid else 0.0, valid)
        table.show(min(valid, self.n_derivatives) + 1)
        self.state["dY_prev"] = [None] * self.order
        self.state["dY_current"] = table
        self.last_non_approximated_step = self.current_step

    return refreshed


def approximate(theirs: Any) -> Callable[[Any], Any]:
    """`TaylorSeerState.approximate` as one weighted sum."""

    def summed(self: Any) -> Any:
        factors, weights = terms(self)
        if not factors or not fits(*factors):
            return theirs.approximate(self)
        out = torch.empty_like(factors[0])
        combine(out, factors, weights)
        return out

    return summed
