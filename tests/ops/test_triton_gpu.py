# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels run on a GPU: every interpreter case, and what only a GPU can show.

Skipped without one. These tests have not been run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_triton_interpreter import CASES, run
from torch import Tensor

from fastcache.ops import reference

triton_kernels = pytest.importorskip("fastcache.triton_kernels")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str) -> None:
    failure = run(name, triton_kernels, "cuda")
    assert not failure, failure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4608, 3072), (2, 4096, 3072), (17776, 3072)], ids=str)
def test_model_shapes_match_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y, x, prev = (draw(*shape, dtype=dtype) for _ in range(3))
    out, want = torch.empty_like(y), torch.empty_like(y)
    got = triton_kernels.residual_l1(y, x, prev, out)
    torch.testing.assert_close(got, reference.residual_l1(y, x, prev, want), rtol=2e-6, atol=0)
    assert torch.equal(out, want)
    got = triton_kernels.residual_magnitude(y, x, prev)
    torch.testing.assert_close(got, reference.residual_magnitude(y, x, prev), rtol=2e-6, atol=0)
    states = [t if t.dim() == 3 else t[None] for t in (y, prev, out, want)]
    rows = states[0][:1, :1]
    got = triton_kernels.modulated_l1(states[0], rows, rows, *states[1:3])
    expected = reference.modulated_l1(states[0], rows, rows, states[1], states[3])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(out, want)
    triton_kernels.linear_combine(out, [y, x, prev], [1.5, -0.75, 0.3])
    reference.linear_combine(want, [y, x, prev], [1.5, -0.75, 0.3])
    assert torch.equal(out, want)
    each = draw(y.shape[0], 3, dtype=torch.float32)
    triton_kernels.combine_samples(out, [y, x, prev], each)
    reference.combine_samples(want, [y, x, prev], each)
    assert torch.equal(out, want)


def test_reductions_repeat_bit_for_bit() -> None:
    y, x, prev = (draw(4608, 3072) for _ in range(3))
    for op in (triton_kernels.residual_l1, triton_kernels.residual_magnitude):
        first = op(y, x, prev)
        assert all(torch.equal(first, op(y, x, prev)) for _ in range(50))


def test_launches_follow_the_current_stream() -> None:
    y, x, prev = (draw(2048, 3072, dtype=torch.float32) for _ in range(3))
    late = torch.zeros_like(y)
    want = triton_kernels.residual_l1(y, x, prev)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(y)
        got = triton_kernels.residual_l1(late, x, prev)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)


def test_counters_lie_outside_torchs_memory_and_are_left_at_zero() -> None:
    from fastcache.triton_kernels import counters

    y, x, prev = (draw(2, 64, 3072) for _ in range(3))
    triton_kernels.residual_l1(y, x, prev, per_sample=True)
    pool = counters._pools[y.device]
    assert len(pool.memory) == counters.COUNTERS and not pool.memory.any()
    owned = torch.cuda.memory_snapshot()
    at = pool.memory.data_ptr()
    assert not any(s["address"] <= at < s["address"] + s["total_size"] for s in owned)


def test_reductions_of_several_streams_and_graphs_overlap() -> None:
    """Their counters are apart: every result is that of a launch alone."""
    tensors = [draw(2, 4096, 3072) for _ in range(3)]
    calls = (
        lambda: triton_kernels.residual_l1(*tensors, per_sample=True),
        lambda: triton_kernels.residual_magnitude(*tensors),
        lambda: triton_kernels.guided_sums(tensors[0], tensors[1:]),
        lambda: triton_kernels.modulated_l1(tensors[0], *[tensors[1]] * 2, tensors[2]),
    )
    want = [call() for call in calls]
    torch.cuda.synchronize()
    graphs, captured = [], []
    for call in (*calls, *calls):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            captured.append(call())
    streams = [torch.cuda.Stream() for _ in graphs]
    eager = []
    for _ in range(20):
        for i, (graph, stream) in enumerate(zip(graphs, streams, strict=True)):
            with torch.cuda.stream(stream):
                graph.replay()
                eager.append((calls[i % 4](), want[i % 4]))
    torch.cuda.synchronize()
    assert all(torch.equal(got, expected) for got, expected in eager)
    assert all(torch.equal(c, want[i % 4]) for i, c in enumerate(captured))


