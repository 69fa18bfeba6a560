# SPDX-License-Identifier: Apache-2.0
"""The eager definition of what finds weights of cached values from a few sums; `reference.py` imports it.

All of it is float64, stays on the device and is written out number by number, as a kernel does it in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

# An unknown counts as told by those before it where less than this share of its diagonal is left.
SINGULAR = 1e-12


def guided_solve(
    sums: Tensor,
    prior: Tensor,
    ridge: float,
    base: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """float32 (weights [S, K + 1], misfit [S]) from `guided_sums`: w solves the ridge system; in `out` if given.

    (D D^T + ridge * tr * I) w = D q + ridge * tr * prior, tr the mean diagonal of D D^T. Weights belong
    to the cached values R_1 .. R_(K+1): 1 + w_1, w_2 - w_1, .., -w_K; with `base` a 1.0 precedes them.
    misfit = |q - sum w_j D_j| / |q|. A singular or non-finite history falls back to the prior.
    """
    w, misfit = _differences(list(sums.double().unbind(1)), prior, ridge)
    return _told(_of_values(w, base), misfit, out)


def _differences(terms: list[Tensor], prior: Tensor, ridge: float) -> tuple[list[Tensor], Tensor]:
    """(weights of the differences, misfit), of sums as in `guided_sums`; float64."""
    k = prior.numel()
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
    return w, (square.clamp_min(0) / qq).sqrt()


def _of_values(w: Sequence[Tensor], base: bool = True) -> Tensor:
    """The weights of R_1, R_2, .. in R_1 + sum_j w_j (R_j - R_(j+1)), behind a 1.0 of the base; [S, K + 1 + base]."""
    one, none = torch.ones_like(w[0]), torch.zeros_like(w[0])
    values = [newer - older for older, newer in pairwise([-one, *w, none])]
    return torch.stack([one, *values] if base else values, dim=1)


def _told(
    weights: Tensor, misfit: Tensor, out: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Both in float32, and where they are wanted."""
    if out is None:
        return weights.float(), misfit.float()
    return out[0].copy_(weights), out[1].copy_(misfit)


def _together(sums: Sequence[Tensor]) -> list[Tensor]:
    """The sums of all, [S] each."""
    first, *others = (each.double() for each in sums)
    return list(sum(others, first).unbind(1))


