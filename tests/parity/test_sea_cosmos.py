# SPDX-License-Identifier: Apache-2.0
"""SeaCache on Cosmos 3 against diffusers' own hook, step by step.

diffusers takes the residual behind the model's last normalisation there: so does `Stack(normed=True)`, by the
model's row in models/table.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import toys
from modulated import WAYS
from test_sea_cache import STEPS, sigmas, upstream
from torch import Tensor

pytest.importorskip("diffusers")

import test_matrix

import fastcache

NAME = "Cosmos3Omni"
SETTINGS: list[dict[str, Any]] = [
    {},
    {"threshold": 0.6},
    {"threshold": 0.3, "max_consecutive_cached": 3, "residual_order": 0},
]


def calls(seed: int) -> list[dict[str, Any]]:
    """A run whose latents turn, with their noise as the timestep."""
    _, inputs = test_matrix.build(NAME)
    g = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(inputs["vision_tokens"][0].shape, generator=g) for _ in range(2))
    found = []
    for i, sigma in enumerate(sigmas()):
        angle = 0.05 * i * (1 + 0.3 * math.sin(i + seed))
        latents = [math.cos(angle) * one + math.sin(angle) * two]
        now = {"vision_tokens": latents, "vision_timesteps": torch.tensor([sigma])}
        found.append({**inputs, **now, "return_dict": False})
    return found


def theirs(config: Any, run: list[dict[str, Any]]) -> tuple[str, list[Tensor]]:
    model, _ = test_matrix.build(NAME)
    model.enable_cache(config)
    ran: list[int] = []
    last = list(model.layers)[-1]
    linear = next(m for m in last.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda *_: ran.append(1))
    marks, outputs = "", []
    for i, sigma in enumerate(sigmas()):
        ran.clear()
        with model.cache_context("cond", step_index=i, sigma=sigma, num_inference_steps=STEPS):
            outputs.append(test_matrix.first(model(**run[i])))
        marks += "C" if ran else "."
    return marks, outputs


def ours(config: Any, run: list[dict[str, Any]], way: str = "eager") -> tuple[str, list[Tensor]]:
    model, _ = test_matrix.build(NAME)
    with fastcache.enable(model, config) as cache:
        call_model, outputs = WAYS[way](model), []
        for i, sigma in enumerate(sigmas()):
            with cache.context("cond", step_index=i, sigma=sigma, num_inference_steps=STEPS):
                outputs.append(test_matrix.first(call_model(**run[i])))
        return toys.actions(cache), outputs


LATENTS = {
    "raw_vision_callback": lambda model, args, kwargs: [x[0] for x in kwargs["vision_tokens"]]
}


@pytest.fixture(autouse=True)
def model_exists():
    """And graphs of other tests do not count against the recompile limit."""
    upstream()
    if not hasattr(test_matrix.diffusers, test_matrix.entry(NAME)["class"]):
        pytest.skip("this diffusers has no Cosmos 3")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_every_step_is_that_of_diffusers_on_cosmos(fields, way):
    seen = set()
    for seed in range(3 if way == "eager" else 1):
        run = calls(seed)
        with torch.no_grad():
            wanted, outputs = theirs(upstream().SeaCacheConfig(**fields), run)
            found = ours(fastcache.SeaCacheConfig(**fields, **LATENTS), run, way)
        assert found[0] == wanted, seed
        for i, (a, b) in enumerate(zip(found[1], outputs, strict=True)):
            assert (a - b).abs().max() <= 1e-5, (seed, i, wanted[i])
        seen |= set(wanted[1:-1])
    assert seen == {"C", "."}
