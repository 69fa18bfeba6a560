# SPDX-License-Identifier: Apache-2.0
"""First-block decision: both L1 sums in one pass over three tensors; may store the residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reduction
from .counters import counters
from .geometry import WARPS, cdiv, samples, widest
from .launcher import Launcher, Plan
from .reduction import add_up, result, spread

# BLOCK and the number of programs define the bits of the sums: neither depends on the GPU.
BLOCK = 4096


@triton.jit
def _l1_block(p_y, p_x, p_prev, p_out, o_n, m_n, BLOCK: tl.constexpr, FOLD: tl.constexpr):
    """|r - prev| and |prev| summed over FOLD neighbours; r goes to p_out."""
    b_y = tl.load(p_y + o_n, mask=m_n).to(tl.float32)
    b_x = tl.load(p_x + o_n, mask=m_n).to(tl.float32)
    b_prev = tl.load(p_prev + o_n, mask=m_n).to(tl.float32)
    b_r = (b_y - b_x).to(p_prev.dtype.element_ty)
    if p_out is not None:
        tl.store(p_out + o_n, b_r.to(p_out.dtype.element_ty), mask=m_n)
    b_change = tl.abs(b_r.to(tl.float32) - b_prev)
    b_old = tl.abs(b_prev)
    if m_n is not None:
        b_change = tl.where(m_n, b_change, 0.0)
        b_old = tl.where(m_n, b_old, 0.0)
    b_change = tl.sum(tl.reshape(b_change, [BLOCK // FOLD, FOLD]), axis=1)
    b_old = tl.sum(tl.reshape(b_old, [BLOCK // FOLD, FOLD]), axis=1)
    return b_change, b_old  # [BLOCK / FOLD] each


@triton.jit(do_not_specialize=["programs", "count"])
def _residual_l1_kernel(
    p_y,
    p_x,
    p_prev,
    p_out,
    p_sums,
    p_part,
    p_counter,
    s_y,
    s_x,
    s_prev,
    s_out,
    n,
    programs,
    count,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,
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
    full = n // BLOCK
    b_change = tl.zeros([BLOCK // FOLD], tl.float32)
    b_old = tl.zeros([BLOCK // FOLD], tl.float32)
    for i_n in range(i_p, full, programs):
        o_n = tl.cast(i_n, tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        change, old = _l1_block(p_y, p_x, p_prev, p_out, o_n, None, BLOCK, FOLD)
        b_change += change
        b_old += old
    if full % programs == i_p:
        # the tail ends below the next multiple of BLOCK: no overflow in the type of n
        o_n = full * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        change, old = _l1_block(p_y, p_x, p_prev, p_out, o_n, o_n < n, BLOCK, FOLD)
        b_change += change
        b_old += old
    i_r = (i_g // count).to(tl.int64)  # which result
    p_all = p_part + i_r * (2 * count)
    p_part = p_all + i_g % count
    tl.store(p_part, tl.sum(b_change, axis=0))
    tl.store(p_part + count, tl.sum(b_old, axis=0))
    add_up(p_sums + 2 * i_r, p_all, p_counter + i_r, count, 1.0, 2, 2, PROGRAMS)


def _plan(tensors: Sequence[Tensor | None], per_sample: bool) -> Plan:
    groups, n, strides = samples(tensors[:4], per_sample)
    each, (results, count) = spread(cdiv(n, BLOCK), groups, per_sample)
    fold = 16 // widest([t for t in tensors[:3] if t is not None])
    numbers = (*strides, n, each, count, BLOCK, fold, reduction.PROGRAMS)
    return Plan(groups * each, numbers, results, 2 * results * count)


_launcher = Launcher(_residual_l1_kernel, _plan, num_warps=WARPS)


def residual_l1(
    y: Tensor,
    x: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    per_sample: bool = False,
    sums: Tensor | None = None,
) -> Tensor:
    """float32 [2]: sum |r - prev| and sum |prev|; [B, 2] per sample. `out` receives r = y - x.

    r is rounded to the dtype of `prev` first. sums: where to put the result, contiguous.
    Source: FirstBlockCache, diffusers 0.42.1.
    """
    if not y.numel():
        return result(y, 2, per_sample, sums).zero_()
    plan = _launcher.plan((y, x, prev, out, sums), per_sample)
    sums = result(y, 2, per_sample, sums)
    part = y.new_empty(plan.partials, dtype=torch.float32)
    _launcher.launch(plan, y, x, prev, out, sums, part, counters(y, plan.results))
    return sums
