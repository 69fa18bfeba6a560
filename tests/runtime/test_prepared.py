# SPDX-License-Identifier: Apache-2.0
"""Decisions that a context prepares for a compiled call, where the call then runs eagerly or not at all."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import fastcache

STEPS = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 0.1 * self.linear(hidden_states)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, hidden_states: Tensor, timestep: float | None = None) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def config() -> fastcache.MagCacheConfig:
    ratios = [1.0] + [0.97] * (STEPS - 1)
    return fastcache.MagCacheConfig(threshold=0.1, num_inference_steps=STEPS, mag_ratios=ratios)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval().requires_grad_(False)


def strip(cache: fastcache.Cache, steps: int = STEPS) -> str:
    return "".join("C" if r.action == "compute" else "." for r in cache.stats[-steps:])


@pytest.mark.parametrize("timed", [False, True])
def test_runs_told_by_their_step_index_repeat(model, timed):
    """A second run took over the accumulated error of the first, and computed other steps."""
    x, strips = torch.randn(1, 4, 8), []
    with fastcache.enable(model, config()) as cache:
        for _ in range(3):
            for i in range(STEPS):
                with cache.context("cond", step_index=i, num_inference_steps=STEPS):
                    model(x, **({"timestep": 1000.0 - i} if timed else {}))
            strips.append(strip(cache))
    assert strips[0] == strips[1] == strips[2]
    assert "." in strips[0]


def test_runs_told_by_the_models_timestep_repeat(model):
    x, strips = torch.randn(1, 4, 8), []
    with fastcache.enable(model, config()) as cache:
        for _ in range(3):
            for i in range(STEPS):
                with cache.context("cond"):
                    model(x, timestep=1000.0 - i)
            strips.append(strip(cache))
    assert strips[0] == strips[1] == strips[2]


def test_a_context_without_a_call_changes_nothing(model):
    x = torch.randn(1, 4, 8)
    strips = []
    for empty in (False, True):
        with fastcache.enable(model, config()) as cache:
            for i in range(STEPS):
                if empty and i:
                    with cache.context("cond", step_index=i):
                        pass
                with cache.context("cond", step_index=i):
                    model(x)
            strips.append(strip(cache))
    assert strips[0] == strips[1]


def test_a_context_inside_another_leaves_the_outer_ones_decision(model):
    x = torch.randn(1, 4, 8)
    strips = []
    for nested in (False, True):
        with fastcache.enable(model, config()) as cache:
            for i in range(STEPS):
                with cache.context("cond", step_index=i):
                    if nested:
                        with cache.context("uncond", step_index=i):
                            pass
                    model(x)
            strips.append(strip(cache))
    assert strips[0] == strips[1]


def test_a_timestep_callback_is_read_once_per_step():
    read = []
    recipe_config = fastcache.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("blocks",),
        current_timestep_callback=lambda: read.append(1) or 500.0,
    )
    pytest.importorskip("diffusers")
    from diffusers import FluxTransformer2DModel  # a model with attention to broadcast

    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    ).eval().requires_grad_(False)  # fmt: skip
    inputs = {"hidden_states": torch.randn(1, 4, 4), "encoder_hidden_states": torch.randn(1, 2, 8)}
    inputs |= {"pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([0.5])}
    inputs |= {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(2, 3)}
    with fastcache.enable(flux, recipe_config) as cache:
        for i in range(4):
            read.clear()
            with cache.context("cond", step_index=i):
                flux(**inputs)
            assert len(read) == 1


# --- graphs that begin while a cache is attached ----------------------------------------------------------


def outputs_of(model, cache, calls, compiled_from: int, forget: bool = False) -> list[Tensor]:
    """A run whose calls go through torch.compile(model) from a step on, each in a context."""
    call, outputs = model, []
    for i, x in enumerate(calls):
        if i == compiled_from:
            call = torch.compile(model, backend="eager", fullgraph=True)
        if forget and i == compiled_from + 2:
            torch._dynamo.reset()  # forgets the graphs, and who wants to be told of new ones
        with torch.no_grad(), cache.context("cond", step_index=i, num_inference_steps=STEPS):
            outputs.append(call(x))
    return outputs


@pytest.mark.parametrize("forget", [False, True])
@pytest.mark.parametrize("compiled_from", [0, 1, 5])
def test_a_model_may_be_compiled_at_any_step(model, compiled_from, forget):
    torch._dynamo.reset()
    calls = list(torch.randn(STEPS, 1, 4, 8))
    with fastcache.enable(model, config()) as cache:
        expected, decided = outputs_of(model, cache, calls, STEPS), strip(cache)
    with fastcache.enable(model, config()) as cache:
        assert not cache.denoisers[0].control.may_be_compiled
        found = outputs_of(model, cache, calls, compiled_from, forget)
        assert strip(cache) == decided and "." in decided
        assert cache.denoisers[0].control.may_be_compiled
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_contexts_of_an_eager_model_prepare_nothing(model):
    """Deciding twice would double the cost of a skipped step."""
    x = torch.randn(1, 4, 8)
    with fastcache.enable(model, config()) as cache, torch.no_grad():
        for i in range(STEPS):
            with cache.context("cond", step_index=i):
                assert cache.denoisers[0].ahead.prepared is None
                model(x)


def test_two_open_contexts_of_one_thread_arm_no_graph(model):
    """Either could be meant by a compiled call: it says so instead of taking the wrong one's state."""
    torch._dynamo.reset()
    x, places = torch.randn(1, 4, 8), [contextvars.copy_context() for _ in range(2)]
    with fastcache.enable(model, config()) as cache, torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for i in range(3):
            for request in range(2):
                with cache.context("cond", request=request, step_index=i):
                    compiled(x)
        opened = [cache.context("cond", request=r, step_index=3) for r in range(2)]
        for place, context in zip(places, opened, strict=True):
            place.run(context.__enter__)
        with pytest.raises(RuntimeError, match="context of its own"):
            places[0].run(compiled, x)
        for place, context in zip(places, opened, strict=True):
            place.run(context.__exit__, None, None, None)
        with cache.context("cond", request=0, step_index=3):
            compiled(x)


def test_threads_with_a_compiled_model_wait_for_each_other(model):
    torch._dynamo.reset()
    runs = {r: list(torch.randn(STEPS, 1, 4, 8)) for r in range(3)}
    alone, found = {}, {}
    with fastcache.enable(model, config()) as cache:
        for r, calls in runs.items():
            alone[r] = outputs_of(model, cache, calls, STEPS)
            cache.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)

        def serve(request: int) -> None:
            outputs = []
            for i, x in enumerate(runs[request]):
                with torch.no_grad(), cache.context("cond", request=request, step_index=i):
                    outputs.append(compiled(x))
            found[request] = outputs

        with torch.no_grad(), cache.context("cond", request="first", step_index=0):
            compiled(runs[0][0])  # graphs exist before threads ask for them
        for i in range(1, STEPS):
            with torch.no_grad(), cache.context("cond", request="first", step_index=i):
                compiled(runs[0][i])
        threads = [threading.Thread(target=serve, args=(r,)) for r in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(found) == sorted(runs)
    for r in runs:
        assert all(torch.equal(a, b) for a, b in zip(found[r], alone[r], strict=True)), r
