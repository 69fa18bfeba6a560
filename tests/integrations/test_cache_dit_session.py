# SPDX-License-Identifier: Apache-2.0
"""What a call of cache-dit's model keeps and opens on fastcache's runtime."""

from __future__ import annotations

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

cache_dit = pytest.importorskip("cache_dit", minversion="1.5")
pytest.importorskip("diffusers", minversion="0.36")

import tiny  # noqa: E402
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig  # noqa: E402

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


def test_a_context_is_opened_again_unless_somebody_has_it_open(flux):
    model, inputs = flux
    session = enabled(model, num_inference_steps=4)
    call = tiny.trajectory("Flux", inputs, 1)[0]
    tiny.output(model, call)
    (context,) = session.closed.values()
    tiny.output(model, call)
    assert list(session.closed.values()) == [context]
    open_elsewhere, another = session.next_step(), session.next_step()
    assert open_elsewhere is context is not another
    assert [open_elsewhere.step_index, another.step_index] == [2, 3]


def test_a_context_that_was_open_during_a_refresh_has_the_new_length(flux):
    model, inputs = flux
    session = enabled(model, num_inference_steps=4)
    call = tiny.trajectory("Flux", inputs, 1)[0]
    tiny.output(model, call)
    context = session.next_step()
    cache_dit.refresh_context(model, num_inference_steps=9)
    session.closed[context.name] = context  # that call is over
    assert session.next_step() is context
    assert (context.step_index, context.num_inference_steps) == (0, 9)
