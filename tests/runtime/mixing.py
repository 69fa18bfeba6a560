# SPDX-License-Identifier: Apache-2.0
"""Requests that share batches of a small model at steps of their own, and the same requests alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import toys
from torch import Tensor

import fastcache

REQUESTS = 6
Make = Callable[[str], Any]  # a model of a shape of `toys.SHAPES`


def calls_of(request: int, text: bool = False) -> list[dict[str, Any]]:
    return toys.inputs(seed=request, batch=1, text=text)


def alone(
    recipe: Any, request: int, shape: str = "tensor", make: Make = toys.model, **options: Any
) -> tuple[list[Tensor], str]:
    """Outputs and actions of a request that shares the model with no other."""
    target, text = make(shape), toys.SHAPES[shape][1]
    with fastcache.enable(target, recipe, **options) as cache:
        with cache.run(num_inference_steps=toys.STEPS):
            outputs = [toys.step(target, call) for call in calls_of(request, text)]
        return outputs, toys.actions(cache)


class Forwards:
    """Counts how often the first block list of a model runs its first block, and with how many samples."""

    def __init__(self, target: Any) -> None:
        self.sizes: list[int] = []
        self.calls = 0
        target.embed.register_forward_hook(self.note)

    def note(self, module: Any, args: Any, output: Tensor) -> None:
        self.calls += 1
        self.sizes.append(output.shape[0])


def batches(seed: int) -> list[list[tuple[int, int]]]:
    """(request, step) of the samples of each call: requests begin, wait and end at random."""
    draw, at = random.Random(seed), dict.fromkeys(range(REQUESTS), 0)
    found = []
    while at:
        ready = [r for r in at if draw.random() < 0.7] or list(at)[:1]
        found.append([(r, at[r]) for r in ready])
        for r in ready:
            at[r] += 1
            if at[r] == toys.STEPS:
                del at[r]
    return found


def joined(members: list[tuple[int, int]], text: bool) -> dict[str, Tensor]:
    calls = [calls_of(r, text)[step] for r, step in members]
    return {k: torch.cat([call[k] for call in calls]) for k in calls[0]}


def mixed(
    recipe: Any,
    shape: str = "tensor",
    seed: int = 0,
    make: Make = toys.model,
    driven: Callable[[Any], Any] | None = None,
    **options: Any,
) -> tuple[list[list[Tensor]], list[str], Forwards, list[int]]:
    """Outputs and actions per request, what the model ran, and the calls of the model in each batch.

    driven: what is called in the model's place, and sees nothing of what the model runs.
    """
    target, text = make(shape), toys.SHAPES[shape][1]
    outputs: list[list[Tensor]] = [[] for _ in range(REQUESTS)]
    counts = []
    with fastcache.enable(target, recipe, **options) as cache, torch.no_grad():
        forwards = Forwards(target if driven is None else toys.model())
        call = target if driven is None else driven(target)
        for members in batches(seed):
            contexts = [
                cache.context("cond", request=r, step_index=i, num_inference_steps=toys.STEPS)
                for r, i in members
            ]
            before = forwards.calls
            found = fastcache.mixed_batch(call, contexts, joined(members, text))
            counts.append(forwards.calls - before)
            for n, (r, _) in enumerate(members):
                outputs[r].append(found[n : n + 1])
        records = list(cache.stats)
    actions = [
        "".join("." if a.action == "reuse" else "C" for a in records if a.request == r)
        for r in range(REQUESTS)
    ]
    return outputs, actions, forwards, counts


def mixed_runs(cache: fastcache.Cache, call: Any, recipes: list[Any]) -> list[list[Tensor]]:
    """Outputs per request, each in a run with a recipe of its own. call: the model, or what drives it."""
    outputs: list[list[Tensor]] = [[] for _ in recipes]
    runs = [
        cache.run(r, num_inference_steps=toys.STEPS, recipe=recipe)
        for r, recipe in enumerate(recipes)
    ]
    for run in runs:
        run.__enter__()
        run.pause()
    for members in batches(2):
        contexts = [cache.context("cond", step_index=i) for _, i in members]
        inputs, own = joined(members, False), [runs[r] for r, _ in members]
        found = fastcache.mixed_batch(call, contexts, inputs, runs=own)
        for n, (r, _) in enumerate(members):
            outputs[r].append(found[n : n + 1])
    for run in runs:
        run.resume()
        run.__exit__(None)
    return outputs
