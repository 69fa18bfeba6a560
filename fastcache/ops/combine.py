# SPDX-License-Identifier: Apache-2.0
"""Weighted sums: predictions, the Taylor table, the halves of a guidance batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .checks import MAX_TERMS, check, check_out
from .registry import define, same_shapes


def _linear_combine_(out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> None:
    run, (*terms, out) = dispatch.resolve("linear_combine", [*tensors, out], 1)
    run(out, terms, weights)


def _fake_linear_combine_(out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float]) -> None:
    torch._check(
        len(tensors) == len(weights), lambda: f"{len(tensors)} tensors, {len(weights)} weights"
    )
    same_shapes("linear_combine_", out, *tensors)


define(
    "linear_combine_(Tensor(a!) out, Tensor[] tensors, float[] weights) -> ()",
    _linear_combine_,
    _fake_linear_combine_,
)


def _linear_combine_device_(out: Tensor, tensors: Sequence[Tensor], weights: Tensor) -> None:
    run, (*terms, out) = dispatch.resolve("linear_combine", [*tensors, out], 1)
    run(out, terms, weights.contiguous())


def _fake_linear_combine_device_(out: Tensor, tensors: Sequence[Tensor], weights: Tensor) -> None:
    torch._check(
        weights.numel() == len(tensors),
        lambda: f"{len(tensors)} tensors, {weights.numel()} weights",
    )
    same_shapes("linear_combine_device_", out, *tensors)


define(
    "linear_combine_device_(Tensor(a!) out, Tensor[] tensors, Tensor weights) -> ()",
    _linear_combine_device_,
    _fake_linear_combine_device_,
)


def _linear_combine_samples_(out: Tensor, tensors: Sequence[Tensor], weights: Tensor) -> None:
    run, (*terms, out) = dispatch.resolve("combine_samples", [*tensors, out], 1, per_sample=True)
    run(out, terms, weights.contiguous())


def _fake_linear_combine_samples_(out: Tensor, tensors: Sequence[Tensor], weights: Tensor) -> None:
    torch._check(
        weights.shape == (out.shape[0], len(tensors)),
        lambda: f"{len(tensors)} tensors of {out.shape[0]} samples, weights {tuple(weights.shape)}",
    )
    same_shapes("linear_combine_samples_", out, *tensors)


define(
    "linear_combine_samples_(Tensor(a!) out, Tensor[] tensors, Tensor weights) -> ()",
    _linear_combine_samples_,
    _fake_linear_combine_samples_,
)


def _taylor_update_(factors: Sequence[Tensor], y: Tensor, inv_delta: float, valid: int) -> None:
    run, (y, *table) = dispatch.resolve("taylor_update", [y, *factors], len(factors))
    run(table, y, inv_delta, valid)


def _fake_taylor_update_(
    factors: Sequence[Tensor], y: Tensor, inv_delta: float, valid: int
) -> None:
    same_shapes("taylor_update_", y, *factors)


define(
    "taylor_update_(Tensor(a!)[] factors, Tensor y, float inv_delta, int valid) -> ()",
    _taylor_update_,
    _fake_taylor_update_,
)


def _guidance_combine_(
    out: Tensor, cond: Tensor, low: Tensor, high: Tensor, w_low: float, w_high: float
) -> None:
    half = out[: cond.shape[0]]  # of the shape of the others; the second one lies like it
    run, (cond, low, high, _) = dispatch.resolve("guidance_combine", [cond, low, high, half], 1)
    run(out, cond, low, high, w_low, w_high)


def _fake_guidance_combine_(
    out: Tensor, cond: Tensor, low: Tensor, high: Tensor, w_low: float, w_high: float
) -> None:
    same_shapes("guidance_combine_", cond, low, high)
    torch._check(
        out.shape[0] == 2 * cond.shape[0],
        lambda: f"out {tuple(out.shape)}, cond {tuple(cond.shape)}",
    )


define(
    "guidance_combine_(Tensor(a!) out, Tensor cond, Tensor low, Tensor high, float w_low, float w_high) -> ()",
    _guidance_combine_,
    _fake_guidance_combine_,
)


def linear_combine(
    tensors: Sequence[Tensor], weights: Sequence[float] | Tensor, out: Tensor | None = None
) -> Tensor:
    """sum_i weights[i] * tensors[i], accumulated in float32 and rounded once.

    Args:
        tensors: K of them, 1 to `MAX_TERMS`, of one shape, dtype and device.
        weights: K Python floats, or a float32 tensor [K] on the same device (nothing is read back); [B, K] gives each
            of the B samples, along dimension 0 of the tensors, weights of its own.
        out: of the same shape, to write into; may be one of the tensors; None: a new tensor.
    Returns:
        The sum: `out` where it is given.
    Raises:
        TypeError, ValueError: that names the argument.
    """
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(
            f"linear_combine: tensors is {type(tensors).__name__}, must be a list of tensors"
        )
    if not 1 <= len(tensors) <= MAX_TERMS:
        raise ValueError(
            f"linear_combine: tensors has {len(tensors)} entries, must have 1 to {MAX_TERMS}"
        )
    named = {f"tensors[{i}]": t for i, t in enumerate(tensors)}
    check("linear_combine", **named, **({} if out is None else {"out": out}))
    first = tensors[0]
    given: Any
    if isinstance(weights, Tensor):
        if weights.dtype != torch.float32:
            raise TypeError(f"linear_combine: weights is {weights.dtype}, must be float32")
        if weights.device != first.device:
            raise ValueError(
                f"linear_combine: weights is on {weights.device}, tensors on {first.device}"
            )
        if weights.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "linear_combine: weights requires grad, and this op has no backward: detach it"
            )
        op = torch.ops.fastcache.linear_combine_device_.default
        count, given = weights.numel() if weights.dim() == 1 else -1, weights
        if weights.dim() == 2 and first.shape[:1] == weights.shape[:1]:
            op, count = torch.ops.fastcache.linear_combine_samples_.default, weights.shape[1]
    elif isinstance(weights, Sequence) and not isinstance(weights, str):
        for i, w in enumerate(weights):
            if isinstance(w, bool) or not isinstance(w, int | float):
                raise TypeError(
                    f"linear_combine: weights[{i}] is {type(w).__name__}, must be a number"
                )
        op, count = torch.ops.fastcache.linear_combine_.default, len(weights)
        given = [float(w) for w in weights]
    else:
        raise TypeError(
            f"linear_combine: weights is {type(weights).__name__}, must be floats or a tensor"
        )
    if count != len(tensors):
        raise ValueError(
            f"linear_combine: weights must be one number for each of the {len(tensors)} tensors, or a tensor "
            f"[samples, {len(tensors)}], got "
            f"{tuple(weights.shape) if isinstance(weights, Tensor) else count}"
        )
    if out is None:
        out = torch.empty_like(first, memory_format=torch.contiguous_format)
    else:
        check_out("linear_combine", out, **named)
    op(out, list(tensors), given)
    return out


def taylor_update_(
    factors: Sequence[Tensor] | Tensor, y: Tensor, inv_delta: float, valid: int
) -> None:
    """Refresh backward differences in place: f[0] <- y, f[j+1] <- (new f[j] - old f[j]) * inv_delta.

    Args:
        factors: K+1 tensors of the shape of y, or one stacked [K+1, ...], written to.
        y: the value of this step.
        inv_delta: 1 / steps since the last refresh.
        valid: 0..K+1, how many factors held data before the call; j runs below min(valid, K).
    Raises:
        TypeError, ValueError: that names the argument.
    Source: TaylorSeer (arXiv 2503.06923).
    """
    if isinstance(factors, Tensor):
        if factors.dim() < 1:
            raise ValueError("taylor_update_: factors is a 0-d tensor, must be [orders + 1, ...]")
        factors = factors.unbind(0)
    if not isinstance(factors, Sequence) or isinstance(factors, str):
        raise TypeError(
            f"taylor_update_: factors is {type(factors).__name__}, must be a list of tensors"
        )
    if not factors:
        raise ValueError("taylor_update_: factors is empty, must hold order + 1 tensors")
    check("taylor_update_", y=y, **{f"factors[{i}]": t for i, t in enumerate(factors)})
    for i, t in enumerate(factors):
        others = {f"factors[{j}]": other for j, other in enumerate(factors[:i])}
        check_out(f"taylor_update_: factors[{i}]", t, y=y, **others)
    if isinstance(inv_delta, bool) or not isinstance(inv_delta, int | float):
        raise TypeError(
            f"taylor_update_: inv_delta is {type(inv_delta).__name__}, must be a number"
        )
    if isinstance(valid, bool) or not isinstance(valid, int):
        raise TypeError(f"taylor_update_: valid is {type(valid).__name__}, must be an int")
    if not 0 <= valid <= len(factors):
        raise ValueError(f"taylor_update_: valid is {valid}, must be in 0..{len(factors)}")
    torch.ops.fastcache.taylor_update_.default(list(factors), y, float(inv_delta), valid)


def guidance_combine(
    cond: Tensor, low: Tensor, high: Tensor, w_low: float, w_high: float, out: Tensor | None = None
) -> Tensor:
    """[cond + w_low * low + w_high * high ; cond] along dimension 0, in one pass.

    Args:
        cond: [B, ...], the conditional half.
        low, high: float32 of the same shape, the frequency parts of (unconditional - conditional) at the last full
            step.
        w_low, w_high: their unitless weights.
        out: [2B, ...] to write into; None: a new tensor.
    Returns:
        [2B, ...], unconditional half first: `out` where it is given.
    Raises:
        TypeError, ValueError: that names the argument.
    Source: FasterCache (arXiv 2410.19355).
    """
    check("guidance_combine", cond=cond)
    check("guidance_combine", low=low, high=high)
    if low.dtype != torch.float32:
        raise TypeError(f"guidance_combine: low is {low.dtype}, must be float32")
    if low.shape != cond.shape or low.device != cond.device:
        raise ValueError(
            f"guidance_combine: low is {tuple(low.shape)} on {low.device}, cond is {tuple(cond.shape)} on "
            f"{cond.device}; they must agree"
        )
    both = (2 * cond.shape[0], *cond.shape[1:])
    if out is None:
        out = cond.new_empty(both)
    else:
        check("guidance_combine", out=out)
        check_out("guidance_combine", out, cond=cond, low=low, high=high)
        if (out.shape, out.dtype, out.device) != (both, cond.dtype, cond.device):
            raise ValueError(
                f"guidance_combine: out is {out.dtype} {tuple(out.shape)} on {out.device}, must be "
                f"{cond.dtype} {both} on {cond.device}"
            )
    torch.ops.fastcache.guidance_combine_.default(out, cond, low, high, float(w_low), float(w_high))
    return out
