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
                    t.dtype is not dtype
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


def base_and_rows(
    base: Tensor, rows: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype
) -> Tensor | None:
    """base + sum weights * rows, in this dtype; None where that takes the general way.

    rows: as many as weights, of one buffer: what the first one is, all of them are. Not for traced code.
    """
    if (
        not modes()
        and type(base) is Tensor
        and base.is_cpu
        and forced() == AUTO
        and base.dtype is dtype
        and (row := rows[0]).dtype is dtype
        and row.is_cpu
        and base.shape == row.shape
        and base.is_contiguous()
        and row.is_contiguous()
        and len(rows) < TERMS
        and 0.0 not in weights
        and (run := at_once("linear_combine", dtype))
        and base.numel()
    ):
        out = empty_like(base)
        run(out, (base, *rows), (1.0, *weights))
        return out
    return None


TERMS = 8  # that a kernel takes
# by the name of the op; each takes the general way, and returns a function with the op's arguments
SHORT: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "residual_l1": residual_l1,
    "linear_combine_": linear_combine_,
}
