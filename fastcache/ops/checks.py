# SPDX-License-Identifier: Apache-2.0
"""Arguments of the ops, checked: each error names the argument, what came and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_TERMS = 5


def check(op: str, **tensors: Any) -> None:
    """Raise a TypeError or ValueError that names the argument unless all agree with the first."""
    first_name, first = next(iter(tensors.items()))
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is {type(t).__name__}, must be a torch.Tensor")
        if t.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} is {t.dtype}, must be float32, float16 or bfloat16")
        if t.layout != torch.strided:
            raise TypeError(f"{op}: {name} has layout {t.layout}, must be a dense tensor")
        if t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: {name} requires grad, and this op has no backward: call it under torch.no_grad() "
                f"or pass {name}.detach()"
            )
        if t is first:
            continue
        if t.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} is {t.dtype}, {first_name} is {first.dtype}; they must agree"
            )
        if t.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {t.device}, {first_name} on {first.device}; they must agree"
            )
        if t.shape != first.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(t.shape)}, {first_name} has {tuple(first.shape)}; they must agree"
            )


def check_out(op: str, out: Tensor, **inputs: Tensor) -> None:
    """Refuse outputs whose elements overlap each other, or that partly overlap an input; one may be it."""
    if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
        raise ValueError(
            f"{op}: out is an expanded view, its elements share memory; pass a tensor of its own"
        )
    if torch.compiler.is_compiling():  # where tensors lie is not known there
        return
    for name, t in inputs.items():
        if overlap(out, t):
            raise ValueError(
                f"{op}: out partly overlaps {name}, which would be read after it was overwritten; pass {name} "
                "itself, or a tensor of its own"
            )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share some elements but are not one and the same view.

    Views of different strides count as sharing where the ranges that they span do.
    """
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or not (a.numel() and b.numel()):
        return False
    widths = a.element_size(), b.element_size()
    (start, end), (from_, to) = (
        (t.storage_offset() * w, (t.storage_offset() + _span(t)) * w)
        for t, w in zip((a, b), widths, strict=True)
    )
    if end <= from_ or to <= start:
        return False
    if (a.shape, a.stride(), widths[0]) != (b.shape, b.stride(), widths[1]):
        return True
    if start == from_:
        return False
    dims = sorted(zip(a.stride(), a.shape, strict=True), reverse=True)
    return _reaches(abs(int(a.storage_offset()) - int(b.storage_offset())), dims)


def _span(t: Tensor) -> int:
    """Elements from the first one of a view to behind its last one."""
    return 1 + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))


def _reaches(distance: int, dims: Sequence[tuple[int, int]]) -> bool:
    """Whether two elements of one view lie this far apart. dims: (stride, size), largest stride first."""
    if not dims:
        return distance == 0
    (stride, size), *rest = dims
    most = sum(s * (n - 1) for s, n in rest)
    if not stride:
        return _reaches(distance, rest)
    first, last = -((most - distance) // stride), (distance + most) // stride
    steps = range(max(first, 1 - size), min(last, size - 1) + 1)
    return any(_reaches(distance - k * stride, rest) for k in steps)


def check_samples(op: str, y: Tensor, per_sample: bool) -> None:
    if per_sample and y.dim() < (3 if op == "residual_magnitude" else 2):
        raise ValueError(
            f"{op}: per_sample needs a batch dimension before the tokens, y is {tuple(y.shape)}"
        )
