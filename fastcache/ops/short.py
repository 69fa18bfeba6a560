# SPDX-License-Identifier: Apache-2.0
"""The way of an op to its kernel on CPUs where nothing traces, watches or forces another one: one function each.

A reused step calls each of them once, when the model has just pushed all of it out of the processor's caches, so that
every function on the way costs more than the kernel of a small tensor, and torch's dispatcher ten times as much. What
is called here takes addresses and checks nothing, so all checks are here; whatever is unusual takes the general way.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .alike import Alike, alike, never
from .dispatch import AUTO, at_once, forced

traced, modes = torch.compiler.is_dynamo_compiling, torch._C._len_torch_dispatch_stack
empty_like, FLOAT, CPU = torch.empty_like, torch.float32, torch.device("cpu")


TERMS = 8  # that a kernel takes
# What does not change from step to step, as csrc/cpu/ops.cpp has it: number of the dtype, elements of a sample,
# samples, addresses of the sums, or 0, and of the tensor that is compared with;
held_change = struct.Struct("5q").pack
# number of the dtype, elements, number of terms and addresses of all but the first; and the weights: by that number.
held_sum = [struct.Struct(f"{2 + count}q").pack for count in range(TERMS + 1)]
factors = [struct.Struct(f"{count}d").pack for count in range(TERMS + 1)]

Change = Callable[..., "float | None"]


def fits(t: Any, like: Tensor) -> bool:
    """Whether a tensor may be handed to a kernel beside this one, which is contiguous and on the CPU."""
    return (
        type(t) is Tensor
        and t.is_cpu
        and t.dtype is like.dtype
        and t.shape == like.shape
        and t.is_contiguous()
    )


def takes(prev: Any) -> bool:
    """Whether it is a tensor that a kernel may get."""
    return type(prev) is Tensor and prev.is_cpu and prev.is_contiguous() and bool(prev.numel())


def change_against(prev: Tensor) -> Change:
    """What gives the first sum of `residual_l1` over the second, on the host, for (y, x) against this tensor.

    What the tensor is, is asked for now and not with every change: it has to stay as it is. The function returns None
    for what takes the general way, NaN or infinity where the second sum is zero. Not for traced code.
    """
    found = at_once("residual_l1", prev.dtype) if takes(prev) else None
    if found is None:
        return lambda y, x: None
    run, code = found
    held = held_change(code, prev.numel(), 1, 0, prev.data_ptr())
    known: Alike = never

    def change(y: Tensor, x: Tensor) -> float | None:
        nonlocal known
        if forced() != AUTO:
            return None
        if not known(y, x):
            if modes() or not (fits(y, prev) and fits(x, prev)):
                return None
            if known is never:
                known = alike(y, x, strides=True)
        ratio: float = run(held, y.data_ptr(), x.data_ptr())
        return ratio

    return change


def residual_l1(general: Callable[..., Any]) -> Callable[..., Any]:
    def call(y: Tensor, x: Tensor, prev: Tensor, per_sample: bool = False) -> Any:
        usual = not (traced() or modes()) and forced() == AUTO
        if usual and takes(prev) and fits(y, prev) and fits(x, prev):
            found, count = at_once("residual_l1", prev.dtype), y.shape[0] if per_sample else 1
            if found is not None:
                run, code = found
                sums = torch.empty((count, 2) if per_sample else 2, device=CPU, dtype=FLOAT)
                places = sums.data_ptr(), prev.data_ptr()
                held = held_change(code, prev.numel() // count, count, *places)
                run(held, y.data_ptr(), x.data_ptr())
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
                found, count = at_once("linear_combine", dtype), len(tensors)
                alike = count == len(weights) <= TERMS
                if found and alike and out.is_contiguous() and out.numel():
                    run, code = found
                    first, *others = [t.data_ptr() for t in tensors]
                    held = held_sum[count](code, out.numel(), count, *others)
                    return run(held, factors[count](*weights), out.data_ptr(), first)
        return general(out, tensors, weights)

    return call


def sum_over(held: Sequence[Tensor], dtype: torch.dtype) -> Callable[..., Tensor | None]:
    """What gives base + sum weights * rows, in this dtype, for (base, numbers of rows among these, weights).

    All of these are as the first one is, of one buffer, and stay where they are. The function returns None for what
    takes the general way. Not for traced code.
    """
    row = held[0]
    alone = takes(row) and row.dtype is dtype and len(held) < TERMS
    found = at_once("linear_combine", dtype) if alone else None
    if found is None:
        return lambda base, rows, weights: None
    run, code = found
    known: Alike = never
    terms: Sequence[int] = ()  # those of the last sum
    places = b""

    def added(base: Tensor, rows: Sequence[int], weights: Sequence[float]) -> Tensor | None:
        nonlocal known, terms, places
        if forced() != AUTO or 0.0 in weights:
            return None
        if not known(base):
            if modes() or not fits(base, row):
                return None
            if known is never:
                known = alike(base, strides=True)
        if rows != terms:
            terms, count = rows, 1 + len(rows)
            others = [held[r].data_ptr() for r in rows]
            places = held_sum[count](code, row.numel(), count, *others)
        out = empty_like(base)
        run(places, factors[1 + len(rows)](1.0, *weights), out.data_ptr(), base.data_ptr())
        return out

    return added


# by the name of the op; each takes the general way, and returns a function with the op's arguments
SHORT: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "residual_l1": residual_l1,
    "linear_combine_": linear_combine_,
}
