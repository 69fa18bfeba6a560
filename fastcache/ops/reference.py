# SPDX-License-Identifier: Apache-2.0
"""The eager definition of every op: what the C++, Triton and CUDA kernels must compute.

Shortest correct PyTorch, no speed tricks. Every function works on any device and any strides; `ops.py`
has checked its arguments. Arithmetic is float32 (float64 of float64 values, and in reductions), inputs are
read in their storage dtype and every output is rounded once, to the nearest even value of its own dtype.

A residual r = y - x is rounded to the dtype it is stored in *before* it is compared with another one:
that is the value a later step will read.

Letters are those of the README: y is what a block returned, x what went into it, r their difference,
prev the residual of an earlier step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .solve import exponential_solve as exponential_solve
from .solve import guided_check as guided_check
from .solve import guided_solve as guided_solve


def _wide(t: Tensor, like: Tensor | None = None) -> Tensor:
    """In the precision of the arithmetic: float64 where values such as `like` (or it itself) are, else float32."""
    like = t if like is None else like
    return t.double() if like.dtype == torch.float64 else t.float()


def _residual(y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    return (_wide(y) - _wide(x)).to(dtype)


def _samples(t: Tensor, per_sample: bool) -> Tensor:
    """[B, ...] as [B, n / B], or as [1, n] for the whole batch."""
    return (
        t.reshape(t.shape[0], t[0].numel() if t.shape[0] else 0) if per_sample else t.reshape(1, -1)
    )


def residual_l1(
    y: Tensor,
    x: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    per_sample: bool = False,
    sums: Tensor | None = None,
) -> Tensor:
    """float32 [2]: sum |r - prev| and sum |prev|; [B, 2] per sample, in `sums` if given. `out` receives r."""
    r = _residual(y, x, prev.dtype)
    old = _wide(prev)
    change = (_wide(r) - old).abs()
    both = torch.stack(
        [_samples(v, per_sample).sum(dim=1, dtype=torch.float64) for v in (change, old.abs())],
        dim=1,
    ).float()
    if out is not None:
        out.copy_(r)
    result = both if per_sample else both[0]
    return result if sums is None else sums.copy_(result)


def modulated_l1(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """float32 [2]: sum |m - prev| and sum |prev|, m = LN(x) * (1 + scale) + shift. `out` receives m."""
    normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps)
    m = (normed * (1 + scale.float()) + shift.float()).to(prev.dtype)
    old = prev.float()
    sums = [v.abs().sum(dtype=torch.float64) for v in (m.float() - old, old)]
    if out is not None:
        out.copy_(m)
    return torch.stack(sums).float()


def residual_magnitude(
    y: Tensor,
    x: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    eps: float = 1e-8,
    per_sample: bool = False,
    mean: Tensor | None = None,
) -> Tensor:
    """float32 [1], in `mean` if given: mean over tokens of |r|_2 / (|prev|_2 + eps); [B, 1] per sample.

    Norms are over the last dimension. `out` receives r.
    """
    r = _residual(y, x, prev.dtype)
    ratio = r.double().norm(dim=-1) / (prev.double().norm(dim=-1) + eps)
    means = _samples(ratio, per_sample).mean(dim=1, keepdim=True).float()
    if out is not None:
        out.copy_(r)
    result = means if per_sample else means[0]
    return result if mean is None else mean.copy_(result)


def residual_store(out: Tensor, y: Tensor, x: Tensor) -> None:
    """out <- y - x."""
    out.copy_(_residual(y, x, out.dtype))


def residual_apply(out: Tensor, x: Tensor, r: Tensor) -> None:
    """out <- x + r; `out` may be `x`."""
    out.copy_(_wide(x) + _wide(r))


def linear_combine(
    out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float] | Tensor
) -> None:
    """out <- sum_i weights[i] * tensors[i], added in order; `out` may be one of the tensors."""
    total = _wide(tensors[0], out) * weights[0]
    for i in range(1, len(tensors)):
        total = total + _wide(tensors[i], out) * weights[i]
    out.copy_(total)


def combine_samples(out: Tensor, tensors: Sequence[Tensor], weights: Tensor) -> None:
    """out[b] <- sum_i weights[b, i] * tensors[i][b], added in order; `out` may be one of the tensors."""
    each = [column.view(-1, *[1] * (out.dim() - 1)) for column in weights.unbind(1)]
    total = _wide(tensors[0], out) * each[0]
    for i in range(1, len(tensors)):
        total = total + _wide(tensors[i], out) * each[i]
    out.copy_(total)


def taylor_update(factors: Sequence[Tensor], y: Tensor, inv_delta: float, valid: int) -> None:
    """Backward differences in place: f[0] <- y, f[j+1] <- (new f[j] - old f[j]) * inv_delta.

    Only the first `valid` factors held data before the call, so j runs to min(valid, order) - 1. New
    factors enter the next difference unrounded, as diffusers 0.42.1 does. The product is computed as a
    division by 1 / inv_delta, which is exact for whole step gaps.
    """
    new, delta = _wide(y), 1.0 / inv_delta if inv_delta else float("inf")
    for j in range(min(valid, len(factors) - 1)):
        difference = (new - _wide(factors[j], y)) / delta
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
    uncond = _wide(cond) + low * w_low + high * w_high
    out[batch:].copy_(cond)
    out[:batch].copy_(uncond)


def guided_sums(guide: Tensor, guides: Sequence[Tensor], per_sample: bool = False) -> Tensor:
    """float64 [S, M]: with q = guide - g_1 and D_j = g_j - g_(j+1), the sums of D D^T, D q and q.q.

    guide: of the current step; guides: g_1 (newest) .. g_(K+1), K = 1 to 3, any strides. S is 1, or the
    batch per sample. Order: upper triangle of D D^T row by row, D q, q.q; M = 3, 6 or 10.
    """
    now, *held = (_samples(t.double(), per_sample) for t in (guide, *guides))
    q, d = now - held[0], [a - b for a, b in pairwise(held)]
    pairs = [(a, b) for i, a in enumerate(d) for b in d[i:]] + [(a, q) for a in d] + [(q, q)]
    return torch.stack([(a * b).sum(dim=1) for a, b in pairs], dim=1)


def quantize_store(q: Tensor, scale: Tensor, y: Tensor, x: Tensor | None = None) -> None:
    """q, scale <- y - x (or y) as float8 e4m3 with one float32 scale per row of the last dimension.

    scale = max |r| / 448 of the row, 1 below 2**-117.
    """
    r = (_wide(y) if x is None else _wide(y) - _wide(x)).float()
    largest = r.abs().amax(dim=-1)
    scale.copy_(torch.where(largest < 2.0**-117, 1.0, largest / 448))
    q.copy_((r * (1 / scale)[..., None]).to(torch.float8_e4m3fn))


def quantized_combine(
    out: Tensor,
    base: Tensor | None,
    qs: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
) -> None:
    """out <- base + sum_i (weights[i] * scales[i]) * qs[i], added in order; base may be None."""
    total = torch.zeros(out.shape, device=out.device) if base is None else _wide(base)
    for i, (q, scale) in enumerate(zip(qs, scales, strict=True)):
        total = total + q.float() * (scale * weights[i])[..., None]
    out.copy_(total)
