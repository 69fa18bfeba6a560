# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels for CPU tensors: the functions of `reference.py`, under the same names.

The shared object holds the operators `fastcache_C::*`. It is loaded on first use, never at import.
Every tensor may be float32, float16 or bfloat16, independently of the others within the limits of
`takes_dtypes`; each is contiguous or dense within its samples (a token range of [B, T, C]), guides
also within their rows alone (every k-th token). What lies in another order of dimensions comes here
as a view that is so: `dispatch.resolve` sees to it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..results import sums_for, weights_for

LIBRARY = Path(__file__).parents[2] / "_cpu_ops.so"


DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


CPU = torch.device("cpu")


SWITCHED_OFF = "switched off by FASTCACHE_DISABLE_EXT=1"


def switched_off() -> bool:
    return os.environ.get("FASTCACHE_DISABLE_EXT") == "1"


def load(library: Path) -> bool | str:
    """True, or the reason why a shared object does not load."""
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"extension does not load: {error.__cause__ or error}"  # torch names only the path
    return True


@cache
def available() -> bool | str:
    """True, or the reason why these kernels cannot run."""
    if switched_off():
        return SWITCHED_OFF
    if not LIBRARY.exists():
        return (
            "extension not built: reinstall with a C++ compiler: pip install --no-build-isolation ."
        )
    loaded = load(LIBRARY)
    if loaded is True:
        try:
            torch.ops.fastcache_C.capability()
        except RuntimeError as error:  # FASTCACHE_CPU_CAPABILITY asks for the impossible
            return str(error)
    return loaded


@cache
def _op(name: str) -> Callable[..., None]:
    reason = available()
    if reason is not True:
        raise RuntimeError(f"C++ kernels: {reason}")
    overload = getattr(torch.ops.fastcache_C, name).default
    return overload._op  # what the overload itself calls, from Python


def at_once(op: str, dtype: torch.dtype) -> tuple[Callable[..., Any], int] | None:
    """A function of the shared object past torch's dispatcher, and the number of a dtype there; None where it has none
    for this op or dtype.

    It takes addresses and checks nothing: its tensors have to be contiguous, on the CPU, of one shape and this dtype,
    and not empty.
    """
    if op not in BY_ADDRESS or dtype not in CODES:
        return None
    _op("capability")
    name, addresses, result = BY_ADDRESS[op]
    run = getattr(ctypes.CDLL(str(LIBRARY)), name)
    run.argtypes, run.restype = [ctypes.c_void_p] * addresses, result
    return run, CODES[dtype]


# By the op: the C function, how many addresses it takes, and its result. Dtypes by their number in layout.h.
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
BY_ADDRESS: dict[str, tuple[str, int, Any]] = {
    "residual_l1": ("fastcache_residual_l1", 3, ctypes.c_double),
    "linear_combine": ("fastcache_linear_combine", 4, None),
}


def capability() -> str:
    """The instruction set in use: "avx512", "avx2" or "default"."""
    _op("capability")
    return torch.ops.fastcache_C.capability()


def takes_dtypes(op: str, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether `op` takes tensors of these dtypes, in the order y, x, prev, out or y, *factors.

    Weighted sums (store, apply, linear and guidance combine) take any mix. The metrics want y like
    x and out like prev, the Taylor update factors of one dtype, guided sums cached guides of one.
    """
    if not DTYPES.issuperset(dtypes):
        return False
    if op in ("residual_l1", "residual_magnitude"):
        return dtypes[0] == dtypes[1] and len(set(dtypes[2:])) == 1
    if op == "modulated_l1":
        return len(set(dtypes[1:])) == 1
    return op not in ("taylor_update", "guided_sums") or len(set(dtypes[1:])) == 1


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
    _op("residual_l1")(sums, y, x, prev, out, per_sample)
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
    _op("residual_magnitude")(mean, y, x, prev, out, eps, per_sample)
    return mean


def modulated_l1(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    told = {scale.dtype, shift.dtype}
    if not x.numel() or told not in ({x.dtype}, {torch.float32}):
        return reference.modulated_l1(x, scale, shift, prev, out, eps)
    sums = torch.empty(2, dtype=torch.float32, device=CPU)
    _op("modulated_l1")(sums, x, scale.contiguous(), shift.contiguous(), prev, out, eps)
    return sums


def residual_store(out: Tensor, y: Tensor, x: Tensor) -> None:
    if out.numel():
        _op("add_scaled")(out, y, x, -1.0)


def residual_apply(out: Tensor, x: Tensor, r: Tensor) -> None:
    if out.numel():
        _op("add_scaled")(out, x, r, 1.0)


def linear_combine(
    out: Tensor, tensors: Sequence[Tensor], weights: Sequence[float] | Tensor
) -> None:
    if out.numel():
        floats = weights.tolist() if isinstance(weights, Tensor) else weights
        _op("linear_combine")(out, tensors, floats)


def combine_samples(out: Tensor, tensors: Sequence[Tensor], weights: Tensor) -> None:
    if out.numel():
        _op("combine_samples")(out, tensors, weights)


def taylor_update(factors: Sequence[Tensor], y: Tensor, inv_delta: float, valid: int) -> None:
    if y.numel():
        written = factors[: min(valid, len(factors) - 1) + 1]
        _op("taylor_update")(written, y, 1.0 / inv_delta if inv_delta else float("inf"))


def guidance_combine(
    out: Tensor, cond: Tensor, low: Tensor, high: Tensor, w_low: float, w_high: float
) -> None:
    if out.numel():
        _op("guidance_combine")(out, cond, low, high, w_low, w_high)


def guided_sums(guide: Tensor, guides: Sequence[Tensor], per_sample: bool = False) -> Tensor:
    if not guide.numel():
        return reference.guided_sums(guide, guides, per_sample)
    groups, order = guide.shape[0] if per_sample else 1, len(guides) - 1
    columns = order * (order + 3) // 2 + 1
    sums = torch.empty((groups, columns), dtype=torch.float64, device=CPU)
    _op("guided_sums")(sums, guide, guides, per_sample)
    return sums


def guided_solve(
    sums: Tensor,
    prior: Tensor,
    ridge: float,
    base: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    weights, misfit = out or weights_for(sums, prior.numel() + 1 + base)
    _op("guided_solve")(weights, misfit, sums.double(), prior.contiguous(), ridge)
    return weights, misfit


def guided_check(
    sums: Tensor,
    values: Sequence[Tensor],
    prior: Tensor,
    before: Tensor,
    ridge: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    weights, misfit = out or weights_for(sums, prior.numel() + 2)
    _op("guided_check")(
        weights, misfit, sums, values, prior.contiguous(), before.contiguous(), ridge
    )
    return weights, misfit


def exponential_solve(sums: Sequence[Tensor], reach: Tensor, ridge: float) -> Tensor:
    weights = torch.empty(4, dtype=torch.float32, device=CPU)
    _op("exponential_solve")(weights, sums, reach.contiguous(), ridge)
    return weights
