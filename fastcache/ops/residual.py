# SPDX-License-Identifier: Apache-2.0
"""Residuals of blocks: their change, their magnitude, stored and applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .checks import check, check_out, check_samples
from .registry import define, same_shapes
from .results import sums_for


def _fake(name: str, width: int = 0, results: int = 0) -> Callable[..., Tensor | None]:
    """The fake of an op on tensors of one shape.

    width: of the sums that it returns, in all or per sample; 0 where it returns nothing. results: how many
    tensors of another shape come first.
    """

    def fake(*args: Any) -> Tensor | None:
        tensors = [a for a in args[results:] if isinstance(a, Tensor)]
        same_shapes(name, *tensors)
        # per_sample comes last, or is left out where it is False
        return sums_for(tensors[0], width, args[-1] is True) if width else None

    return fake


def _residual_l1(y: Tensor, x: Tensor, prev: Tensor, per_sample: bool = False) -> Tensor:
    run, (y, x, prev) = dispatch.resolve("residual_l1", [y, x, prev], 0, per_sample)
    return run(y, x, prev, None, per_sample)


define(
    "residual_l1(Tensor y, Tensor x, Tensor prev, bool per_sample=False) -> Tensor",
    _residual_l1,
    _fake("residual_l1", 2),
)


def _residual_l1_(
    out: Tensor, y: Tensor, x: Tensor, prev: Tensor, per_sample: bool = False
) -> Tensor:
    run, (y, x, prev, out) = dispatch.resolve("residual_l1", [y, x, prev, out], 1, per_sample)
    return run(y, x, prev, out, per_sample)


define(
    "residual_l1_(Tensor(a!) out, Tensor y, Tensor x, Tensor prev, bool per_sample=False) -> Tensor",
    _residual_l1_,
    _fake("residual_l1_", 2),
)


def _residual_l1_into_(
    sums: Tensor, y: Tensor, x: Tensor, prev: Tensor, per_sample: bool = False
) -> None:
    run, (y, x, prev) = dispatch.resolve("residual_l1", [y, x, prev], 0, per_sample)
    run(y, x, prev, None, per_sample, sums)


define(
    "residual_l1_into_(Tensor(a!) sums, Tensor y, Tensor x, Tensor prev, bool per_sample=False) -> ()",
    _residual_l1_into_,
    _fake("residual_l1_into_", results=1),
)


def _residual_magnitude(
    y: Tensor, x: Tensor, prev: Tensor, eps: float = 1e-8, per_sample: bool = False
) -> Tensor:
    run, (y, x, prev) = dispatch.resolve("residual_magnitude", [y, x, prev], 0, per_sample)
    return run(y, x, prev, None, eps, per_sample)


define(
    "residual_magnitude(Tensor y, Tensor x, Tensor prev, float eps=1e-08, bool per_sample=False) -> Tensor",
    _residual_magnitude,
    _fake("residual_magnitude", 1),
)


def _residual_magnitude_(
    out: Tensor, y: Tensor, x: Tensor, prev: Tensor, eps: float = 1e-8, per_sample: bool = False
) -> Tensor:
    given = [y, x, prev, out]
    run, (y, x, prev, out) = dispatch.resolve("residual_magnitude", given, 1, per_sample)
    return run(y, x, prev, out, eps, per_sample)


define(
    "residual_magnitude_(Tensor(a!) out, Tensor y, Tensor x, Tensor prev, float eps=1e-08, "
    "bool per_sample=False) -> Tensor",
    _residual_magnitude_,
    _fake("residual_magnitude_", 1),
)


def _residual_store_(out: Tensor, y: Tensor, x: Tensor) -> None:
    run, (y, x, out) = dispatch.resolve("residual_store", [y, x, out], 1)
    run(out, y, x)


define(
    "residual_store_(Tensor(a!) out, Tensor y, Tensor x) -> ()",
    _residual_store_,
    _fake("residual_store_"),
)


def _residual_apply_(out: Tensor, x: Tensor, r: Tensor) -> None:
    run, (x, r, out) = dispatch.resolve("residual_apply", [x, r, out], 1)
    run(out, x, r)


define(
    "residual_apply_(Tensor(a!) out, Tensor x, Tensor r) -> ()",
    _residual_apply_,
    _fake("residual_apply_"),
)


def residual_l1(
    y: Tensor, x: Tensor, prev: Tensor, out: Tensor | None = None, *, per_sample: bool = False
) -> Tensor:
    """Sums of |r - prev| and |prev| for r = y - x rounded to the storage dtype, in one pass.

    Args:
        y, x, prev: output of a block, its input, the residual of an earlier step; one shape, dtype (float32,
            float16, bfloat16) and device.
        out: of the same shape, receives r, bit-exactly; None: r is not kept.
        per_sample: whether each sample has sums of its own.
    Returns:
        float32 [2], or [B, 2] with one row per sample. The first over the second is FirstBlockCache's relative L1
        change; both are returned so that ranks can add them up before they divide. Fixed summation order.
    Raises:
        TypeError, ValueError: that names the argument.
    Source: FirstBlockCache, diffusers 0.42.1.
    """
    if out is None:
        check("residual_l1", y=y, x=x, prev=prev)
        check_samples("residual_l1", y, per_sample)
        return torch.ops.fastcache.residual_l1.default(y, x, prev, per_sample)
    check("residual_l1", y=y, x=x, prev=prev, out=out)
    check_samples("residual_l1", y, per_sample)
    check_out("residual_l1", out, y=y, x=x, prev=prev)
    return torch.ops.fastcache.residual_l1_.default(out, y, x, prev, per_sample)


def residual_magnitude(
    y: Tensor,
    x: Tensor,
    prev: Tensor,
    out: Tensor | None = None,
    eps: float = 1e-8,
    *,
    per_sample: bool = False,
) -> Tensor:
    """Mean over tokens of |r|_2 / (|prev|_2 + eps) for r = y - x, norms over the last dimension.

    Args:
        y, x, prev: as in `residual_l1`, two dimensions or more.
        out: of the same shape, receives r; may be `prev`; None: r is not kept.
        eps: added to the norm, >= 0.
        per_sample: whether each sample has a mean of its own; then three dimensions or more.
    Returns:
        float32 [1], or [B, 1] with one row per sample.
    Raises:
        TypeError, ValueError: that names the argument.
    Source: MagCache (arXiv 2506.09045).
    """
    tensors = {"y": y, "x": x, "prev": prev} | ({} if out is None else {"out": out})
    check("residual_magnitude", **tensors)
    check_samples("residual_magnitude", y, per_sample)
    if y.dim() < 2:
        raise ValueError(
            f"residual_magnitude: y has shape {tuple(y.shape)}, must be [..., tokens, width]"
        )
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"residual_magnitude: eps is {eps!r}, must be a number >= 0")
    if out is None:
        return torch.ops.fastcache.residual_magnitude.default(y, x, prev, float(eps), per_sample)
    check_out("residual_magnitude", out, y=y, x=x, prev=prev)
    return torch.ops.fastcache.residual_magnitude_.default(out, y, x, prev, float(eps), per_sample)


def residual_store(y: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """out <- y - x, rounded once to the storage dtype.

    Args:
        y, x: of one shape and device.
        out: of the same shape, written to.
    Returns:
        `out`.
    Raises:
        TypeError, ValueError: that names the argument.
    """
    check("residual_store", y=y, x=x, out=out)
    check_out("residual_store", out, y=y, x=x)
    torch.ops.fastcache.residual_store_.default(out, y, x)
    return out


def residual_apply(x: Tensor, r: Tensor, out: Tensor | None = None) -> Tensor:
    """x + r.

    Args:
        x, r: of one shape and device.
        out: of the same shape, to write into; may be `x`; None: a new tensor.
    Returns:
        The sum: `out` where it is given.
    Raises:
        TypeError, ValueError: that names the argument.
    """
    if out is None:
        check("residual_apply", x=x, r=r)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    else:
        check("residual_apply", x=x, r=r, out=out)
        check_out("residual_apply", out, x=x, r=r)
    torch.ops.fastcache.residual_apply_.default(out, x, r)
    return out
