# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels on a GPU. Written without one: expect to correct the tests as well."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastcache.ops import reference
from fastcache.ops.backends import cuda

HEADER = Path(__file__).parents[2] / "csrc" / "cuda" / "kernels.h"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 7, 96), (2, 300, 513), (3, 129, 3072)]

gpu = pytest.mark.skipif(cuda.available() is not True, reason=str(cuda.available()))


def three(shape, dtype, offset=0, count=3):
    """Tensors of one shape, `offset` elements past an aligned address."""
    n = torch.Size(shape).numel()
    generator = torch.Generator("cuda").manual_seed(n)
    storage = torch.randn(count, n + offset, generator=generator, device="cuda").to(dtype)
    return [row[offset:].reshape(shape) for row in storage]


@pytest.mark.skipif(not HEADER.exists(), reason="needs the source tree")
def test_scratch_memory_has_the_size_that_the_kernels_expect():
    assert int(re.search(r"BLOCKS = (\d+)", HEADER.read_text())[1]) == cuda.BLOCKS
    assert "return 1 + 2 * (samples > BLOCKS ? samples : BLOCKS);" in HEADER.read_text()
    for shape, samples in (((3, 4), 3), ((4096, 2), 4096), ((), 1)):
        size = cuda._scratch(torch.empty(shape, device="meta")).numel()
        assert size == 1 + 2 * max(cuda.BLOCKS, samples)


def test_without_a_gpu_the_reason_is_said_and_a_call_repeats_it():
    if cuda.available() is True:
        pytest.skip("the kernels work here")
    x = torch.ones(4)
    with pytest.raises(RuntimeError, match=re.escape(str(cuda.available()))):
        cuda.residual_apply(x, x, x)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_metrics_and_stored_residuals_match_the_reference(dtype, shape, offset):
    y, x, prev = three(shape, dtype, offset)
    out, expected = torch.full_like(prev, torch.nan), torch.empty_like(prev)
    for per_sample in (False, True):
        truth = reference.residual_l1(y, x, prev, expected, per_sample)
        got = cuda.residual_l1(y, x, prev, out, per_sample)
        torch.testing.assert_close(got, truth, rtol=2e-6, atol=0)
        assert torch.equal(out, expected)
        truth = reference.residual_magnitude(y, x, prev, None, 1e-8, per_sample)
        got = cuda.residual_magnitude(y, x, prev, None, 1e-8, per_sample)
        torch.testing.assert_close(got, truth, rtol=2e-6, atol=0)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("offset", [0, 1])
def test_weighted_sums_have_the_bits_of_the_reference(dtype, count, offset):
    tensors = three((2, 300, 513), dtype, offset, count)
    weights = [0.3, -1.7, 2.2, 0.9, -0.4][:count]
    expected = torch.empty_like(tensors[0])
    reference.linear_combine(expected, tensors, weights)
    for given in (weights, torch.tensor(weights, device="cuda")):
        out = torch.full_like(expected, torch.nan)
        cuda.linear_combine(out, tensors, given)
        assert torch.equal(out, expected)


@gpu
def test_repeated_calls_and_overlapping_streams_give_the_same_bits():
    operands = three((3, 2000, 3072), torch.bfloat16)
    first = cuda.residual_l1(*operands)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 4]):
            results.append(cuda.residual_l1(*operands))
    torch.cuda.synchronize()
    assert all(torch.equal(r, first) for r in results)


@gpu
def test_captured_metrics_replay_beside_others():
    y, x, prev = three((2, 300, 512), torch.bfloat16)
    graphs, results = [], []
    for _ in range(3):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            results.append(cuda.residual_l1(y, x, prev))
    for scale in (1.0, 3.0):
        y.copy_(x + scale * prev)
        want = cuda.residual_l1(y, x, prev)
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in graphs]
        for _ in range(20):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            assert torch.equal(cuda.residual_l1(y, x, prev), want)
        torch.cuda.synchronize()
        assert all(torch.equal(r, want) for r in results)


@gpu
@pytest.mark.parametrize("per_sample", [False, True])
def test_results_go_where_they_are_wanted(per_sample):
    y, x, prev = three((3, 129, 512), torch.float32)
    for name, result in (("residual_l1", "sums"), ("residual_magnitude", "mean")):
        kernel = getattr(cuda, name)
        want = kernel(y, x, prev, per_sample=per_sample)
        got = torch.full_like(want, torch.nan)
        assert kernel(y, x, prev, per_sample=per_sample, **{result: got}) is got
        assert torch.equal(got, want)
