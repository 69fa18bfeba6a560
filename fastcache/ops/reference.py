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

# An unknown counts as told by those before it where less than this share of its diagonal is left.
SINGULAR = 1e-12


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


def guided_solve(
    sums: Tensor, prior: Tensor, ridge: float, base: bool = False
) -> tuple[Tensor, Tensor]:
    """float32 (weights [S, K + 1], misfit [S]) from `guided_sums`: w solves the ridge system.

    (D D^T + ridge * tr * I) w = D q + ridge * tr * prior, tr the mean diagonal of D D^T. Weights belong
    to the cached values R_1 .. R_(K+1): 1 + w_1, w_2 - w_1, .., -w_K; with `base` a 1.0 precedes them.
    misfit = |q - sum w_j D_j| / |q|. A singular or non-finite history falls back to the prior.
    """
    k = prior.numel()
    terms = list(sums.double().unbind(1))
    places = [(i, j) for i in range(k) for j in range(i, k)]
    upper, dq, qq = dict(zip(places, terms, strict=False)), terms[-k - 1 : -1], terms[-1]
    want = prior.double().unbind()
    trace = sum(upper[i, i] for i in range(k))
    pull = ridge * trace / k
    a = {at: value + pull if at[0] == at[1] else value for at, value in upper.items()}
    r = [its + pull * wanted for its, wanted in zip(dq, want, strict=True)]
    usable = trace + qq < float("inf")
    for p in range(k):  # what unknown p says is taken from the rows behind it
        usable = usable & (a[p, p] > (upper[p, p] + pull) * SINGULAR)
        for i in range(p + 1, k):
            share = a[p, i] / a[p, p]
            r[i] = r[i] - share * r[p]
            for j in range(i, k):
                a[i, j] = a[i, j] - share * a[p, j]
    for p in reversed(range(k)):  # r becomes the solution
        for j in range(p + 1, k):
            r[p] = r[p] - a[p, j] * r[j]
        r[p] = r[p] / a[p, p]
    w = [torch.where(usable, found, wanted) for found, wanted in zip(r, want, strict=True)]
    square = qq - 2 * sum(weight * its for weight, its in zip(w, dq, strict=True))
    for i, j in places:
        square = square + (1 if i == j else 2) * w[i] * w[j] * upper[i, j]
    found = _of_values(w)
    weights = torch.stack([torch.ones_like(qq), *found] if base else found, dim=1)
    return weights.float(), (square.clamp_min(0) / qq).sqrt().float()


def _of_values(w: Sequence[Tensor]) -> list[Tensor]:
    """The weights of R_1, R_2, .. in R_1 + sum_j w_j (R_j - R_(j+1))."""
    one, none = torch.ones_like(w[0]), torch.zeros_like(w[0])
    return [newer - older for older, newer in pairwise([-one, *w, none])]


def guided_check(
    weights: Tensor, told: Tensor, sums: Tensor, prior: Tensor, before: Tensor
) -> Tensor:
    """float32 [1, K + 2]: weights of `guided_solve` with a base, drawn to those of the prior by what they are worth.

    told: float32 [1, K + 1], weights with a base that the guides gave for the newest value from the older ones, and
    before: [K - 1], the prior's of their differences; sums: float64 [1, M], `guided_sums` of these values. With p the
    prior's and g the guides' weights of the differences D of the older values, q the newest difference,
    d = (g - p) D and e = q - p D, the share of the guides is (d.e + d.d) / (2 d.d) within 0 and 1: halfway between all
    of it and what would have come nearest to the newest value. All of it where the two say the same.
    """
    k = before.numel()
    upper = [(i, j) for i in range(k) for j in range(i, k)]
    known, p = sums[0].double(), before.double()
    terms = dict(zip(upper, known.unbind(), strict=False))
    gram = torch.stack([terms[min(i, j), max(i, j)] for i in range(k) for j in range(k)])
    gram = gram.reshape(k, k)
    # of the differences: what older values have, taken from newer ones
    g = -told[0, 2:].double().flip(0).cumsum(0).flip(0)
    d = g - p
    square = d @ gram @ d
    share = (d @ (known[-k - 1 : -1] - gram @ p) + square) / (2 * square)
    usable = (square > 0) & (known.sum() < float("inf"))
    share = torch.where(usable, share.clamp(0, 1), torch.ones_like(share))
    want = torch.stack([torch.ones_like(square), *_of_values(prior.double().unbind())])
    return (want + share * (weights.double() - want)).float()


