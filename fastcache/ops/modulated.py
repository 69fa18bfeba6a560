# SPDX-License-Identifier: Apache-2.0
"""The change of a block's timestep-modulated input."""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .checks import check, check_out
from .registry import define, same_shapes


def _modulated_l1(x: Tensor, scale: Tensor, shift: Tensor, prev: Tensor, eps: float) -> Tensor:
    run, (x, prev) = dispatch.resolve("modulated_l1", [x, prev])
    return run(x, scale, shift, prev, None, eps)


def _fake_modulated_l1(x: Tensor, scale: Tensor, shift: Tensor, prev: Tensor, eps: float) -> Tensor:
    same_shapes("modulated_l1", x, prev)
    return x.new_empty(2, dtype=torch.float32)


define(
    "modulated_l1(Tensor x, Tensor scale, Tensor shift, Tensor prev, float eps) -> Tensor",
    _modulated_l1,
    _fake_modulated_l1,
)


def _modulated_l1_(
    out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, prev: Tensor, eps: float
) -> Tensor:
    run, (x, prev, out) = dispatch.resolve("modulated_l1", [x, prev, out], 1)
    return run(x, scale, shift, prev, out, eps)


def _fake_modulated_l1_(
    out: Tensor, x: Tensor, scale: Tensor, shift: Tensor, prev: Tensor, eps: float
) -> Tensor:
    same_shapes("modulated_l1_", x, prev, out)
    return x.new_empty(2, dtype=torch.float32)


define(
    "modulated_l1_(Tensor(a!) out, Tensor x, Tensor scale, Tensor shift, Tensor prev, float eps) -> Tensor",
    _modulated_l1_,
    _fake_modulated_l1_,
)


def modulated_l1(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Sums of |m - prev| and |prev| for m = LN(x) * (1 + scale) + shift, rounded to the storage dtype.

    Args:
        x, prev: [B, T, C], hidden states and an earlier m, of one dtype (float32, float16, bfloat16) and device.
        scale, shift: [B, C], or [B, T, C] with one row per token (1 for B or T where all share it); of the dtype of x,
            or float32 beside any.
        out: [B, T, C], receives m; may be `prev`; None: m is not kept.
        eps: of LN, which is over C and has no weights of its own.
    Returns:
        float32 [2]; the first over the second is TeaCache's relative L1 change.
    Raises:
        TypeError, ValueError: that names the argument.
    Source: TeaCache (arXiv 2411.19108).
    """
    stored = {} if out is None else {"out": out}
    check("modulated_l1", x=x, prev=prev, **stored)
    if x.dim() != 3:
        raise ValueError(f"modulated_l1: x is {tuple(x.shape)}, must be [B, T, C]")
    rows = [_rows(x, name, value) for name, value in (("scale", scale), ("shift", shift))]
    scale, shift = rows
    if out is None:
        return torch.ops.fastcache.modulated_l1.default(x, scale, shift, prev, eps)
    check_out("modulated_l1", out, x=x, scale=scale, shift=shift, prev=prev)
    return torch.ops.fastcache.modulated_l1_.default(out, x, scale, shift, prev, eps)


def _rows(x: Tensor, name: str, value: Tensor) -> Tensor:
    """A modulation as [B or 1, T or 1, C]."""
    if isinstance(value, Tensor) and value.dim() == 2:
        value = value[:, None]
    if isinstance(value, Tensor):
        fits = value.dim() == 3 and all(
            n in (1, m) for n, m in zip(value.shape, x.shape, strict=True)
        )
        if not fits or value.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"modulated_l1: {name} has shape {tuple(value.shape)}, must be [B, C] or [B, T, C] for x of "
                f"{tuple(x.shape)}"
            )
    shown = value
    if isinstance(value, Tensor):
        shown = (value.to(x.dtype) if value.dtype == torch.float32 else value).expand(x.shape)
    check("modulated_l1", **{"x": x, name: shown})
    return value
