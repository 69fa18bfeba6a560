# SPDX-License-Identifier: Apache-2.0
"""Sums have equal bits only where the compiler lays out their reductions alike: read off its code.

A sum over a block is a tree whose shape follows from the layout of the tensor in registers. Two
variants of one kernel (with and without a stored residual, a batch and a sample of it) promise equal
bits, and the interpreter cannot tell whether they keep it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def reductions(launch: Callable[[], object]) -> list[str]:
    """Operand types of all reductions of the one kernel that is launched, layouts written out."""
    from fastcache.triton_kernels import aot

    with aot.compile_only(90) as compiled:
        launch()
    ((_, kernel),) = compiled
    text = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", text, re.MULTILINE))
    found = re.findall(r"\}\) : \((tensor<.*?>)\) -> ", text)
    for name, layout in layouts.items():
        found = [re.sub(rf"{name}\b", lambda _, to=layout: to, operand) for operand in found]
    assert found and "#ttg." in found[0]
    return found


def draw(dtype: torch.dtype, width: int, layout: str) -> list[Tensor]:
    """Four tensors of [3, 50, width]."""
    if layout == "range":
        shape = (3, 57, width)
        return [torch.empty(shape, dtype=dtype, device="meta")[:, 3:53] for _ in range(4)]
    start = 1 if layout == "odd" else 0
    flat = [torch.empty(3 * 50 * width + 1, dtype=dtype, device="meta") for _ in range(4)]
    return [t[start : start + 3 * 50 * width].view(3, 50, width) for t in flat]


LAYOUTS = ("dense", "odd", "range")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_storing_the_residual_does_not_change_the_sums(dtype: torch.dtype, layout: str) -> None:
    from fastcache import triton_kernels as kernels

    y, x, prev, out = draw(dtype, 304, layout)
    for op in (kernels.residual_l1, kernels.residual_magnitude):
        plain = reductions(lambda op=op: op(y, x, prev))
        assert plain == reductions(lambda op=op: op(y, x, prev, out))
        plain = reductions(lambda op=op: op(y, x, prev, None, per_sample=True))
        assert plain == reductions(lambda op=op: op(y, x, prev, out, per_sample=True))


def batch_and_sample(dtype: torch.dtype, width: int, layout: str) -> list[tuple[list, list]]:
    from fastcache import triton_kernels as kernels

    y, x, prev, other = draw(dtype, width, layout)
    one = [t[1:2] for t in (y, x, prev, other)]
    return [
        (
            reductions(lambda: kernels.residual_l1(y, x, prev, per_sample=True)),
            reductions(lambda: kernels.residual_l1(*one[:3])),
        ),
        (
            reductions(lambda: kernels.residual_magnitude(y, x, prev, per_sample=True)),
            reductions(lambda: kernels.residual_magnitude(*one[:3])),
        ),
        (
            reductions(lambda: kernels.guided_sums(y, [x, prev, other], True)),
            reductions(lambda: kernels.guided_sums(one[0], one[1:])),
        ),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_has_the_sums_that_it_has_in_a_batch(dtype: torch.dtype, layout: str) -> None:
    for batch, sample in batch_and_sample(dtype, 304, layout):
        assert batch == sample


def test_where_16_does_not_divide_a_sample_the_layouts_differ() -> None:
    """Why the tests of equal bits have rows of 304: with 300 the compiler sees other strides."""
    batch, sample = batch_and_sample(torch.float32, 300, "dense")[0]
    assert batch != sample
