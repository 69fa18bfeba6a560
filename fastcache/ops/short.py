# SPDX-License-Identifier: Apache-2.0
"""The way of an op to its kernel on CPUs where nothing traces, watches or forces another one: one function each.

A reused step calls each of them once, when the model has just pushed all of it out of the processor's caches, so that
every function on the way costs more than the kernel of a small tensor, and torch's dispatcher ten times as much. What
is called here takes addresses and checks nothing, so all checks are here; whatever is unusual takes the general way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import AUTO, at_once, forced

traced, modes = torch.compiler.is_dynamo_compiling, torch._C._len_torch_dispatch_stack
empty_like, FLOAT, CPU = torch.empty_like, torch.float32, torch.device("cpu")


Change = Callable[..., "float | None"]


def change_against(prev: Tensor) -> Change:
    """What gives the first sum of `residual_l1` over the second, on the host, for (y, x) against this tensor.

    What the tensor is, is asked for now and not with every change: it has to stay as it is. The function returns None
    for what takes the general way, NaN or infinity where the second sum is zero; a third argument receives both sums.
    Not for traced code.
    """
    run = None
    if type(prev) is Tensor and prev.is_cpu and prev.is_contiguous() and prev.numel():
        run = at_once("residual_l1", prev.dtype)
    if run is None:
        return lambda y, x, sums=None: None
    dtype, shape, kernel = prev.dtype, prev.shape, run

    def change(y: Tensor, x: Tensor, sums: Tensor | None = None) -> float | None:
        if (
            not modes()
            and type(y) is Tensor
            and type(x) is Tensor
            and y.is_cpu
            and x.is_cpu
            and forced() == AUTO
            and y.dtype is dtype
            and x.dtype is dtype
            and y.shape == shape
            and x.shape == shape
            and y.is_contiguous()
            and x.is_contiguous()
        ):
            found: float = kernel(sums, y, x, prev)
            return found
        return None

    return change


def residual_l1(general: Callable[..., Any]) -> Callable[..., Any]:
    def call(y: Tensor, x: Tensor, prev: Tensor, per_sample: bool = False) -> Any:
        if not traced() and y.is_cpu and y.numel():
            sums = torch.empty((y.shape[0], 2) if per_sample else 2, device=CPU, dtype=FLOAT)
            if change_against(prev)(y, x, sums) is not None:
                return sums
        return general(y, x, prev, per_sample)

    return call


def linear_combine_(general: Callable[..., Any]) -> Callable[..., Any]:
    def call(out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> Any:
        if not (traced() or modes()) and type(out) is Tensor and out.is_cpu and forced() == AUTO:
            dtype, shape = out.dtype, out.shape
            for t in tensors:
                if (
                    type(t) is not Tensor
                    or t.dtype is not dtype
                    or t.shape != shape
                    or not t.is_contiguous()
                    or not t.is_cpu
                ):
                    break
            else:
                run = at_once("linear_combine", dtype)
                alike = len(tensors) == len(weights) <= TERMS
                if run and alike and out.is_contiguous() and out.numel():
                    return run(out, tensors, weights)
        return general(out, tensors, weights)

    return call


def sum_over(held: Sequence[Tensor], dtype: torch.dtype) -> Callable[..., Tensor | None]:
    """What gives base + sum weights * rows, in this dtype, for (base, rows, weights), the rows being some of these.

    All of these are as the first one is, of one buffer. The function returns None for what takes the general way. Not
    for traced code.
    """
    row, run = held[0], None
    if type(row) is Tensor and row.is_cpu and row.is_contiguous() and row.numel():
        fits = row.dtype is dtype and len(held) < TERMS
        run = at_once("linear_combine", dtype) if fits else None
    if run is None:
        return lambda base, rows, weights: None
    shape, kernel = row.shape, run

    def added(base: Tensor, rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor | None:
        if (
            not modes()
            and type(base) is Tensor
            and base.is_cpu
            and forced() == AUTO
            and base.dtype is dtype
            and base.shape == shape
            and base.is_contiguous()
            and 0.0 not in weights
        ):
            out = empty_like(base)
            kernel(out, (base, *rows), (1.0, *weights))
            return out
        return None

    return added


TERMS = 8  # that a kernel takes
# by the name of the op; each takes the general way, and returns a function with the op's arguments
SHORT: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "residual_l1": residual_l1,
    "linear_combine_": linear_combine_,
}
