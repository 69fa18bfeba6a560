"""The eager definition of every op: what the C++, Triton and CUDA kernels must compute.

Shortest correct PyTorch, no speed tricks. Every function works on any device and any strides; `ops.py`
has checked its arguments. Arithmetic is float32 (reductions float64), inputs are read in their storage
dtype and every output is rounded once, to the nearest even value of its own dtype.

A residual r = y - x is rounded to the dtype it is stored in *before* it is compared with another one:
that is the value a later step will read.

Letters are those of the README: y is what a block returned, x what went into it, r their difference,
prev the residual of an earlier step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _residual(y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return (y.float() - x.float()).to(dtype)


def _samples(t: Tensor, per_sample: bool) -> Tensor:
    """[B, ...] as [B, n / B], or as [1, n] for the whole batch."""
    return t.reshape(t.shape[0], t[0].numel() if t.shape[0] else 0) if per_sample else t.reshape(1, -1)


def residual_l1(
    y: Tensor, x: Tensor, prev: Tensor, out: Tensor | None = None, per_sample: bool = False
) -> Tensor:
    """float32 [2]: sum |r - prev| and sum |prev|; [B, 2] per sample. `out` receives r."""
    r = _residual(y, x, prev.dtype)
    old = prev.float()
    change = (r.float() - old).abs()
    sums = torch.stack(
        [_samples(v, per_sample).sum(dim=1, dtype=torch.float64) for v in (change, old.abs())], dim=1
    ).float()
    if out is not None:
        out.copy_(r)
    return sums if per_sample else sums[0]


def residual_magnitude(
    y: Tensor,
    x: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    eps: float = 1e-8,
    per_sample: bool = False,
) -> Tensor:
    """float32 [1]: mean over tokens of |r|_2 / (|prev|_2 + eps), norms over the last dimension; [B, 1] per sample."""
    r = _residual(y, x, prev.dtype)
    ratio = r.double().norm(dim=-1) / (prev.double().norm(dim=-1) + eps)
    mean = _samples(ratio, per_sample).mean(dim=1, keepdim=True).float()
    if out is not None:
        out.copy_(r)
    return mean if per_sample else mean[0]


def residual_store(out: Tensor, y: Tensor, x: Tensor) -> None:
    """out <- y - x."""
    out.copy_(_residual(y, x, out.dtype))


def residual_apply(out: Tensor, x: Tensor, r: Tensor) -> None:
    """out <- x + r; `out` may be `x`."""
    out.copy_(x.float() + r.float())


def linear_combine(out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float] | Tensor) -> None:
    """out <- sum_i weights[i] * tensors[i], added in order; `out` may be one of the tensors."""
    total = tensors[0].float() * weights[0]
    for i in range(1, len(tensors)):
        total = total + tensors[i].float() * weights[i]
    out.copy_(total)


def taylor_update(factors: Sequence[Tensor], y: Tensor, inv_delta: float, valid: int) -> None:
    """Backward differences in place: f[0] <- y, f[j+1] <- (new f[j] - old f[j]) * inv_delta.

    Only the first `valid` factors held data before the call, so j runs to min(valid, order) - 1. New
    factors enter the next difference unrounded, as diffusers 0.42.1 does. The product is computed as a
    division by 1 / inv_delta, which is exact for whole step gaps.
    """
    new, delta = y.float(), 1.0 / inv_delta if inv_delta else float("inf")
    for j in range(min(valid, len(factors) - 1)):
        difference = (new - factors[j].float()) / delta
        factors[j].copy_(new)
        new = difference
    factors[min(valid, len(factors) - 1)].copy_(new)


def guidance_combine(
    out: Tensor, cond: Tensor, low: Tensor, high: Tensor, w_low: float, w_high: float
) -> None:
    """out <- [cond + w_low * low + w_high * high ; cond] along dimension 0.

    out: [2B, ...], cond: [B, ...] of the same dtype; low, high: [B, ...] float32, the low and high
    frequency parts of unconditional - conditional at the last full step. FasterCache (arXiv 2410.19355)
    without the Fourier transforms: its mask is a linear projector, so the parts add up in real space.
    """
    batch = cond.shape[0]
    uncond = cond.float() + low * w_low + high * w_high
    out[batch:].copy_(cond)
    out[:batch].copy_(uncond)