def exponential_solve(sums: Tensor, reach: Tensor, ridge: float) -> Tensor:
    """float32 [4], a leading 1 and the weights of the three newest of evenly spaced values, from `guided_sums`.

    sums: float64 [1, 6] of d_1 = x_1 - x_2, D = (d_2, d_3), x_1 the newest value; or of several such windows,
    added up. reach: [1], how many gaps ahead. c solves (X^T X + ridge * tr * I) c = X^T d_1 for X = (d_3, d_2),
    tr the mean diagonal; C = [[0, c_1], [1, c_2]] carries one pair of differences to the next, so that the
    change over q gaps is (d_2, d_1) g(C) c with g(z) = (z^q - 1) / (z - 1). Where the second singular value
    of X is below 1e-4 of the first, X is its first direction. A singular or non-finite history gives the
    line through the two newest values.
    """
    m22, m23, m33, v2, v3, _ = sums.double().sum(dim=0).unbind()
    q = reach.double().reshape(())
    half, diff = (m22 + m33) / 2, (m33 - m22) / 2
    pull, spread = ridge * half, torch.hypot(diff, m23)
    a, b = m33 + pull, m22 + pull
    det = a * b - m23 * m23
    c1, c2 = (b * v3 - m23 * v2) / det, (a * v2 - m23 * v3) / det
    # g(C) = alpha + beta C, by the roots of z^2 - c_2 z - c_1; double ones are pulled apart
    root = torch.sqrt((c2 * c2 / 4 + c1).to(torch.complex128))
    root = torch.where(root.abs() < 1e-5, torch.full_like(root, 1e-5), root)
    g1, g2 = _gained(c2 / 2 + root, q), _gained(c2 / 2 - root, q)
    beta = (g1 - g2) / (2 * root)
    alpha = g1 - beta * (c2 / 2 + root)
    both = (alpha * c1 + beta * c1 * c2).real, (alpha * c2 + beta * (c1 + c2 * c2)).real
    # one direction (cos, sin) of X
    angle = torch.atan2(m23, diff) / 2
    e3, e2, largest = angle.cos(), angle.sin(), half + spread + pull
    along = e3 * v3 + e2 * v2
    turn = (e3 * (e3 * m23 + e2 * v3) + e2 * (e3 * m22 + e2 * v2)) / largest
    gain = (_gained(turn.to(torch.complex128), q) * along).real / largest
    flat = half - spread < 1e-8 * (half + spread)
    u2, u1 = torch.where(flat, e3 * gain, both[0]), torch.where(flat, e2 * gain, both[1])
    usable = (half > 0) & torch.isfinite(u1) & torch.isfinite(u2)
    u1, u2 = torch.where(usable, u1, q), torch.where(usable, u2, torch.zeros_like(q))
    return torch.stack([torch.ones_like(q), 1 + u1, u2 - u1, -u2]).float()


def _gained(z: Tensor, q: Tensor) -> Tensor:
    """(z^q - 1) / (z - 1) of a complex number: q at 1, and 1 - 0^q at 0."""
    z = torch.where((z - 1).abs() < 1e-6, torch.full_like(z, 1 + 1e-6), z)
    z = torch.where(z.abs() < 1e-12, torch.full_like(z, 1e-12), z)
    return (torch.exp(q * torch.log(z)) - 1) / (z - 1)


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
