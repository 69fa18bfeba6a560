# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels: the functions of `reference.py`, under the same names.

Built only where nvcc and a CUDA build of torch are present; none of it has run on a GPU yet. The
shared object holds the operators `fastcache_cuda::*`: both metrics in a single launch each, and
weighted sums of tensors of one dtype, five a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .. import reference
from ..passes import in_passes
from ..reference import guidance_combine, taylor_update
from ..results import sums_for
from . import cpp

__all__ = [
    "available",
    "guidance_combine",
    "linear_combine",
    "residual_apply",
    "residual_l1",
    "residual_magnitude",
    "residual_store",
    "takes_dtypes",
    "taylor_update",
]


LIBRARY = Path(__file__).parents[2] / "_cuda_ops.so"


TERMS = 5  # of one launch, csrc/cuda/kernels.h


BLOCKS = 512  # of a reduction, csrc/cuda/kernels.h


@cache
def available() -> bool | str:
    """True, or the reason why these kernels cannot run."""
    if cpp.switched_off():
        return cpp.SWITCHED_OFF
    if not LIBRARY.exists():
        return (
            "extension not built: with nvcc and a CUDA build of torch, "
            "FASTCACHE_BUILD_CUDA=1 pip install --no-build-isolation ."
        )
    if not torch.cuda.is_available():
        return "no GPU is visible"
    return cpp.load(LIBRARY)


@cache
def _op(name: str) -> Callable[..., None]:
    reason = available()
    if reason is not True:
        raise RuntimeError(f"CUDA kernels: {reason}")
    return getattr(torch.ops.fastcache_cuda, name).default


def _scratch(y: Tensor) -> Tensor:
    """Memory for the partial sums of a reduction, of this call alone (`scratch_of` in kernels.h)."""
    return y.new_empty(1 + 2 * max(BLOCKS, y.shape[0] if y.dim() else 1), dtype=torch.float64)


def takes_dtypes(op: str, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether `op` takes tensors of these dtypes: one for all of them."""
    if op in ("guidance_combine", "taylor_update"):
        return True
    return cpp.DTYPES.issuperset(dtypes) and len(set(dtypes)) == 1


def residual_l1(
    y: Tensor,
    x: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    per_sample: bool = False,
    sums: Tensor | None = None,
) -> Tensor:
    if not y.numel():
        return reference.residual_l1(y, x, prev, out, per_sample, sums)
    sums = sums_for(y, 2, per_sample, sums)
    _op("residual_l1")(sums, _scratch(y), y, x, prev, out, per_sample)
    return sums


def residual_magnitude(
    y: Tensor,
    x: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    eps: float = 1e-8,
    per_sample: bool = False,
    mean: Tensor | None = None,
) -> Tensor:
    if not y.numel():
        return reference.residual_magnitude(y, x, prev, out, eps, per_sample, mean)
    mean = sums_for(y, 1, per_sample, mean)
    _op("residual_magnitude")(mean, _scratch(y), y, x, prev, out, eps, per_sample)
    return mean


def residual_store(out: Tensor, y: Tensor, x: Tensor) -> None:
    linear_combine(out, (y, x), (1.0, -1.0))


def residual_apply(out: Tensor, x: Tensor, r: Tensor) -> None:
    linear_combine(out, (x, r), (1.0, 1.0))


def linear_combine(
    out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float] | Tensor
) -> None:
    if out.numel():
        op = "linear_combine_device" if isinstance(weights, Tensor) else "linear_combine"
        in_passes(_op(op), TERMS, out, tensors, weights)
