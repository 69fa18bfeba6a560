# SPDX-License-Identifier: Apache-2.0
"""Many users of one model: requests of every kind that arrive at random and share batches get what they get alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

import fastcache
from fastcache import DualBlock, FirstBlock, Guided, Interval, Recipe, Taylor

REQUESTS, MOST, OPEN, ARRIVALS = 200, 8, 12, 0.6  # the last one: chance per call that another comes
RECIPES: dict[str, Any] = {
    "quality": "quality",
    "balanced": "balanced",
    "fast": "fast",
    "first_block": toys.config("first_block"),
    "first_block, guided": Recipe(FirstBlock(0.1, warmup=2), Guided(guide="residual")),
    "dual": Recipe(DualBlock(0.12, max_reused=4, warmup=1)),
    "mag_cache": toys.config("mag_cache", threshold=0.3),
    "taylor": Recipe(Interval(3), Taylor(1)),
    "off": "off",
}
GUIDANCE = 2.5
Branch = list[dict[str, Any]]  # the calls of a branch


@dataclass
class Request:
    """What somebody asks for, and how far it has come. branches: the calls of each, by its name."""

    number: int
    recipe: str
    steps: int
    tokens: int
    branches: dict[str, Branch]
    at: int = 0
    run: Any = None
    outputs: list[Tensor] = field(default_factory=list)

    @classmethod
    def draw(cls, number: int, by: random.Random) -> Request:
        steps, tokens = by.randrange(4, 13), by.choice((4, 6, 9))
        names = ["cond", "uncond"][: by.choice((1, 2))]
        branches = {
            name: toys.inputs(steps, seed=2 * number + i, batch=1, tokens=tokens)
            for i, name in enumerate(names)
        }
        return cls(number, by.choice(list(RECIPES)), steps, tokens, branches)

    def advance(self, found: list[Tensor]) -> None:
        """found: of its branches."""
        last = found[-1]
        self.outputs.append(last + GUIDANCE * (found[0] - last))
        self.at += 1


def alone(request: Request) -> list[Tensor]:
    """The outputs of a request that shares the model with nobody."""
    target, steps = toys.model(), request.steps
    with fastcache.enable(target, RECIPES[request.recipe]) as cache:
        made = Request(0, request.recipe, steps, request.tokens, request.branches)
        with cache.run(num_inference_steps=steps):
            for step in range(steps):
                found = []
                for name, calls in request.branches.items():
                    with cache.context(name):
                        found.append(toys.step(target, calls[step]))
                made.advance(found)
    return made.outputs


def advance(target: Any, cache: fastcache.Cache, requests: list[Request]) -> None:
    """One step of some requests, each at a step of its own, in one batch."""
    calls = [(r, name) for r in requests for name in r.branches]
    given = [r.branches[name][r.at] for r, name in calls]
    found = fastcache.mixed_batch(
        target,
        [cache.context(name, step_index=r.at) for r, name in calls],
        {k: torch.cat([call[k] for call in given]) for k in given[0]},
        runs=[r.run for r, _ in calls],
    )
    parts = iter(found.split(1))
    for r in requests:
        r.advance([next(parts) for _ in r.branches])


@torch.no_grad()
def serve(target: Any, cache: fastcache.Cache, requests: list[Request], by: random.Random) -> int:
    """Serve them as they come; returns the number of batches."""
    waiting, open_, count = list(requests), list[Request](), 0
    while waiting or open_:
        while waiting and len(open_) < OPEN and (not open_ or by.random() < ARRIVALS):
            came = waiting.pop(0)
            came.run = cache.run(num_inference_steps=came.steps, recipe=RECIPES[came.recipe])
            came.run.__enter__()
            came.run.pause()
            open_.append(came)
        tokens = by.choice(open_).tokens
        batch = [r for r in open_ if r.tokens == tokens][:MOST]
        advance(target, cache, batch)
        count += 1
        for request in [r for r in batch if r.at == r.steps]:
            open_.remove(request)
            request.run.resume()
            request.run.__exit__(None)
    return count


@pytest.mark.slow
def test_two_hundred_requests_that_share_batches_get_what_they_get_alone():
    by = random.Random(0)
    requests = [Request.draw(number, by) for number in range(REQUESTS)]
    target, sizes = toys.model(), []
    target.embed.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    with fastcache.enable(target, "off") as cache:
        batches = serve(target, cache, requests, by)
        recipes = {r.run.request: r.recipe for r in requests}
        reused = {recipes[a.request] for a in cache.stats if a.action == "reuse"}
        assert not any(d.pool.states for d in cache.methods)
    for request in requests:
        torch.testing.assert_close(
            request.outputs, alone(request), rtol=0, atol=1e-5, msg=str(request.number)
        )
    samples = sum(r.steps * len(r.branches) for r in requests)
    assert len(recipes) == REQUESTS and reused == RECIPES.keys() - {"off"}
    assert batches < samples / 4 and len(sizes) < 0.7 * samples and max(sizes) > 4
