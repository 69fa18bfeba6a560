"""The second stage of every reduction: the partial sums of all programs, added in fixed order.

Stage one runs P = min(ceil(n / block), PROGRAMS) programs per sample, which depends on the shape
alone; each writes one partial per sum. No atomics: equal inputs give equal bits on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# 512 programs of 256 threads are one wave on 132 multiprocessors at up to 64 registers a thread.
PROGRAMS = 512


def program_count(items: int) -> int:
    """Programs for one sample that has `items` blocks or row tiles."""
    return min(items, PROGRAMS)


@triton.jit(do_not_specialize=["count"])
def _sum_partials_kernel(p_out, p_part, scale, count, BLOCK: tl.constexpr):
    i_v = tl.program_id(0).to(tl.int64)
    b_sum = tl.zeros([BLOCK], p_part.dtype.element_ty)
    for i in range(0, count, BLOCK):
        o_p = i + tl.arange(0, BLOCK)  # [BLOCK]
        b_sum += tl.load(p_part + i_v * count + o_p, mask=o_p < count, other=0.0)
    tl.store(p_out + i_v, tl.sum(b_sum, axis=0) * scale)


def sum_partials(out: Tensor, part: Tensor, scale: float = 1.0) -> None:
    """out[i] <- scale * sum_p part[i, p]; part: [out.numel(), programs], of the dtype of `out`."""
    _sum_partials_kernel[(out.numel(),)](
        out, part, scale, part.shape[-1], BLOCK=PROGRAMS, num_warps=4
    )
