# SPDX-License-Identifier: Apache-2.0
"""The way of an op to its kernel on CPUs where nothing traces, watches or forces another one: one function each.

A reused step calls each of them once, when the model has just pushed all of it out of the processor's caches, so that
every function on the way costs more than the kernel of a small tensor. Whatever is unusual takes the general way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import AUTO, at_once, forced

traced, modes = torch.compiler.is_dynamo_compiling, torch._C._len_torch_dispatch_stack
empty, FLOAT, CPU = torch.empty, torch.float32, torch.device("cpu")


def residual_l1(general: Callable[..., Any]) -> Callable[..., Any]:
    def call(y: Tensor, x: Tensor, prev: Tensor, per_sample: bool = False) -> Any:
        if (
            not (traced() or modes())
            and type(y) is Tensor
            and y.is_cpu
            and forced() == AUTO
            and (dtype := y.dtype) is x.dtype
            and dtype is prev.dtype
            and y.is_contiguous()
            and x.is_contiguous()
            and prev.is_contiguous()
            and (run := at_once("residual_l1", dtype))
            and y.numel()
        ):
            sums = empty((y.shape[0], 2) if per_sample else 2, dtype=FLOAT, device=CPU)
            run(sums, y, x, prev, None, per_sample)
            return sums
        return general(y, x, prev, per_sample)

    return call


def linear_combine_(general: Callable[..., Any]) -> Callable[..., Any]:
    def call(out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> Any:
        if not (traced() or modes()) and type(out) is Tensor and out.is_cpu and forced() == AUTO:
            dtype = out.dtype
            for t in tensors:
                if t.dtype is not dtype or not t.is_contiguous():
                    break
            else:
                run = at_once("linear_combine", dtype)
                if run and out.is_contiguous() and out.numel():
                    return run(out, tensors, weights)
        return general(out, tensors, weights)

    return call


# by the name of the op; each takes the general way, and returns a function with the op's arguments
SHORT: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "residual_l1": residual_l1,
    "linear_combine_": linear_combine_,
}
