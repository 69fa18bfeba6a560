# SPDX-License-Identifier: Apache-2.0
"""Sums over all programs of a launch, in fixed order, in that launch.

A reduction runs P = min(ceil(n / block), PROGRAMS) programs per result, which depends on the shape
alone. Each writes its partial sums and then counts itself; the last to arrive adds up the partials
of all, by index. Which program that is does not matter: equal inputs give equal bits on every run
and every GPU. No float is added atomically.

The count is released and acquired at the scope of the GPU: what a program wrote before it counted
itself, the last one reads. It then sets the counter back to zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 512 programs of 256 threads are one wave on 132 multiprocessors at up to 64 registers a thread.
PROGRAMS = 512


def spread(
    items: int, samples: int, per_sample: bool, share: float = 1.0
) -> tuple[int, tuple[int, int]]:
    """(programs per sample, (results, programs per result)) for samples of `items` blocks or tiles.

    All samples of one result share PROGRAMS, or a share of it; each result of several has as many.
    """
    most = int(share * PROGRAMS)
    if per_sample:
        each = min(items, most)
        return each, (samples, each)
    each = min(items, max(1, most // samples))
    return each, (1, samples * each)


def result(like: Tensor, width: int, per_sample: bool, given: Tensor | None) -> Tensor:
    """Where the float32 sums of a launch go: what was given, else a new [width], or [B, width] per sample."""
    if given is None:
        return like.new_empty((like.shape[0], width) if per_sample else width, dtype=torch.float32)
    return given


@triton.jit
def add_up(
    p_out, p_part, p_counter, count, scale, SUMS: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr
):
    """p_out[i] <- scale * sum_p p_part[i, p], in the last of `count` programs that call this.

    p_part: [SUMS, count], written by these programs. ROWS: the power of 2 from SUMS on. P: that of
    the partials added at a time.
    """
    tl.debug_barrier()  # the partials of all threads come before the count
    if tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu") == count - 1:
        o_s = tl.arange(0, ROWS)  # [ROWS]
        b_sum = tl.zeros([ROWS, P], p_part.dtype.element_ty)
        for i in range(0, count, P):
            o_p = i + tl.arange(0, P)  # [P]
            m_p = (o_s < SUMS)[:, None] & (o_p < count)[None, :]
            p_p = p_part + o_s[:, None] * count + o_p[None, :]
            # other programs wrote them: not from the first cache
            b_sum += tl.load(p_p, mask=m_p, other=0.0, cache_modifier=".cg")
        tl.store(p_out + o_s, tl.sum(b_sum, axis=1) * scale, mask=o_s < SUMS)
        tl.store(p_counter, 0)