def guided_check(
    sums: Tensor,
    values: Sequence[Tensor],
    prior: Tensor,
    before: Tensor,
    ridge: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`guided_solve` of one sample with a base, its weights drawn to those of the prior by what they are worth.

    sums: float64 [1, M] of K >= 2 differences, which also hold what gives weights of the newest guide from the older
    ones; before: [K - 1], the prior of these. values: of each stream `guided_sums` of the newest value from the older
    ones, float64 [1, M']. With p the prior's and g the guides' weights of the differences D of the older values, q the
    newest difference, d = (g - p) D and e = q - p D, the share of the guides is (d.e + d.d) / (2 d.d) within 0 and 1:
    halfway between all of it and what would have come nearest to the newest value. All of it where both say the same.
    """
    k = before.numel()
    terms = list(sums.double().unbind(1))
    w, misfit = _differences(terms, prior, ridge)
    g, _ = _differences([*terms[k + 1 : -k - 2], *terms[1 : k + 1], terms[0]], before, ridge)
    known = _together(values)
    at = [[i * k - i * (i - 1) // 2 + j - i for j in range(i, k)] for i in range(k)]
    gram = [[known[at[min(i, j)][abs(j - i)]] for j in range(k)] for i in range(k)]
    p = before.double().unbind()
    d = [told - wanted for told, wanted in zip(g, p, strict=True)]
    square, cross = torch.zeros_like(misfit), torch.zeros_like(misfit)
    for i in range(k):
        left = known[-k - 1 + i]
        for j in range(k):
            square = square + d[i] * d[j] * gram[i][j]
            left = left - gram[i][j] * p[j]
        cross = cross + d[i] * left
    share = ((cross + square) / (2 * square)).clamp(0, 1)
    usable = (square > 0) & (sum(known) < float("inf"))
    share = torch.where(usable, share, torch.ones_like(share))
    drawn = [
        wanted + share * (told - wanted) for told, wanted in zip(w, prior.double(), strict=True)
    ]
    return _told(_of_values(drawn), misfit, out)


def exponential_solve(sums: Sequence[Tensor], reach: Tensor, ridge: float) -> Tensor:
    """float32 [4], a leading 1 and the weights of the three newest of evenly spaced values, from `guided_sums`.

    sums: float64 [1, 6] of d_1 = x_1 - x_2, D = (d_2, d_3), x_1 the newest value, of several such windows, which are
    added up. reach: [1], how many gaps ahead. c solves (X^T X + ridge * tr * I) c = X^T d_1 for X = (d_3, d_2),
    tr the mean diagonal; C = [[0, c_1], [1, c_2]] carries one pair of differences to the next, so that the
    change over q gaps is (d_2, d_1) g(C) c with g(z) = (z^q - 1) / (z - 1). Where the second singular value
    of X is below 1e-4 of the first, X is its first direction. A singular or non-finite history gives the
    line through the two newest values.
    """
    m22, m23, m33, v2, v3, _ = (each[0] for each in _together(sums))
    q = reach.double().reshape(())
    half, diff = (m22 + m33) / 2, (m33 - m22) / 2
    pull, spread = ridge * half, (diff * diff + m23 * m23).sqrt()
    a, b = m33 + pull, m22 + pull
    det = a * b - m23 * m23
    c1, c2 = (b * v3 - m23 * v2) / det, (a * v2 - m23 * v3) / det
    # g(C) = alpha + beta C, by the roots of z^2 - c_2 z - c_1, real or a conjugate pair; double ones are pulled apart
    none = torch.zeros_like(q)
    middle = c2 / 2
    square = middle * middle + c1
    root = square.abs().sqrt()
    turns = (square < 0) & (root >= 1e-5)
    root = torch.where(root < 1e-5, torch.full_like(root, 1e-5), root)
    first = middle + torch.where(turns, none, root)
    g1, across = _gained(first, torch.where(turns, root, none), q)
    g2, _ = _gained(middle - root, none, q)
    beta = torch.where(turns, across / root, (g1 - g2) / (2 * root))
    alpha = g1 - beta * first
    both = alpha * c1 + beta * c1 * c2, alpha * c2 + beta * (c1 + c2 * c2)
    # one direction (e3, e2) of X: half the angle of (diff, m23)
    long = ((spread + diff.abs()) / (2 * spread)).sqrt()
    short = m23 / (2 * spread * long)
    e3, e2 = torch.where(diff < 0, short, long), torch.where(diff < 0, long, short)
    e3, e2 = torch.where(spread > 0, e3, torch.ones_like(e3)), torch.where(spread > 0, e2, none)
    largest = half + spread + pull
    along = e3 * v3 + e2 * v2
    turn = (e3 * (e3 * m23 + e2 * v3) + e2 * (e3 * m22 + e2 * v2)) / largest
    gain = _gained(turn, none, q)[0] * along / largest
    flat = half - spread < 1e-8 * (half + spread)
    u2, u1 = torch.where(flat, e3 * gain, both[0]), torch.where(flat, e2 * gain, both[1])
    usable = (half > 0) & torch.isfinite(u1) & torch.isfinite(u2)
    u1, u2 = torch.where(usable, u1, q), torch.where(usable, u2, none)
    return torch.stack([torch.ones_like(q), 1 + u1, u2 - u1, -u2]).float()


def _gained(x: Tensor, y: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(z^q - 1) / (z - 1) of z = x + i y, y >= 0: (real, imaginary) part; q at 1, and 1 - 0^q at 0."""
    one = (x - 1) * (x - 1) + y * y < 1e-12
    nought = x * x + y * y < 1e-24
    x = torch.where(
        one, torch.full_like(x, 1 + 1e-6), torch.where(nought, torch.full_like(x, 1e-12), x)
    )
    y = torch.where(one | nought, torch.zeros_like(y), y)
    size, angle = torch.exp(q * torch.log(x * x + y * y) / 2), q * torch.atan2(y, x)
    real, imaginary, left = size * torch.cos(angle) - 1, size * torch.sin(angle), x - 1
    square = left * left + y * y
    return (real * left + imaginary * y) / square, (imaginary * left - real * y) / square
