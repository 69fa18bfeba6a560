"""MagCache calibration: the mean ratio of residual norms per token; may store the residual.

Squares are summed in float32, so norms hold for values between about 1e-18 and 1e+17 in size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import WARPS, cdiv, on_device, row_tile, samples
from .reduction import program_count, sum_partials

# Elements per tile. With the number of programs it defines the bits of the result.
TILE = 2048


@triton.jit(do_not_specialize=["rows", "programs", "count"])
def _residual_magnitude_kernel(
    p_y,
    p_x,
    p_prev,
    p_out,
    p_part,
    s_y,
    s_x,
    s_prev,
    s_out,
    rows,
    width,
    eps,
    programs,
    count,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
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
    p_part += (i_g // count).to(tl.int64) * count + i_g % count
    tl.store(p_part, tl.sum(b_ratio, axis=0))


def residual_magnitude(
    y: Tensor,
    x: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    eps: float = 1e-8,
    per_sample: bool = False,
) -> Tensor:
    """float32 [1]: mean over tokens of |r| / (|prev| + eps) for r = y - x; [B, 1] per sample.

    Norms are over the last dimension. r is rounded to the dtype of `prev`; `out` receives it and
    may be `prev`. Source: MagCache (arXiv 2506.09045).
    """
    shape = (y.shape[0], 1) if per_sample else (1,)
    width = y.shape[-1]
    if not y.numel():
        return _mean_of_empty(y, shape, eps, per_sample)
    groups, n, (s_y, s_x, s_prev, s_out) = samples([y, x, prev, out], per_sample)
    rows = n // width
    rows_tile, cols_tile = row_tile(width, TILE)
    each = program_count(cdiv(rows, rows_tile))
    count = each if per_sample else groups * each
    with on_device(y):
        mean = torch.empty(shape, dtype=torch.float32, device=y.device)
        part = torch.empty((mean.numel(), count), dtype=torch.float32, device=y.device)
        _residual_magnitude_kernel[(groups * each,)](
            y,
            x,
            prev,
            out,
            part,
            s_y,
            s_x,
            s_prev,
            s_out,
            rows,
            width,
            float(eps),
            each,
            count,
            ROWS=rows_tile,
            COLS=cols_tile,
            num_warps=WARPS,
        )
        sum_partials(mean, part, 1.0 / (rows if per_sample else groups * rows))
    return mean


def _mean_of_empty(y: Tensor, shape: tuple[int, ...], eps: float, per_sample: bool) -> Tensor:
    """Rows of width 0 have the ratio 0 / (0 + eps); the mean over no rows is NaN."""
    rows = y.shape[1 if per_sample else 0 : -1].numel()
    value = 0.0 if rows and eps else float("nan")
    return torch.full(shape, value, dtype=torch.float32, device=y.device)
