# SPDX-License-Identifier: Apache-2.0
"""What a call of cache-dit's model keeps and opens on fastcache's runtime."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

cache_dit = pytest.importorskip("cache_dit", minversion="1.5")
pytest.importorskip("diffusers", minversion="0.36")

import tiny  # noqa: E402
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig  # noqa: E402

import fastcache  # noqa: E402
from fastcache.integrations import cache_dit as backend  # noqa: E402
from fastcache.integrations.cache_dit.session import session_of  # noqa: E402


@pytest.fixture
def flux():
    """A tiny FLUX and its inputs, to be enabled on fastcache's runtime."""
    backend.install()
    yield tiny.build("Flux", depth=3)
    backend.uninstall()


def enabled(model, order=0, **fields):
    calibrator = TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    settings = {
        "Fn_compute_blocks": 1,
        "max_warmup_steps": 3,
        "enable_separate_cfg": False,
        "residual_diff_threshold": 0.9,
    }
    cache_dit.enable_cache(
        model, cache_config=DBCacheConfig(**settings | fields), calibrator_config=calibrator
    )
    return session_of(model)


@pytest.mark.parametrize("order", [0, 1])
def test_text_that_the_model_does_not_read_after_its_blocks_is_not_kept(flux, order):
    model, inputs = flux
    cache = enabled(model, order).cache
    for call in tiny.trajectory("Flux", inputs, 5):
        tiny.output(model, call)
    assert cache.stats.reused == 2
    # of the image: the first block's residual, and as many of the others as the forecast takes
    tokens = inputs["hidden_states"].shape[:2].numel()
    assert cache.nbytes() == (2 + order) * tokens * model.inner_dim * 4


class Ours(TorchDispatchMode):
    """Names of fastcache's own ops that run."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastcache":
            self.ops.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_forecast_of_all_blocks_is_one_op(flux):
    model, inputs = flux
    # no difference is taken before the fourth step
    stats = enabled(model, order=1, max_warmup_steps=5).cache.stats
    *calls, last = tiny.trajectory("Flux", inputs, 7)
    for call in calls:
        tiny.output(model, call)
    with Ours() as ours:
        tiny.output(model, last)
    assert stats[-1].action == "reuse"
    assert ours.ops == ["residual_l1.default", "linear_combine_.default"]


def test_a_call_under_a_context_is_of_its_branch_and_request_and_others_are_counted(flux):
    model, inputs = flux
    session = enabled(model, num_inference_steps=4)
    call = tiny.trajectory("Flux", inputs, 1)[0]
    tiny.output(model, call)
    with session.cache.context("uncond", request="another"):
        tiny.output(model, call)
    tiny.output(model, call)
    records = [(r.request, r.context, r.step) for r in session.cache.stats]
    assert records == [(0, "default", 0), ("another", "uncond", 0), (0, "default", 1)]


def test_a_call_after_a_refresh_is_the_first_of_a_run_of_the_new_length(flux):
    model, inputs = flux
    session = enabled(model, num_inference_steps=4)
    call = tiny.trajectory("Flux", inputs, 1)[0]
    tiny.output(model, call)
    cache_dit.refresh_context(model, num_inference_steps=5)
    for _ in range(6):
        tiny.output(model, call)
    assert [r.step for r in session.cache.stats] == [0, 0, 1, 2, 3, 4, 0]


def test_a_model_that_is_compiled_afterwards_takes_the_same_steps(flux):
    model, inputs = flux
    cache = enabled(model).cache
    calls = tiny.trajectory("Flux", inputs, 5)
    expected = [tiny.output(model, call) for call in calls]
    cache_dit.refresh_context(model)
    with warnings.catch_warnings():  # that it runs uncompiled is said
        warnings.simplefilter("ignore", fastcache.FastcacheWarning)
        compiled = torch.compile(model, backend="eager")
        found = [tiny.output(compiled, call) for call in calls]
    steps = [(r.step, r.action) for r in cache.stats]
    assert steps[:5] == steps[5:] and cache.stats.reused == 4
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()
