# SPDX-License-Identifier: Apache-2.0
"""Weights of cached values from the sums of `guided.py`: systems of one to three unknowns, one launch each.

The weights w of the differences solve (D D^T + ridge * tr * I) w = D q + ridge * tr * prior, tr the mean diagonal of
D D^T. The squared misfit |q - sum_j w_j D_j|^2 is a difference of nearly equal sums, and so is what is left of a
diagonal where the D_j are nearly parallel: all of it is float64. Nothing is read back by the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launcher import Launcher, Plan

# An unknown counts as told by those before it where less than this share of its diagonal is left.
SINGULAR = tl.constexpr(1e-12)


@triton.jit
def _known(p, INDEX: tl.constexpr, THERE: tl.constexpr):
    """A float64 number, or 0 where there is none."""
    if THERE:
        value = tl.load(p + INDEX).to(tl.float64)
    else:
        value = tl.full((), 0.0, tl.float64)
    return value


@triton.jit
def load_sums(p_sums, K: tl.constexpr):
    """The triangle of D D^T row by row, D q and q.q; 0 where an unknown of three is not there."""
    Q: tl.constexpr = K * (K + 1) // 2  # the sums of D q come behind the triangle
    return (
        _known(p_sums, 0, True),
        _known(p_sums, 1, K >= 2),
        _known(p_sums, 2, K == 3),
        _known(p_sums, K, K >= 2),
        _known(p_sums, 4, K == 3),
        _known(p_sums, 5, K == 3),
        _known(p_sums, Q, True),
        _known(p_sums, Q + 1, K >= 2),
        _known(p_sums, Q + 2, K == 3),
        _known(p_sums, Q + K, True),
    )


@triton.jit
def _load_prior(p_prior, K: tl.constexpr):
    return _known(p_prior, 0, True), _known(p_prior, 1, K >= 2), _known(p_prior, 2, K == 3)


@triton.jit
def _differences(sums, prior, ridge, K: tl.constexpr):
    """(w_1, w_2, w_3, misfit). Unknowns that K leaves out have a row of the identity, and are 0."""
    g_11, g_12, g_13, g_22, g_23, g_33, b_1, b_2, b_3, qq = sums
    prior_1, prior_2, prior_3 = prior
    trace = g_11 + g_22 + g_33
    pull = ridge * trace / K
    a_11 = g_11 + pull
    a_22 = g_22 + pull if K >= 2 else 1.0 + g_22
    a_33 = g_33 + pull if K == 3 else 1.0 + g_33
    c_1 = b_1 + pull * prior_1
    c_2 = b_2 + pull * prior_2
    c_3 = b_3 + pull * prior_3
    # what an unknown says is taken from the rows behind it
    s_2 = g_12 / a_11
    s_3 = g_13 / a_11
    e_22 = a_22 - s_2 * g_12
    e_23 = g_23 - s_2 * g_13
    e_33 = a_33 - s_3 * g_13
    c_2 -= s_2 * c_1
    c_3 -= s_3 * c_1
    s_3 = e_23 / e_22
    e_33 -= s_3 * e_23
    c_3 -= s_3 * c_2
    usable = (a_11 > 0) & (e_22 > a_22 * SINGULAR) & (e_33 > a_33 * SINGULAR)
    usable = usable & (trace + qq < float("inf"))
    w_3 = c_3 / e_33
    w_2 = (c_2 - e_23 * w_3) / e_22
    w_1 = (c_1 - g_12 * w_2 - g_13 * w_3) / a_11
    w_1 = tl.where(usable, w_1, prior_1)
    w_2 = tl.where(usable, w_2, prior_2)
    w_3 = tl.where(usable, w_3, prior_3)
    square = qq - 2 * (w_1 * b_1 + w_2 * b_2 + w_3 * b_3)
    square += w_1 * w_1 * g_11 + w_2 * w_2 * g_22 + w_3 * w_3 * g_33
    square += 2 * (w_1 * w_2 * g_12 + w_1 * w_3 * g_13 + w_2 * w_3 * g_23)
    # rounding may leave a tiny negative square; NaN stays NaN
    square = tl.where(square < 0, 0.0, square)
    return w_1, w_2, w_3, tl.sqrt(square / qq)


@triton.jit
def _store_values(p_weights, w_1, w_2, w_3, K: tl.constexpr, BASE: tl.constexpr):
    """The weights of R_1, R_2, .. in R_1 + sum_j w_j (R_j - R_(j+1)), behind a 1.0 of the base."""
    if BASE:
        tl.store(p_weights, 1.0)
    p_weights += BASE
    tl.store(p_weights, (1 + w_1).to(tl.float32))
    tl.store(p_weights + 1, (w_2 - w_1).to(tl.float32))
    if K >= 2:
        tl.store(p_weights + 2, (w_3 - w_2).to(tl.float32))
    if K == 3:
        tl.store(p_weights + 3, (-w_3).to(tl.float32))


@triton.jit
def _guided_solve_kernel(
    p_weights, p_misfit, p_sums, p_prior, ridge, K: tl.constexpr, BASE: tl.constexpr
):
    i_s = tl.program_id(0).to(tl.int64)
    sums = load_sums(p_sums + i_s * (K * (K + 1) // 2 + K + 1), K)
    w_1, w_2, w_3, misfit = _differences(sums, _load_prior(p_prior, K), ridge, K)
    _store_values(p_weights + i_s * (BASE + K + 1), w_1, w_2, w_3, K, BASE)
    tl.store(p_misfit + i_s, misfit.to(tl.float32))


@triton.jit
def _guided_check_kernel(
    p_weights, p_misfit, p_sums, p_values, p_prior, p_before, ridge, K: tl.constexpr
):
    sums = load_sums(p_sums, K)
    prior = _load_prior(p_prior, K)
    w_1, w_2, w_3, misfit = _differences(sums, prior, ridge, K)
    # the same for the newest guide: its difference is the first one here
    g_11, g_12, g_13, g_22, g_23, g_33, _, _, _, _ = sums
    none = tl.full((), 0.0, tl.float64)
    before = _load_prior(p_before, K - 1)
    told = (g_22, g_23, none, g_33, none, none, g_12, g_13, none, g_11)
    d_1, d_2, _, _ = _differences(told, before, ridge, K - 1)
    p_1, p_2, _ = before
    d_1 -= p_1
    d_2 -= p_2
    # of the values, all streams together
    v_11, v_12, v_22, r_1, r_2, total = none, none, none, none, none, none
    for i in tl.static_range(len(p_values)):
        s_11, s_12, _, s_22, _, _, s_1, s_2, _, s_q = load_sums(p_values[i], K - 1)
        v_11 += s_11
        v_12 += s_12
        v_22 += s_22
        r_1 += s_1
        r_2 += s_2
        total += s_11 + s_12 + s_22 + s_1 + s_2 + s_q
    square = d_1 * d_1 * v_11 + 2 * d_1 * d_2 * v_12 + d_2 * d_2 * v_22
    cross = d_1 * (r_1 - v_11 * p_1 - v_12 * p_2) + d_2 * (r_2 - v_12 * p_1 - v_22 * p_2)
    share = (cross + square) / (2 * square)
    share = tl.where(share < 0, 0.0, tl.where(share > 1, 1.0, share))
    share = tl.where((square > 0) & (total < float("inf")), share, 1.0)
    w_1 = prior[0] + share * (w_1 - prior[0])
    w_2 = prior[1] + share * (w_2 - prior[1])
    w_3 = prior[2] + share * (w_3 - prior[2])
    _store_values(p_weights, w_1, w_2, w_3, K, 1)
    tl.store(p_misfit, misfit.to(tl.float32))


def _solve_plan(tensors: Sequence[Tensor], base: bool) -> Plan:
    sums, prior = tensors
    return Plan(sums.shape[0], (prior.numel(), int(base)))


def _check_plan(tensors: Sequence[Tensor]) -> Plan:
    return Plan(1, (tensors[1].numel(),))


_solve = Launcher(_guided_solve_kernel, _solve_plan, num_warps=1)
_check = Launcher(_guided_check_kernel, _check_plan, num_warps=1)


def _room(sums: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Where float32 weights and misfits go that nobody has given a place."""
    weights = sums.new_empty((sums.shape[0], terms), dtype=torch.float32)
    return weights, sums.new_empty(sums.shape[0], dtype=torch.float32)


