# SPDX-License-Identifier: Apache-2.0
"""TeaCache's signal: a block's modulated input, its L1 change and its store, in one pass over memory.

A row that fits a tile is read once and stays in registers; of a wider one the statistics take two more
passes, which find it in the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reduction
from .counters import counters
from .geometry import WARPS, Table, cdiv, pick, samples
from .launcher import Launcher, Plan
from .reduction import add_up, result, spread

# (rows, columns) of one tile by row width. With the number of programs they define the bits of the sums.
TILES: Table[tuple[int, int]] = (
    (64, (32, 64)),
    (128, (16, 128)),
    (256, (16, 256)),
    (512, (8, 512)),
    (1024, (4, 1024)),
    (2048, (2, 2048)),
    (4096, (1, 4096)),
    (8192, (1, 8192)),
    (None, (1, 4096)),
)


@triton.jit
def _modulated(b_d, b_inverse, b_scale, b_shift):
    return b_d * b_inverse[:, None] * (b_scale + 1.0) + b_shift


@triton.jit
def _changes(p_prev, p_out, o_n, m_n, b_m):
    """|m - prev| and |prev| per row, m rounded as it is stored; it goes to p_out."""
    b_prev = tl.load(p_prev + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_m = b_m.to(p_prev.dtype.element_ty)
    if p_out is not None:
        tl.store(p_out + o_n, b_m.to(p_out.dtype.element_ty), mask=m_n)
    b_change = tl.where(m_n, tl.abs(b_m.to(tl.float32) - b_prev), 0.0)
    return tl.sum(b_change, axis=1), tl.sum(tl.abs(b_prev), axis=1)  # [ROWS] each


@triton.jit
def _rows(p, o_r, step, o_c, m_n):
    """The rows of a modulation that these rows have, [ROWS, COLS]: out of the first cache where all share one."""
    return tl.load(p + o_r[:, None] * step + o_c[None, :], mask=m_n, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "programs", "count"])
def _modulated_l1_kernel(
    p_x,
    p_scale,
    p_shift,
    p_prev,
    p_out,
    p_sums,
    p_part,
    p_counter,
    eps,
    s_x,
    s_prev,
    s_out,
    s_scale,
    s_shift,
    t_scale,
    t_shift,
    rows,
    width,
    programs,
    count,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    i_g = tl.program_id(0)
    i_s = (i_g // programs).to(tl.int64)
    i_p = i_g % programs
    p_x += i_s * s_x
    p_prev += i_s * s_prev
    if p_out is not None:
        p_out += i_s * s_out
    p_scale += i_s * s_scale
    p_shift += i_s * s_shift
    o_c = tl.arange(0, COLS)  # [COLS]
    b_change = tl.zeros([ROWS], tl.float32)
    b_old = tl.zeros([ROWS], tl.float32)
    for i_t in range(i_p, tl.cdiv(rows, ROWS), programs):
        o_r = tl.cast(i_t, tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
        m_r = o_r < rows
        o_n = o_r[:, None] * width + o_c[None, :]  # [ROWS, COLS]
        if ONE_TILE:
            m_n = m_r[:, None] & (o_c < width)[None, :]
            b_x = tl.load(p_x + o_n, mask=m_n, other=0.0).to(tl.float32)
            b_mean = tl.sum(b_x, axis=1) / width
            b_d = tl.where(m_n, b_x - b_mean[:, None], 0.0)
            b_inverse = 1.0 / tl.sqrt_rn(tl.sum(b_d * b_d, axis=1) / width + eps)
            b_by = _rows(p_scale, o_r, t_scale, o_c, m_n)
            b_m = _modulated(b_d, b_inverse, b_by, _rows(p_shift, o_r, t_shift, o_c, m_n))
            change, old = _changes(p_prev, p_out, o_n, m_n, b_m)
            b_change += change
            b_old += old
        else:
            b_sum = tl.zeros([ROWS], tl.float32)
            for i_c in range(0, width, COLS):
                m_n = m_r[:, None] & (i_c + o_c < width)[None, :]
                b_x = tl.load(p_x + o_n + i_c, mask=m_n, other=0.0).to(tl.float32)
                b_sum += tl.sum(b_x, axis=1)
            b_mean = b_sum / width
            b_square = tl.zeros([ROWS], tl.float32)
            for i_c in range(0, width, COLS):
                m_n = m_r[:, None] & (i_c + o_c < width)[None, :]
                b_x = tl.load(p_x + o_n + i_c, mask=m_n, other=0.0).to(tl.float32)
                b_d = tl.where(m_n, b_x - b_mean[:, None], 0.0)
                b_square += tl.sum(b_d * b_d, axis=1)
            b_inverse = 1.0 / tl.sqrt_rn(b_square / width + eps)
            for i_c in range(0, width, COLS):
                m_n = m_r[:, None] & (i_c + o_c < width)[None, :]
                b_x = tl.load(p_x + o_n + i_c, mask=m_n, other=0.0).to(tl.float32)
                b_by = _rows(p_scale + i_c, o_r, t_scale, o_c, m_n)
                b_plus = _rows(p_shift + i_c, o_r, t_shift, o_c, m_n)
                b_m = _modulated(b_x - b_mean[:, None], b_inverse, b_by, b_plus)
                change, old = _changes(p_prev, p_out, o_n + i_c, m_n, b_m)
                b_change += change
                b_old += old
    p_mine = p_part + i_g
    tl.store(p_mine, tl.sum(b_change, axis=0))
    tl.store(p_mine + count, tl.sum(b_old, axis=0))
    add_up(p_sums, p_part, p_counter, count, 1.0, 2, 2, PROGRAMS)


def _plan(tensors: Sequence[Tensor | None]) -> Plan:
    x, scale, shift, prev, out = tensors
    modulations = cast("tuple[Tensor, Tensor]", (scale, shift))
    groups, n, strides = samples((x, prev, out), True)
    width = cast(Tensor, x).shape[-1]
    rows = n // width
    tile = pick(TILES, width)
    each, (_, count) = spread(cdiv(rows, tile[0]), groups, False)
    per_sample = tuple(0 if m.shape[0] == 1 else m.stride(0) for m in modulations)
    per_token = tuple(0 if m.shape[1] == 1 else m.stride(1) for m in modulations)
    numbers = (*strides, *per_sample, *per_token, rows, width, each, count)
    options = (*tile, width <= tile[1], reduction.PROGRAMS)
    return Plan(groups * each, (*numbers, *options), 1, 2 * count)


_launcher = Launcher(_modulated_l1_kernel, _plan, num_warps=WARPS)


def modulated_l1(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """float32 [2]: sum |m - prev| and sum |prev| for m = LN(x) * (1 + scale) + shift. `out` receives m.

    x, prev: [B, T, C]. scale, shift: [B or 1, T or 1, C], dense rows. m is rounded to the dtype of `prev`
    first; `out` may be `prev`. Source: TeaCache (arXiv 2411.19108).
    """
    if not x.numel():
        return result(x, 2, False, None).zero_()
    scale, shift = scale.contiguous(), shift.contiguous()
    plan = _launcher.plan((x, scale, shift, prev, out))
    sums = result(x, 2, False, None)
    part = x.new_empty(plan.partials, dtype=torch.float32)
    arrived = counters(x, plan.results)
    _launcher.launch(plan, x, scale, shift, prev, out, sums, part, arrived, float(eps))
    return sums
