"""CUDA graphs around compiled steps. Written without a GPU at hand: not yet run on one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_compile import PlainModel, fresh
from test_static_addresses import METHODS, STEPS
from torch import Tensor

import fastcache

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.cuda is None, reason="needs a CUDA device"
)


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


GRAPHED = [{"mode": "reduce-overhead"}, {"cudagraphs": True}, {"cudagraphs": True, "frozen": True}]
CASES = [(method, options) for method in METHODS for options in GRAPHED]
CASES += [("first_block", {"cudagraphs": True, "on_device": True})]


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore:fastcache. each of:UserWarning")
def test_replayed_steps_agree_with_eager(method: str, options: dict) -> None:
    fresh()
    torch.manual_seed(0)
    model = PlainModel(64).cuda().eval().requires_grad_(False)
    start, drift = torch.randn(1, 32, 64).cuda(), torch.randn(1, 32, 64).cuda()
    with fastcache.enable(model, METHODS[method]()) as cache:
        expected = run(cache, model, start, drift)
    with fastcache.enable(model, METHODS[method]()) as cache:
        compiled = fastcache.compile(model, **options)
        held = "cudagraphs" in options
        runs = [
            run(cache, compiled if held else lambda x: compiled(x).clone(), start, drift)
            for _ in range(3)
        ]
        assert cache.stats.reused
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    for outputs in runs:
        for got, want in zip(outputs, expected, strict=True):
            assert torch.allclose(got, want, atol=1e-4)
