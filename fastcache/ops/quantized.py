# SPDX-License-Identifier: Apache-2.0
"""Values kept in float8, with a scale per token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .checks import MAX_TERMS, check, check_out
from .registry import define, same_shapes


def _quantize_store_(q: Tensor, scale: Tensor, y: Tensor, x: Tensor | None = None) -> None:
    given = [y, q] if x is None else [y, x, q]
    run, (y, *rest, q) = dispatch.resolve("quantize_store", given, 1)
    dense = scale.contiguous()
    run(q, dense, y, *rest)
    if dense is not scale:
        scale.copy_(dense)


def _fake_quantize_store_(q: Tensor, scale: Tensor, y: Tensor, x: Tensor | None = None) -> None:
    same_shapes("quantize_store_", y, q)
    torch._check(
        scale.shape == y.shape[:-1], lambda: f"scale {tuple(scale.shape)}, y {tuple(y.shape)}"
    )


define(
    "_quantize_store_(Tensor(a!) q, Tensor(b!) scale, Tensor y, Tensor? x=None) -> ()",
    _quantize_store_,
    _fake_quantize_store_,
)


def _quantized_combine_(
    out: Tensor,
    base: Tensor | None,
    qs: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float],
) -> None:
    given = [*qs, out] if base is None else [*qs, base, out]
    run, (*terms, out) = dispatch.resolve("quantized_combine", given, 1)
    base = None if base is None else terms.pop()
    run(out, base, terms, [s.contiguous() for s in scales], weights)


def _fake_quantized_combine_(
    out: Tensor,
    base: Tensor | None,
    qs: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float],
) -> None:
    same_shapes("quantized_combine_", out, *qs)
    torch._check(
        len(qs) == len(scales) == len(weights), lambda: f"{len(qs)} tensors, {len(weights)} weights"
    )


define(
    "_quantized_combine_(Tensor(a!) out, Tensor? base, Tensor[] qs, Tensor[] scales, float[] weights) -> ()",
    _quantized_combine_,
    _fake_quantized_combine_,
)


def quantize_store(
    y: Tensor, x: Tensor | None = None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """y - x (or y) as float8 e4m3 with one float32 scale per token; a quarter of float32.

    Args:
        y, x: [..., tokens, width]; without x, y itself.
        out: (q, scale) to write into; None: new tensors.
    Returns:
        (q, scale): float8_e4m3fn of the same shape, and float32 [..., tokens], max |r| / 448. The relative error of
        normal data is 2.7 % rms, at most 1/28 of the token's largest value.
    Raises:
        TypeError, ValueError: that names the argument.
    """
    check("quantize_store", y=y, **({} if x is None else {"x": x}))
    if y.dim() < 1:
        raise ValueError("quantize_store: y is a 0-d tensor, must be [..., width]")
    if out is None:
        out = (
            torch.empty(y.shape, dtype=torch.float8_e4m3fn, device=y.device),
            torch.empty(y.shape[:-1], dtype=torch.float32, device=y.device),
        )
    q, scale = out
    for name, t, dtype, shape in (
        ("out[0]", q, torch.float8_e4m3fn, y.shape),
        ("out[1]", scale, torch.float32, y.shape[:-1]),
    ):
        if not isinstance(t, Tensor) or t.dtype != dtype or t.shape != shape:
            raise ValueError(f"quantize_store: {name} must be a {dtype} tensor {tuple(shape)}")
        check_out(f"quantize_store: {name}", t, y=y, **({} if x is None else {"x": x}))
    torch.ops.fastcache._quantize_store_.default(q, scale, y, x)
    return q, scale


def quantized_combine(
    base: Tensor | None,
    qs: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[float],
    out: Tensor,
) -> Tensor:
    """out <- base + sum_i weights[i] * scales[i] * qs[i], values stored by `quantize_store`.

    Args:
        base: of the shape and dtype of out; None: zero.
        qs, scales: what `quantize_store` has returned, in the same order.
        weights: as many Python floats.
        out: [..., tokens, width], written to.
    Returns:
        `out`.
    Raises:
        TypeError, ValueError: that names the argument.
    """
    check("quantized_combine", out=out, **({} if base is None else {"base": base}))
    if not 1 <= len(qs) <= MAX_TERMS - 1 or not len(qs) == len(scales) == len(weights):
        raise ValueError(
            f"quantized_combine: qs, scales and weights must be 1 to {MAX_TERMS - 1} each, got "
            f"{len(qs)}, {len(scales)}, {len(weights)}"
        )
    for i, (q, scale) in enumerate(zip(qs, scales, strict=True)):
        if q.dtype != torch.float8_e4m3fn or q.shape != out.shape:
            raise ValueError(f"quantized_combine: qs[{i}] must be float8_e4m3fn {tuple(out.shape)}")
        if scale.dtype != torch.float32 or scale.shape != out.shape[:-1]:
            raise ValueError(
                f"quantized_combine: scales[{i}] must be float32 {tuple(out.shape[:-1])}"
            )
    check_out("quantized_combine", out, **({} if base is None else {"base": base}))
    torch.ops.fastcache._quantized_combine_.default(
        out, base, list(qs), list(scales), [float(w) for w in weights]
    )
    return out
