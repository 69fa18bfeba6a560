# SPDX-License-Identifier: Apache-2.0
"""Backward differences in place: the refresh of TaylorSeer's factors in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .geometry import WARPS, cdiv, samples, widest
from .launcher import Launcher, Plan

# Bytes per program and tensor: one 16-byte load per thread, since divisions fill the registers.
BYTES = 4096


@triton.jit
def _taylor_block(p_factors, p_y, delta, s_factors, s_y, i_s, o_n, m_n):
    b_new = tl.load(p_y + i_s * s_y + o_n, mask=m_n).to(tl.float32)
    if len(p_factors) > 1:
        b_next = tl.load(p_factors[0] + i_s * s_factors[0] + o_n, mask=m_n).to(tl.float32)
    for j in tl.static_range(len(p_factors) - 1):
        b_old = b_next
        if j + 2 < len(p_factors):  # before the store, which the compiler moves no load across
            p_next = p_factors[j + 1] + i_s * s_factors[j + 1] + o_n
            b_next = tl.load(p_next, mask=m_n).to(tl.float32)
        p_factor = p_factors[j] + i_s * s_factors[j] + o_n
        tl.store(p_factor, b_new.to(p_factors[j].dtype.element_ty), mask=m_n)
        b_new = tl.div_rn(b_new - b_old, delta)
    p_last = p_factors[len(p_factors) - 1] + i_s * s_factors[len(p_factors) - 1] + o_n
    tl.store(p_last, b_new.to(p_last.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["blocks"])
def _taylor_kernel(p_factors, p_y, delta, s_factors, s_y, n, blocks, BLOCK: tl.constexpr):
    i_s = (tl.program_id(0) // blocks).to(tl.int64)
    i_n = (tl.program_id(0) % blocks).to(tl.int64)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    if (i_n + 1) * BLOCK <= n:
        _taylor_block(p_factors, p_y, delta, s_factors, s_y, i_s, o_n, None)
    else:
        _taylor_block(p_factors, p_y, delta, s_factors, s_y, i_s, o_n, o_n < n)


def _plan(tensors: Sequence[Tensor]) -> Plan:
    count, n, (s_y, *s_factors) = samples(tensors)
    block = BYTES // widest(tensors)
    blocks = cdiv(n, block)
    return Plan(count * blocks, (tuple(s_factors), s_y, n, blocks, block))


_launcher = Launcher(_taylor_kernel, _plan, num_warps=WARPS)


def taylor_update(factors: Sequence[Tensor], y: Tensor, inv_delta: float, valid: int) -> None:
    """In place: f[0] <- y, f[j+1] <- (new f[j] - old f[j]) * inv_delta for j < min(valid, K).

    factors: K+1 tensors of the shape of y; the first `valid` held data before the call. New factors
    enter the next difference unrounded, and the product is a division by float(1 / inv_delta).
    Source: TaylorSeer (arXiv 2503.06923), diffusers 0.42.1.
    """
    if not y.numel():
        return
    written = tuple(factors[: min(valid, len(factors) - 1) + 1])
    delta = 1.0 / inv_delta if inv_delta else float("inf")
    _launcher.launch(_launcher.plan((y, *written)), written, y, delta)
