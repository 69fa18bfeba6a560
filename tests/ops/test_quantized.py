# SPDX-License-Identifier: Apache-2.0
"""fp8 storage of cached values: how large the error is, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from fastcache import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_stored_residuals_is_that_of_three_mantissa_bits(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    y, x = (torch.randn(2, 64, 128, generator=g).to(dtype) for _ in range(2))
    q, scale = ops.quantize_store(y, x)
    r = y.float() - x.float()
    back = ops.quantized_combine(None, [q], [scale], [1.0], torch.empty_like(r))
    assert ((back - r).norm() / r.norm()).item() < 0.03
    largest = r.abs().amax(dim=-1, keepdim=True)
    assert ((back - r).abs() <= largest / 28 + 1e-6).all()


def test_a_sum_of_stored_values_on_a_base() -> None:
    base, first, second = (torch.randn(3, 5, 16) for _ in range(3))
    stored = [ops.quantize_store(t) for t in (first, second)]
    qs, scales = zip(*stored, strict=True)
    out = ops.quantized_combine(base, qs, scales, [2.0, -1.0], torch.empty_like(base))
    want = base.double()
    for (q, scale), weight in zip(stored, (2.0, -1.0), strict=True):
        want = want + weight * scale.double()[..., None] * q.double()
    assert torch.allclose(out.double(), want, rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_and_of_very_different_size_keep_their_own_scale() -> None:
    y = torch.stack([torch.zeros(8), torch.full((8,), 1e-6), torch.full((8,), 1e6)])
    q, scale = ops.quantize_store(y)
    back = ops.quantized_combine(None, [q], [scale], [1.0], torch.empty_like(y))
    assert torch.allclose(back, y, rtol=1e-6)


def test_wrong_arguments_are_named() -> None:
    y = torch.ones(2, 4)
    q, scale = ops.quantize_store(y)
    with pytest.raises(ValueError, match=r"out\[0\]"):
        ops.quantize_store(y, out=(y, scale))
    with pytest.raises(ValueError, match=r"scales\[0\]"):
        ops.quantized_combine(None, [q], [scale[:1]], [1.0], torch.empty_like(y))
    with pytest.raises(ValueError, match="weights"):
        ops.quantized_combine(None, [q], [scale], [], torch.empty_like(y))
    with pytest.raises(TypeError, match="y"):
        ops.quantize_store(y.double())


def test_fakes_agree_with_the_ops() -> None:
    """The schema part of opcheck multiplies its inputs, which torch 2.13 cannot do with float8."""
    y = torch.randn(2, 3, 8)
    q, scale = ops.quantize_store(y)
    arguments = (torch.empty_like(y), y, [q], [scale], [1.0])
    tests = ("test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.fastcache._quantized_combine_.default, arguments, test_utils=tests)
    opcheck(torch.ops.fastcache._quantize_store_.default, (q, scale, y, None), test_utils=tests)