def guided_solve(
    sums: Tensor,
    prior: Tensor,
    ridge: float,
    base: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(weights [S, K + 1], misfit [S]), float32, on the device of `sums`; one program per sample.

    sums: [S, M] of `guided_sums` (float64 or float32). prior: float32 [K], the weights w that the
    ridge pulls toward and that a degenerate or non-finite history falls back to. The weights belong
    to the cached residuals R_1, R_2, ..: 1 + w_1, w_2 - w_1, .., -w_K; with `base` a 1.0 precedes
    them. The misfit is NaN where a guide is not finite or neither it nor its history moved.
    """
    weights, misfit = out or _room(sums, base + prior.numel() + 1)
    if sums.shape[0]:
        _solve.launch(_solve.plan((sums, prior), base), weights, misfit, sums, prior, float(ridge))
    return weights, misfit


def guided_check(
    sums: Tensor,
    values: Sequence[Tensor],
    prior: Tensor,
    before: Tensor,
    ridge: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`guided_solve` of one sample with a base, drawn to the prior by what both told of the newest value.

    sums: [1, M] of K = 2 or 3 differences of guides. values: of each stream the sums of the newest value and
    those before it, of K - 1 differences. before: float32 [K - 1], the prior for the newest value.
    """
    weights, misfit = out or _room(sums, prior.numel() + 2)
    plan = _check.plan((sums, prior, before, *values))
    _check.launch(plan, weights, misfit, sums, tuple(values), prior, before, float(ridge))
    return weights, misfit
