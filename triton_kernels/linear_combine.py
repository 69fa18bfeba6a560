# SPDX-License-Identifier: Apache-2.0
"""out <- sum_i weights[i] * tensors[i]: prediction, extrapolation, store, apply and guidance.

Products and sums are rounded separately and in order (no fused multiply-add), so float32 results
are those of the eager chain. Weights are Python floats, or a float32 tensor read on the device, a row per sample
where each has its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .geometry import WARPS, Table, cdiv, pick, samples, widest
from .launcher import Launcher, Plan

# Elements per program, by bytes times terms. Starting points, not yet tuned on a GPU.
BLOCKS: Table[int] = ((6, 4096), (16, 2048), (None, 1024))


@triton.jit
def _combine_block(
    p_out,
    p_copy,
    p_terms,
    weights,
    s_out,
    s_copy,
    s_terms,
    i_s,
    o_n,
    m_n,
    ON_DEVICE: tl.constexpr,
):
    b_first = tl.load(p_terms[0] + i_s * s_terms[0] + o_n, mask=m_n).to(tl.float32)
    b_out = b_first * (tl.load(weights) if ON_DEVICE else weights[0])
    for i in tl.static_range(1, len(p_terms)):
        b_term = tl.load(p_terms[i] + i_s * s_terms[i] + o_n, mask=m_n).to(tl.float32)
        b_out += b_term * (tl.load(weights + i) if ON_DEVICE else weights[i])
    if p_copy is not None:  # stores come last: the compiler moves no load across one
        tl.store(p_copy + i_s * s_copy + o_n, b_first.to(p_copy.dtype.element_ty), mask=m_n)
    tl.store(p_out + i_s * s_out + o_n, b_out.to(p_out.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["blocks"])
def _combine_kernel(
    p_out,
    p_copy,
    p_terms,
    weights,
    s_out,
    s_copy,
    s_terms,
    s_weights,
    n,
    blocks,
    ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_s = (tl.program_id(0) // blocks).to(tl.int64)
    i_n = (tl.program_id(0) % blocks).to(tl.int64)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    if ON_DEVICE:
        weights += i_s * s_weights
    if (i_n + 1) * BLOCK <= n:
        _combine_block(
            p_out, p_copy, p_terms, weights, s_out, s_copy, s_terms, i_s, o_n, None, ON_DEVICE
        )
    else:
        _combine_block(
            p_out, p_copy, p_terms, weights, s_out, s_copy, s_terms, i_s, o_n, o_n < n, ON_DEVICE
        )


def _plan(tensors: Sequence[Tensor | None]) -> Plan:
    out, copy, weights, *terms = tensors
    each = weights is not None and weights.dim() == 2
    count, n, (s_out, s_copy, *s_terms) = samples([out, copy, *terms], each)
    block = pick(BLOCKS, widest([t for t in (out, *terms) if t is not None]) * len(terms))
    blocks = cdiv(n, block)
    s_weights = len(terms) if each else 0
    numbers = (s_out, s_copy, tuple(s_terms), s_weights, n, blocks, weights is not None, block)
    return Plan(count * blocks, numbers)


_launcher = Launcher(_combine_kernel, _plan, num_warps=WARPS, enable_fp_fusion=False)


def _combine(
    out: Tensor,
    terms: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    copy: Tensor | None = None,
) -> None:
    if not out.numel():
        return
    if isinstance(weights, Tensor):
        plan = _launcher.plan((out, copy, weights, *terms))
        _launcher.launch(plan, out, copy, tuple(terms), weights)
    else:
        plan = _launcher.plan((out, copy, None, *terms))
        _launcher.launch(plan, out, copy, tuple(terms), tuple(map(float, weights)))


def linear_combine(
    out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float] | Tensor
) -> None:
    """out <- sum_i weights[i] * tensors[i], added in order; `out` may be one of the 1 to 8 tensors.

    A weight tensor is float32, dense, [len(tensors)], on the device of `out`.
    """
    _combine(out, tensors, weights)


def combine_samples(out: Tensor, tensors: Sequence[Tensor], weights: Tensor) -> None:
    """out[b] <- sum_i weights[b, i] * tensors[i][b], as `linear_combine`; weights: float32, dense, [B, terms]."""
    _combine(out, tensors, weights)


def residual_store(out: Tensor, y: Tensor, x: Tensor) -> None:
    """out <- y - x."""
    _combine(out, (y, x), (1.0, -1.0))


def residual_apply(out: Tensor, x: Tensor, r: Tensor) -> None:
    """out <- x + r; `out` may be `x`."""
    _combine(out, (x, r), (1.0, 1.0))


def guidance_combine(
    out: Tensor, cond: Tensor, low: Tensor, high: Tensor, w_low: float, w_high: float
) -> None:
    """out <- [cond + w_low * low + w_high * high ; cond] along dimension 0, cond read once.

    out: [2B, ...], cond, low, high: [B, ...]. Source: FasterCache (arXiv 2410.19355).
    """
    batch = cond.shape[0]
    _combine(out[:batch], (cond, low, high), (1.0, w_low, w_high), copy=out[batch:])
