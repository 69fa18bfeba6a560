# SPDX-License-Identifier: Apache-2.0
"""MagCache calibration: the mean ratio of residual norms per token; may store the residual.

Squares are summed in float32, so norms hold for values between about 1e-18 and 1e+17 in size.
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
from .geometry import WARPS, cdiv, row_tile, samples
from .launcher import Launcher, Plan
from .reduction import add_up, result, spread

# Elements per tile. With the number of programs it defines the bits of the result.
TILE = 2048


@triton.jit(do_not_specialize=["rows", "programs", "count"])
def _residual_magnitude_kernel(
    p_y,
    p_x,
    p_prev,
    p_out,
    p_mean,
    p_part,
    p_counter,
    eps,
    s_y,
    s_x,
    s_prev,
    s_out,
    rows,
    width,
    scale,
    programs,
    count,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    i_g = tl.program_id(0)
    i_s = (i_g // programs).to(tl.int64)
    i_p = i_g % programs
    p_y += i_s * s_y
    p_x += i_s * s_x
    p_prev += i_s * s_prev
    if p_out is not None:
        p_out += i_s * s_out
    b_ratio = tl.zeros([ROWS], tl.float32)
    for i_t in range(i_p, tl.cdiv(rows, ROWS), programs):
        o_r = tl.cast(i_t, tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
        m_r = o_r < rows
        b_rr = tl.zeros([ROWS, COLS], tl.float32)
        b_pp = tl.zeros([ROWS, COLS], tl.float32)
        for i_c in range(0, width, COLS):
            o_c = i_c + tl.arange(0, COLS)  # [COLS]
            o_n = o_r[:, None] * width + o_c[None, :]  # [ROWS, COLS]
            m_n = m_r[:, None] & (o_c < width)[None, :]
            b_y = tl.load(p_y + o_n, mask=m_n, other=0.0).to(tl.float32)
            b_x = tl.load(p_x + o_n, mask=m_n, other=0.0).to(tl.float32)
            b_prev = tl.load(p_prev + o_n, mask=m_n, other=0.0).to(tl.float32)
            b_r = (b_y - b_x).to(p_prev.dtype.element_ty)
            if p_out is not None:
                tl.store(p_out + o_n, b_r.to(p_out.dtype.element_ty), mask=m_n)
            b_r = b_r.to(tl.float32)
            b_rr += b_r * b_r
            b_pp += b_prev * b_prev
        b_now = tl.sqrt_rn(tl.sum(b_rr, axis=1))  # [ROWS]
        b_old = tl.sqrt_rn(tl.sum(b_pp, axis=1))  # [ROWS]
        b_ratio += tl.where(m_r, tl.div_rn(b_now, b_old + eps), 0.0)
    i_r = (i_g // count).to(tl.int64)  # which result
    p_all = p_part + i_r * count
    tl.store(p_all + i_g % count, tl.sum(b_ratio, axis=0))
    add_up(p_mean + i_r, p_all, p_counter + i_r, count, scale, 1, 1, PROGRAMS)


def _plan(tensors: Sequence[Tensor | None], per_sample: bool) -> Plan:
    groups, n, strides = samples(tensors[:4], per_sample)
    width = cast(Tensor, tensors[0]).shape[-1]
    rows = n // width
    tile = row_tile(width, TILE)
    each, (results, count) = spread(cdiv(rows, tile[0]), groups, per_sample)
    scale = results / (groups * rows)
    numbers = (*strides, rows, width, scale, each, count, *tile, reduction.PROGRAMS)
    return Plan(groups * each, numbers, results, results * count)


_launcher = Launcher(_residual_magnitude_kernel, _plan, num_warps=WARPS)


def residual_magnitude(
    y: Tensor,
    x: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    eps: float = 1e-8,
    per_sample: bool = False,
    mean: Tensor | None = None,
) -> Tensor:
    """float32 [1]: mean over tokens of |r| / (|prev| + eps) for r = y - x; [B, 1] per sample.

    Norms are over the last dimension. r is rounded to the dtype of `prev`; `out` receives it and
    may be `prev`. mean: where to put the result, contiguous.
    Source: MagCache (arXiv 2506.09045).
    """
    if not y.numel():
        return result(y, 1, per_sample, mean).fill_(_mean_of_empty(y, eps, per_sample))
    plan = _launcher.plan((y, x, prev, out, mean), per_sample)
    mean = result(y, 1, per_sample, mean)
    part = y.new_empty(plan.partials, dtype=torch.float32)
    arrived = counters(y, plan.results)
    _launcher.launch(plan, y, x, prev, out, mean, part, arrived, float(eps))
    return mean


def _mean_of_empty(y: Tensor, eps: float, per_sample: bool) -> float:
    """Rows of width 0 have the ratio 0 / (0 + eps); the mean over no rows is NaN."""
    rows = y.shape[1 if per_sample else 0 : -1].numel()
    return 0.0 if rows and eps else float("nan")
