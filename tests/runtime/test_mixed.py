# SPDX-License-Identifier: Apache-2.0
"""Batches whose samples belong to different requests: each gets what it gets alone, in two calls at most, or three
where the first block decides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from mixing import REQUESTS, Forwards, alone, batches, joined, mixed, mixed_runs
from torch import Tensor

import fastcache
from fastcache import (
    DMD,
    Chebyshev,
    DualBlock,
    FirstBlock,
    Growing,
    Guided,
    Hermite,
    Interval,
    Mask,
    Misfit,
    Output,
    Recipe,
    Stack,
    Taylor,
)

RECIPES: dict[str, Any] = {
    "reuse": Recipe(Interval(3)),
    "taylor": Recipe(Interval(3), Taylor(2)),
    "hermite": Recipe(Growing(3, first=2), Hermite(1)),
    "chebyshev": Recipe(Interval(2, warmup=4), Chebyshev()),
    "dmd": Recipe(Interval(2, warmup=5), DMD()),
    "ends": Recipe(Mask((1, 0, 0, 1, 0, 1, 0, 0, 1, 1)), Taylor(1), Stack(first=1, last=1)),
    "mag_cache": toys.config("mag_cache"),
    # decided inside the stack, or weighted there
    "first_block": toys.config("first_block"),
    "forecast": Recipe(FirstBlock(0.15, warmup=2), Taylor(1)),
    "guided": Recipe(FirstBlock(0.15, warmup=2), Guided(guide="residual")),
    "misfit": Recipe(Misfit(0.12), Guided(guide="residual")),
    "dual": Recipe(DualBlock(0.15, max_reused=5), where=Stack(first=1, last=1)),
    "early": Recipe(FirstBlock(0.15, warmup=2), Guided(guide="residual"), Stack(first=2)),
    "quality": "quality",
    "balanced": "balanced",
    "fast": "fast",
    "entering": Recipe(Interval(3), Guided(guide="input")),
    "off": "off",
    # decided by several targets or around the model: every sample is a call of its own
    "taylor_seer": toys.config("taylor_seer"),
    "output": Recipe(Interval(3), Taylor(1), Output()),
}
INSIDE = ("first_block", "forecast", "guided", "misfit", "dual", "early")
ALONE = ("taylor_seer", "output")


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_sample_gets_what_it_gets_alone(recipe):
    outputs, actions, forwards, counts = mixed(RECIPES[recipe])
    for r in range(REQUESTS):
        want, decided = alone(RECIPES[recipe], r, "tensor")
        assert actions[r] == decided, r
        torch.testing.assert_close(outputs[r], want, rtol=0, atol=1e-5)
    sizes = [len(members) for members in batches(0)]
    if recipe in ALONE:
        assert set(forwards.sizes) == {1}
        assert counts == sizes or recipe == "output"  # which runs nothing on a reused step
    else:  # the very first sample shows how the model runs
        assert max(counts) <= (3 if recipe in INSIDE else 2)
        assert forwards.sizes.count(1) < 0.4 * sum(sizes) and max(forwards.sizes) > 2
        assert sum(counts) < 0.7 * sum(sizes)


@pytest.mark.parametrize("recipe", ["taylor", "guided", "early"])
@pytest.mark.parametrize("shape", toys.SHAPES)
def test_in_every_shape_of_model(shape, recipe, monkeypatch):
    monkeypatch.setitem(toys.SHAPES, "two blocks", ({"depth": 2 + 2 * (recipe == "early")}, False))
    outputs, actions, forwards, counts = mixed(RECIPES[recipe], shape, seed=1)
    for r in range(REQUESTS):
        want, decided = alone(RECIPES[recipe], r, shape)
        assert actions[r] == decided, r
        torch.testing.assert_close(outputs[r], want, rtol=0, atol=1e-5)
    if shape == "extra returns" and recipe in INSIDE:  # nothing keeps these for a second call
        assert set(forwards.sizes) == {1}
    else:
        assert max(forwards.sizes) > 2 and max(counts) <= 3


@pytest.mark.parametrize(
    "options",
    [
        {"cache_dtype": torch.bfloat16},
        {"cache_dtype": torch.float8_e4m3fn},
        {"backend": "reference"},
        {"max_bytes": 10**6, "offload": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_with_other_storage(options):
    outputs, actions, *_ = mixed(RECIPES["taylor"], **options)
    for r in range(REQUESTS):
        want, decided = alone(RECIPES["taylor"], r, "tensor", **options)
        assert actions[r] == decided, r
        # a bit of a computed value may tip one of what is stored
        near = 0.05 if "cache_dtype" in options else 1e-5
        torch.testing.assert_close(outputs[r], want, rtol=0, atol=near)


def test_a_batch_that_agrees_is_one_call_with_its_inputs_as_they_are():
    target = toys.model()
    calls = [joined([(r, i) for r in range(4)], False) for i in range(6)]
    with fastcache.enable(target, RECIPES["reuse"]) as cache, torch.no_grad():
        forwards, given = Forwards(target), []
        target.register_forward_pre_hook(
            lambda m, a, k: given.append(k["hidden_states"]), with_kwargs=True
        )
        for i, inputs in enumerate(calls):
            before, contexts = (
                forwards.calls,
                [cache.context("cond", request=r, step_index=i) for r in range(4)],
            )
            fastcache.mixed_batch(target, contexts, inputs)
            assert forwards.calls - before == (2 if i == 0 else 1)
    assert forwards.sizes == [1, 3, *[4] * 5]


def test_a_budget_that_holds_some_of_the_requests():
    whole = mixed(RECIPES["taylor"])[0]
    outputs, actions, *_ = mixed(RECIPES["taylor"], max_bytes=2500)
    assert any("." in found for found in actions)
    assert not all(found == actions[0] for found in actions)
    for found, unlimited in zip(outputs, whole, strict=True):
        assert all(torch.isfinite(t).all() for t in found)
        torch.testing.assert_close(found[0], unlimited[0], rtol=0, atol=1e-5)


def test_requests_with_recipes_of_their_own_in_one_batch():
    names = ["reuse", "taylor", "off", "taylor", "first_block", "reuse"]
    target = toys.model()
    with fastcache.enable(target, "balanced") as cache, torch.no_grad():
        outputs = mixed_runs(cache, target, [RECIPES[name] for name in names])
        assert not any(d.pool.states for d in cache.methods)
    for r, name in enumerate(names):
        want, _ = alone(RECIPES[name], r, "tensor")
        torch.testing.assert_close(outputs[r], want, rtol=0, atol=1e-5)


def test_an_exception_forgets_the_runs_of_the_batch_and_no_others():
    target = toys.model()
    with fastcache.enable(target, RECIPES["taylor"]) as cache, torch.no_grad():

        def step(i: int, requests: range, fail: bool = False) -> Tensor:
            contexts = [
                cache.context("cond", request=r, num_inference_steps=toys.STEPS) for r in requests
            ]
            inputs = joined([(r, i) for r in requests], False)
            if fail:
                inputs["hidden_states"] = inputs["hidden_states"][..., :3]
            return fastcache.mixed_batch(target, contexts, inputs)

        for i in range(4):
            step(i, range(4))
        with pytest.raises(RuntimeError):
            step(4, range(2), fail=True)
        assert not cache.denoisers[0].control.inside
        outputs = [step(i, range(2, 4)) for i in range(4, toys.STEPS)]
        again = [step(i, range(2)) for i in range(toys.STEPS)]
    for r in range(2):
        want, _ = alone(RECIPES["taylor"], r, "tensor")
        torch.testing.assert_close([t[r : r + 1] for t in again], want, rtol=0, atol=1e-5)
        want, _ = alone(RECIPES["taylor"], r + 2, "tensor")
        torch.testing.assert_close([t[r : r + 1] for t in outputs], want[4:], rtol=0, atol=1e-5)


def test_what_is_refused():
    target, calls = toys.model(), joined([(0, 0), (1, 0)], False)
    with pytest.raises(ValueError, match="model is not enabled"):
        fastcache.mixed_batch(target, [], calls)
    with pytest.raises(TypeError, match="model is function"):
        fastcache.mixed_batch(lambda **k: None, [], calls)
    with fastcache.enable(target, RECIPES["taylor"]) as cache, torch.no_grad():
        named = [cache.context("cond", request=r) for r in range(3)]
        with pytest.raises(ValueError, match="inputs: none has a first dimension of 3"):
            fastcache.mixed_batch(target, named, calls)
        with pytest.raises(ValueError, match="contexts: 2 contexts name 1 branches"):
            fastcache.mixed_batch(target, [named[0]] * 2, calls)
        with pytest.raises(ValueError, match="runs has 1 entries for 2 contexts"):
            fastcache.mixed_batch(target, named[:2], calls, runs=[cache.run()])
        assert not len(cache.stats)


def test_blocks_that_fold_frames_into_the_batch_are_called_alone():
    """What enters the stack is [batch x frames, tokens, C]: its samples cannot be told apart by their number."""
    inner = toys.model()

    class Folded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.sizes = inner.blocks, []

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            self.sizes.append(hidden_states.shape[0])
            x = hidden_states.flatten(0, 1)
            for block in self.blocks:
                x = block(hidden_states=x)
            return x.unflatten(0, hidden_states.shape[:2])

    target = Folded().eval()
    x = torch.randn(2, 3, 5, toys.DIM)
    with fastcache.enable(target, RECIPES["taylor"]) as cache, torch.no_grad():
        for i in range(5):
            contexts = [cache.context("cond", request=r, step_index=i) for r in range(2)]
            fastcache.mixed_batch(
                target, contexts, {"hidden_states": x, "timestep": torch.full((2,), 9.0 - i)}
            )
    assert target.sizes == [1] * 10 and "." in toys.actions(cache)
