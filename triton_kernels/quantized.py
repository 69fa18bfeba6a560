# SPDX-License-Identifier: Apache-2.0
"""Quantised storage: residuals as float8 e4m3 with one float32 scale per token, and their sums.

A row that holds NaN or infinity comes back as NaN. The hardware converts where it can (compute
capability 8.9 and later), integer arithmetic elsewhere; both round to the nearest even value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import triton
import triton.language as tl
from torch import Tensor, uint8
from triton.language.target_info import cuda_capability_geq

from .geometry import WARPS, Table, cdiv, pick, row_tile, samples
from .launcher import Launcher, Plan

# The largest e4m3 value. A row whose largest magnitude is below TINY is stored as zeros with scale
# 1: its own scale would not be a normal float32.
MAX = tl.constexpr(448.0)
TINY = tl.constexpr(2.0**-117)

# (rows, columns) of one program by row width: a row is kept in registers up to the last limit.
STORE_TILES: Table[tuple[int, int]] = (
    (512, (8, 512)),
    (1024, (4, 1024)),
    (2048, (2, 2048)),
    (4096, (1, 4096)),
    (None, (1, 8192)),
)
# Elements per tile of the combination: one 16-byte load of e4m3 per thread.
TILE = 4096


@triton.jit
def _to_e4m3(b_v):
    """float32 with magnitude at most 448 (or NaN) as the bits of the nearest e4m3 value."""
    if cuda_capability_geq(8, 9):
        return b_v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    b_bits = b_v.to(tl.int32, bitcast=True)
    b_size = b_bits & 0x7FFFFFFF
    # normal: round off 20 mantissa bits; below 2**-6: adding 2**14 rounds to steps of 2**-9
    b_normal = ((b_size + 0x7FFFF + ((b_size >> 20) & 1)) >> 20) - (120 << 3)
    b_small = (b_size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    b_code = tl.where(b_size < (121 << 23), b_small, b_normal)
    b_code = tl.where(b_size > 0x7F800000, 0x7F, b_code)
    return (b_code | ((b_bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _from_e4m3(b_q):
    """The float32 values of e4m3 bits."""
    if cuda_capability_geq(8, 9):
        return b_q.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    b_code = b_q.to(tl.int32)
    b_size = b_code & 0x7F
    b_bits = tl.where(b_size == 0x7F, 0x7FC00000, b_size << 20) | ((b_code & 0x80) << 24)
    return b_bits.to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def _residual(p_y, p_x, o_n, m_n):
    b_r = tl.load(p_y + o_n, mask=m_n, other=0.0).to(tl.float32)
    if p_x is not None:
        b_r -= tl.load(p_x + o_n, mask=m_n, other=0.0).to(tl.float32)
    return b_r


@triton.jit
def _row_max(b_r):
    """Largest magnitude per row as float32 bits, which order like magnitudes, with NaN on top."""
    return tl.max(b_r.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _scales(b_bits):
    """(scale, 1 / scale) of rows whose largest magnitudes have these bits."""
    b_max = b_bits.to(tl.float32, bitcast=True)
    b_scale = tl.where(b_max < TINY, 1.0, tl.div_rn(b_max, MAX))
    return b_scale, tl.div_rn(1.0, b_scale)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _quantize_store_kernel(
    p_q,
    p_scale,
    p_y,
    p_x,
    s_q,
    s_scale,
    s_y,
    s_x,
    rows,
    width,
    tiles,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    i_s = (tl.program_id(0) // tiles).to(tl.int64)
    i_t = (tl.program_id(0) % tiles).to(tl.int64)
    p_q += i_s * s_q
    p_y += i_s * s_y
    if p_x is not None:
        p_x += i_s * s_x
    o_r = i_t * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_r = o_r < rows
    o_c = tl.arange(0, COLS)  # [COLS]
    o_n = o_r[:, None] * width + o_c[None, :]  # [ROWS, COLS]
    if ONE_TILE:
        m_n = m_r[:, None] & (o_c < width)[None, :]
        b_r = _residual(p_y, p_x, o_n, m_n)
        b_scale, b_inverse = _scales(_row_max(b_r))
        tl.store(p_q + o_n, _to_e4m3(b_r * b_inverse[:, None]), mask=m_n)
    else:
        b_max = tl.zeros([ROWS], tl.int32)
        for i_c in range(0, width, COLS):
            m_n = m_r[:, None] & (i_c + o_c < width)[None, :]
            b_max = tl.maximum(b_max, _row_max(_residual(p_y, p_x, o_n + i_c, m_n)))
        b_scale, b_inverse = _scales(b_max)
        for i_c in range(0, width, COLS):
            m_n = m_r[:, None] & (i_c + o_c < width)[None, :]
            b_r = _residual(p_y, p_x, o_n + i_c, m_n)
            tl.store(p_q + o_n + i_c, _to_e4m3(b_r * b_inverse[:, None]), mask=m_n)
    tl.store(p_scale + i_s * s_scale + o_r, b_scale, mask=m_r)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _quantized_combine_kernel(
    p_out,
    p_base,
    p_qs,
    p_scales,
    weights,
    s_out,
    s_base,
    s_qs,
    s_scales,
    rows,
    width,
    tiles,
    ON_DEVICE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    i_s = (tl.program_id(0) // tiles).to(tl.int64)
    i_t = (tl.program_id(0) % tiles).to(tl.int64)
    o_r = i_t * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_r = o_r < rows
    for i_c in range(0, width, COLS):
        o_c = i_c + tl.arange(0, COLS)  # [COLS]
        o_n = o_r[:, None] * width + o_c[None, :]  # [ROWS, COLS]
        m_n = m_r[:, None] & (o_c < width)[None, :]
        b_out = tl.zeros([ROWS, COLS], tl.float32)
        if p_base is not None:
            b_out += tl.load(p_base + i_s * s_base + o_n, mask=m_n).to(tl.float32)
        for i in tl.static_range(len(p_qs)):
            weight = tl.load(weights + i) if ON_DEVICE else weights[i]
            b_scale = tl.load(p_scales[i] + i_s * s_scales[i] + o_r, mask=m_r) * weight  # [ROWS]
            b_q = _from_e4m3(tl.load(p_qs[i] + i_s * s_qs[i] + o_n, mask=m_n))
            b_out += b_q * b_scale[:, None]
        tl.store(p_out + i_s * s_out + o_n, b_out.to(p_out.dtype.element_ty), mask=m_n)


def _store_plan(tensors: Sequence[Tensor | None]) -> Plan:
    q, scale, y, x = tensors
    count, n, (s_q, s_y, s_x) = samples([q, y, x])
    width = cast(Tensor, y).shape[-1]
    rows = n // width
    tile = pick(STORE_TILES, width)
    tiles = cdiv(rows, tile[0])
    (s_scale,) = _scale_strides([scale], count)
    numbers = (s_q, s_scale, s_y, s_x, rows, width, tiles, *tile, width <= tile[1])
    return Plan(count * tiles, numbers)


def _combine_plan(tensors: Sequence[Tensor | None], terms: int) -> Plan:
    out, base, weights, *rest = tensors
    qs, scales = rest[:terms], rest[terms:]
    count, n, (s_out, s_base, *s_qs) = samples([out, base, *qs])
    width = cast(Tensor, out).shape[-1]
    rows = n // width
    tile = row_tile(width, TILE)
    tiles = cdiv(rows, tile[0])
    strides = (s_out, s_base, tuple(s_qs), _scale_strides(scales, count))
    return Plan(count * tiles, (*strides, rows, width, tiles, weights is not None, *tile))


def _scale_strides(scales: Sequence[Tensor | None], count: int) -> tuple[int, ...]:
    return tuple(cast(Tensor, s).stride(0) if count > 1 else 0 for s in scales)


_store = Launcher(_quantize_store_kernel, _store_plan, num_warps=WARPS)
_combine = Launcher(
    _quantized_combine_kernel, _combine_plan, num_warps=WARPS, enable_fp_fusion=False
)


def quantize_store(q: Tensor, scale: Tensor, y: Tensor, x: Tensor | None = None) -> None:
    """scale <- max |r| / 448 per row, q <- r * (1 / scale) as e4m3, for r = y - x, or y without x.

    q: float8_e4m3fn of the shape of y. scale: float32, y.shape[:-1]; 1 for a row of zeros. Rows are
    along the last dimension.
    """
    if not y.numel():
        scale.fill_(1.0)
        return
    _store.launch(_store.plan((q, scale, y, x)), q.view(uint8), scale, y, x)


def quantized_combine(
    out: Tensor,
    base: Tensor | None,
    qs: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
) -> None:
    """out <- base + sum_i (weights[i] * scales[i][row]) * qs[i], in order; `out` may be `base`.

    qs, scales: 1 to 8 pairs as `quantize_store` wrote them. weights: as in `linear_combine`.
    """
    if not out.numel():
        return
    stored = tuple([q.view(uint8) for q in qs])
    if isinstance(weights, Tensor):
        plan = _combine.plan((out, base, weights, *qs, *scales), len(qs))
        _combine.launch(plan, out, base, stored, tuple(scales), weights)
    else:
        plan = _combine.plan((out, base, None, *qs, *scales), len(qs))
        _combine.launch(plan, out, base, stored, tuple(scales), tuple(map(float, weights)))
