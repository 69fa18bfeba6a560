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


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


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
    total = _wide(tensors[0]) * weights[0]
    for i in range(1, len(tensors)):
        total = total + _wide(tensors[i]) * weights[i]
    out.copy_(total)


def taylor_update(factors: Sequence[Tensor], y: Tensor, inv_delta: float, valid: int) -> None:
    """Backward differences in place: f[0] <- y, f[j+1] <- (new f[j] - old f[j]) * inv_delta.

    Only the first `valid` factors held data before the call, so j runs to min(valid, order) - 1. New
    factors enter the next difference unrounded, as diffusers 0.42.1 does. The product is computed as a
    division by 1 / inv_delta, which is exact for whole step gaps.
    """
    new, delta = _wide(y), 1.0 / inv_delta if inv_delta else float("inf")
    for j in range(min(valid, len(factors) - 1)):
        difference = (new - _wide(factors[j])) / delta
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

    guide: of the current step; guides: g_1 (newest) .. g_(K+1), K = 1 or 2, any strides. S is 1, or the
    batch per sample. Order: upper triangle of D D^T row by row, D q, q.q; M = 3 or 6.
    """
    now, *held = (_samples(t.double(), per_sample) for t in (guide, *guides))
    q, d = now - held[0], [a - b for a, b in pairwise(held)]
    pairs = [(a, b) for i, a in enumerate(d) for b in d[i:]] + [(a, q) for a in d] + [(q, q)]
    return torch.stack([(a * b).sum(dim=1) for a, b in pairs], dim=1)


def guided_solve(
    sums: Tensor, prior: Tensor, ridge: float, base: bool = False
) -> tuple[Tensor, Tensor]:
    """float32 (weights [S, K + 1], misfit [S]) from `guided_sums`: w solves the ridge system.

    (D D^T + ridge * tr * I) w = D q + ridge * tr * prior, tr the mean diagonal of D D^T. Weights belong
    to the cached values R_1 .. R_(K+1): 1 + w_1, w_2 - w_1, .., -w_K; with `base` a 1.0 precedes them.
    misfit = |q - sum w_j D_j| / |q|. A singular or non-finite history falls back to the prior.
    """
    k = prior.numel()
    upper, dq, qq = (
        sums[:, : k * (k + 1) // 2].double(),
        sums[:, -k - 1 : -1].double(),
        sums[:, -1].double(),
    )
    want = prior.double().expand_as(dq)
    if k == 1:
        pull = ridge * upper
        diagonal = upper + pull
        w = (dq + pull * want) / diagonal
        usable = (diagonal > 0) & (upper + qq[:, None] < float("inf"))
        w = torch.where(usable, w, want)
        square = qq - 2 * (w * dq)[:, 0] + (w * w * upper)[:, 0]
    else:
        a, b, c = upper.unbind(1)
        pull = ridge * (a + c) / 2
        a1, c1 = a + pull, c + pull
        r1, r2 = dq[:, 0] + pull * want[:, 0], dq[:, 1] + pull * want[:, 1]
        det = a1 * c1 - b * b
        usable = (det > a1 * c1 * 1e-12) & (a + c + qq < float("inf"))
        w = torch.stack([(c1 * r1 - b * r2) / det, (a1 * r2 - b * r1) / det], dim=1)
        w = torch.where(usable[:, None], w, want)
        w1, w2 = w.unbind(1)
        square = qq - 2 * (w * dq).sum(dim=1) + w1 * w1 * a + 2 * w1 * w2 * b + w2 * w2 * c
    ones, none = torch.ones_like(qq)[:, None], torch.zeros_like(qq)[:, None]
    # R_1 + sum_j w_j (R_j - R_(j+1))
    first = torch.cat([w, none], dim=1) - torch.cat([none, w], dim=1)
    first[:, 0] += 1
    result = torch.cat([ones, first], dim=1) if base else first
    return result.float(), (square.clamp_min(0) / qq).sqrt().float()


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
