# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs around compiled steps. Written without a GPU at hand: not yet run on one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_compile import PlainModel, fresh
from test_static_addresses import METHODS as SCHEDULED
from test_static_addresses import STEPS
from torch import Tensor

import fastcache

gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.cuda is None, reason="needs a CUDA device"
)
METHODS = {  # with a threshold that the run crosses at every other step, so that each graph is needed
    **SCHEDULED,
    "first_block": lambda: fastcache.FirstBlockCacheConfig(0.027),
}


def run(cache: fastcache.Cache, call: Callable, start: Tensor, drift: Tensor) -> list[Tensor]:
    """A guided run; both branches of a step are held until it ends."""
    outputs = []
    for i in range(STEPS):
        held = []
        for context, scale in (("cond", 1.0), ("uncond", 0.5)):
            with cache.context(context, step_index=i), torch.no_grad():
                held.append(call((start + 0.02 * i * drift) * scale))
        outputs += [h.cpu() for h in held]
    return outputs


GRAPHED = [
    {"mode": "reduce-overhead"},
    {"cudagraphs": True},
    {"cudagraphs": True, "frozen": True},
    {"cudagraphs": "reuse"},
    {"cudagraphs": "reuse", "frozen": True},
]
CASES = [(method, options) for method in METHODS for options in GRAPHED]
CASES += [("first_block", {"on_device": True})]


def problem(device: str) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """A model, and the start and drift of its input."""
    torch.manual_seed(0)
    model = PlainModel(64).to(device).eval().requires_grad_(False)
    return model, torch.randn(1, 32, 64).to(device), torch.randn(1, 32, 64).to(device)


def test_first_block_computes_and_reuses_after_the_first_step() -> None:
    model, start, drift = problem("cpu")
    with fastcache.enable(model, METHODS["first_block"]()) as cache:
        run(cache, model, start, drift)
        later = [record.action for record in cache.stats if record.step]
    assert set(later) == {"compute", "reuse"}


@gpu
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore:fastcache. each of:UserWarning")
def test_replayed_steps_agree_with_eager(method: str, options: dict) -> None:
    fresh()
    model, start, drift = problem("cuda")
    with fastcache.enable(model, METHODS[method]()) as cache:
        expected = run(cache, model, start, drift)
    with fastcache.enable(model, METHODS[method]()) as cache:
        compiled = fastcache.compile(model, **options)
        held = "cudagraphs" in options
        runs = [
            run(cache, compiled if held else lambda x: compiled(x).clone(), start, drift)
            for _ in range(3)
        ]
        assert {r.action for r in cache.stats if r.step > 1} == {"compute", "reuse"}
    if "on_device" not in options:
        reused, probed = options.get("cudagraphs") == "reuse", method == "first_block"
        assert len(compiled._own.made) >= 1 + probed + (not reused)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    for outputs in runs:
        for got, want in zip(outputs, expected, strict=True):
            assert torch.allclose(got, want, atol=1e-4)
