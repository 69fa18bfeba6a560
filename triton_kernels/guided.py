# SPDX-License-Identifier: Apache-2.0
"""Sums over guides, or over cached values themselves, from which weights follow (`solve.py`).

With guides g (current) and g_1, g_2, .. (cached, newest first): q = g - g_1, D_j = g_j - g_(j+1). What follows
from the sums takes differences of nearly equal ones, so they are float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reduction
from .counters import counters
from .geometry import WARPS, cdiv, row_tile, widest
from .launcher import Launcher, Plan
from .reduction import add_up, spread

# Elements per tile. With the number of programs it defines the bits of the sums.
TILE = 2048


@triton.jit
def _load(p_guides, s_guides, r_guides, i_s, o_r, o_c, m_n, INDEX: tl.constexpr):
    p_row = p_guides[INDEX] + i_s * s_guides[INDEX] + o_r * r_guides[INDEX]  # [ROWS]
    b_guide = tl.load(p_row[:, None] + o_c[None, :], mask=m_n, other=0.0)  # [ROWS, COLS]
    return b_guide.to(tl.float64)


@triton.jit
def _dot(b_a, b_b, LANES: tl.constexpr, FOLD: tl.constexpr):
    """Products summed over FOLD neighbours."""
    return tl.sum(tl.reshape(b_a * b_b, [LANES, FOLD]), axis=1)  # [LANES]


@triton.jit(do_not_specialize=["rows", "programs", "count"])
def _guided_sums_kernel(
    p_guides,
    p_sums,
    p_part,
    p_counter,
    s_guides,
    r_guides,
    rows,
    width,
    programs,
    count,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FOLD: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    LANES: tl.constexpr = ROWS * COLS // FOLD
    Q: tl.constexpr = K * (K + 1) // 2  # the sums of D q come behind the triangle
    SUMS: tl.constexpr = Q + K + 1
    i_g = tl.program_id(0)
    i_s = (i_g // programs).to(tl.int64)
    i_p = i_g % programs
    b_11 = tl.zeros([LANES], tl.float64)
    b_12 = tl.zeros([LANES], tl.float64)
    b_13 = tl.zeros([LANES], tl.float64)
    b_22 = tl.zeros([LANES], tl.float64)
    b_23 = tl.zeros([LANES], tl.float64)
    b_33 = tl.zeros([LANES], tl.float64)
    b_1q = tl.zeros([LANES], tl.float64)
    b_2q = tl.zeros([LANES], tl.float64)
    b_3q = tl.zeros([LANES], tl.float64)
    b_qq = tl.zeros([LANES], tl.float64)
    for i_t in range(i_p, tl.cdiv(rows, ROWS), programs):
        o_r = tl.cast(i_t, tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
        for i_c in range(0, width, COLS):
            o_c = i_c + tl.arange(0, COLS)  # [COLS]
            m_n = (o_r < rows)[:, None] & (o_c < width)[None, :]
            b_g1 = _load(p_guides, s_guides, r_guides, i_s, o_r, o_c, m_n, 1)
            b_g2 = _load(p_guides, s_guides, r_guides, i_s, o_r, o_c, m_n, 2)
            b_q = _load(p_guides, s_guides, r_guides, i_s, o_r, o_c, m_n, 0) - b_g1
            b_d1 = b_g1 - b_g2
            b_11 += _dot(b_d1, b_d1, LANES, FOLD)
            b_1q += _dot(b_d1, b_q, LANES, FOLD)
            b_qq += _dot(b_q, b_q, LANES, FOLD)
            if K >= 2:
                b_g3 = _load(p_guides, s_guides, r_guides, i_s, o_r, o_c, m_n, 3)
                b_d2 = b_g2 - b_g3
                b_12 += _dot(b_d1, b_d2, LANES, FOLD)
                b_22 += _dot(b_d2, b_d2, LANES, FOLD)
                b_2q += _dot(b_d2, b_q, LANES, FOLD)
                if K == 3:
                    b_d3 = b_g3 - _load(p_guides, s_guides, r_guides, i_s, o_r, o_c, m_n, 4)
                    b_13 += _dot(b_d1, b_d3, LANES, FOLD)
                    b_23 += _dot(b_d2, b_d3, LANES, FOLD)
                    b_33 += _dot(b_d3, b_d3, LANES, FOLD)
                    b_3q += _dot(b_d3, b_q, LANES, FOLD)
    i_r = (i_g // count).to(tl.int64)  # which result
    p_all = p_part + i_r * (SUMS * count)
    p_part = p_all + i_g % count
    tl.store(p_part, tl.sum(b_11, axis=0))
    if K >= 2:
        tl.store(p_part + count, tl.sum(b_12, axis=0))
        tl.store(p_part + K * count, tl.sum(b_22, axis=0))
        tl.store(p_part + (Q + 1) * count, tl.sum(b_2q, axis=0))
    if K == 3:
        tl.store(p_part + 2 * count, tl.sum(b_13, axis=0))
        tl.store(p_part + 4 * count, tl.sum(b_23, axis=0))
        tl.store(p_part + 5 * count, tl.sum(b_33, axis=0))
        tl.store(p_part + (Q + 2) * count, tl.sum(b_3q, axis=0))
    tl.store(p_part + Q * count, tl.sum(b_1q, axis=0))
    tl.store(p_part + (SUMS - 1) * count, tl.sum(b_qq, axis=0))
    add_up(p_sums + SUMS * i_r, p_all, p_counter + i_r, count, 1.0, SUMS, 2 << K, PARTIALS)


def _terms(order: int) -> int:
    """How many sums guides of an order give: a triangle, D q and q.q."""
    return order * (order + 3) // 2 + 1


def _sums_plan(tensors: Sequence[Tensor], per_sample: bool) -> Plan:
    guide = tensors[0]
    width = guide.shape[-1]
    if per_sample or not all(t.is_contiguous() for t in tensors):
        groups, rows = guide.shape[0], guide[0].numel() // width
        s_guides = tuple(t.stride(0) for t in tensors)
        r_guides = tuple(t.stride(1) if t.dim() == 3 else width for t in tensors)
    else:
        groups, rows = 1, guide.numel() // width
        s_guides, r_guides = (0,) * len(tensors), (width,) * len(tensors)
    order, fold = len(tensors) - 2, 16 // widest(tensors)
    # With up to 80 registers three programs share a multiprocessor: 384 are one wave. The ten sums of order 3 leave
    # room for two, and for one access of 16 bytes a thread and guide at a time.
    elements, share = (TILE, 0.75) if order < 3 else (32 * WARPS * fold, 0.5)
    tile = row_tile(width, elements)
    each, (results, count) = spread(cdiv(rows, tile[0]), groups, per_sample, share)
    constants = (order, *tile, fold, reduction.PROGRAMS // 4)  # a row of 4 * K needs room
    numbers = (s_guides, r_guides, rows, width, each, count, *constants)
    return Plan(groups * each, numbers, results, _terms(order) * results * count)


_sums = Launcher(_guided_sums_kernel, _sums_plan, num_warps=WARPS)


def guided_sums(guide: Tensor, guides: Sequence[Tensor], per_sample: bool = False) -> Tensor:
    """float64 [S, M]: the entries of D D^T, of D q, and q.q, in one pass over K + 2 tensors.

    guide, guides[0..K]: one shape, K = 1 to 3; contiguous, or [B, T, C] with dense rows at any
    distance (a token range, or every k-th token). S is 1, or B per sample. M = 3 for K = 1: D1.D1,
    D1.q, q.q; M = 6 for K = 2: D1.D1, D1.D2, D2.D2, D1.q, D2.q, q.q; M = 10 for K = 3.
    """
    shape = (guide.shape[0] if per_sample else 1, _terms(len(guides) - 1))
    sums = guide.new_empty(shape, dtype=torch.float64)
    if not guide.numel():
        return sums.zero_()
    tensors = (guide, *guides)
    plan = _sums.plan(tensors, per_sample)
    part = guide.new_empty(plan.partials, dtype=torch.float64)
    _sums.launch(plan, tensors, sums, part, counters(guide, plan.results))
    return sums