def test_a_launch_past_the_jit_computes_what_the_jit_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcache.triton_kernels import launcher

    assert launcher.knows_this_triton()
    plans = []
    launch = launcher.Launcher.launch
    monkeypatch.setattr(
        launcher.Launcher,
        "launch",
        lambda self, plan, *args: (plans.append(plan), launch(self, plan, *args)),
    )
    y, x, prev, out = (draw(3, 129, 512) for _ in range(4))
    results = [triton_kernels.residual_l1(y, x, prev, out) for _ in range(3)]
    assert plans[0] is plans[2] and plans[0].compiled is not None
    monkeypatch.setattr(launcher, "_WATCHES", ([True],))
    assert all(torch.equal(r, triton_kernels.residual_l1(y, x, prev, out)) for r in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_follow_the_device_of_the_tensors() -> None:
    y, x, prev = (draw(512, 3072, device="cuda:1") for _ in range(3))
    with torch.cuda.device(0):
        got = triton_kernels.residual_l1(y, x, prev)
    torch.testing.assert_close(got, reference.residual_l1(y, x, prev), rtol=2e-6, atol=0)


def graph_calls(y: Tensor, x: Tensor, prev: Tensor, out: Tensor) -> dict[str, Callable]:
    """Each op on static tensors; returns what it computed."""
    weights = torch.tensor([1.0, -0.5, 2.0], device="cuda")
    prior = torch.tensor([0.5], device="cuda")

    def combine() -> Tensor:
        triton_kernels.linear_combine(out, [y, x, prev], weights)
        return out

    def guided() -> Tensor:
        sums = triton_kernels.guided_sums(y, [x, prev])
        solved, misfit = triton_kernels.guided_solve(sums, prior, 0.003)
        triton_kernels.linear_combine(out, [x, prev], solved[0])
        return torch.cat([out.flatten()[:64].float(), misfit])

    def checked() -> Tensor:
        sums, known = (
            triton_kernels.guided_sums(*t) for t in ((y, [x, prev, out]), (x, [y, prev]))
        )
        weights, misfit = triton_kernels.guided_check(sums, [known], prior.repeat(2), prior, 0.003)
        return torch.cat([weights[0], misfit])

    def exponential() -> Tensor:
        sums = triton_kernels.guided_sums(y, [x, prev, out])
        return triton_kernels.exponential_solve([sums], prior, 0.003)

    return {
        "checked": checked,
        "exponential": exponential,
        "l1": lambda: triton_kernels.residual_l1(y, x, prev, out),
        "magnitude": lambda: triton_kernels.residual_magnitude(y, x, prev),
        "combine": combine,
        "guided": guided,
    }


@pytest.mark.parametrize("name", ["l1", "magnitude", "combine", "guided", "checked", "exponential"])
def test_ops_replay_in_a_cuda_graph(name: str) -> None:
    tensors = [draw(2, 512, 3072) for _ in range(4)]
    call = graph_calls(*tensors)[name]
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        for t in tensors:
            t.normal_()
        graph.replay()
        replayed = captured.clone()
        assert torch.equal(replayed, call())


def test_offsets_beyond_2_to_the_31() -> None:
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 8 * n:
        pytest.skip("needs about 17 GB of free GPU memory")
    x = torch.zeros(n, dtype=torch.float16, device="cuda")
    r = torch.zeros_like(x)
    x[-5000:], r[-5000:] = 1.0, 2.0
    triton_kernels.residual_apply(x, x, r)
    assert (x[-5000:] == 3.0).all() and not x[:-5000].any()
    sums = triton_kernels.residual_l1(x, r, r)
    torch.testing.assert_close(sums.cpu(), torch.tensor([5000.0, 10000.0]))
    rows = x[: 2**31].view(2, 2**20, 1024)[:, -64:]
    rows.fill_(1.0)
    triton_kernels.residual_apply(rows, rows, rows)
    assert (rows == 2.0).all()
