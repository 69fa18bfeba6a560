# SPDX-License-Identifier: Apache-2.0
"""Batches of several requests under rules that look inside the stack: each sample is looked at by itself, and samples
that decide differently part after the blocks that they have in common."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import toys
from mixing import REQUESTS, alone, joined, mixed
from modulated import ADAPTERS, ModulatedModel, TabledModel
from torch import Tensor

import fastcache
from fastcache import DualBlock, FirstBlock, Guided, InputChange, Interval, Recipe, Stack, Taylor
from fastcache.targets.stack.target import StackTarget

BY_INPUT: dict[str, Any] = {
    "tea_cache": Recipe(InputChange(0.3, (1.0, 0.0))),
    "forecast": Recipe(InputChange(0.3, (1.0, 0.0)), Taylor(1)),
    "guided": Recipe(InputChange(0.3, (1.0, 0.0)), Guided(guide="modulated")),
    "balanced": "balanced",
    "checked": Recipe(
        Interval(2, warmup=2), Guided(3, "modulated", 0.05, early=True, prior=2, checked=True)
    ),
    "quality": Recipe(
        Interval(3, phase=0, warmup=2, last=True), Guided(2, "modulated", 0.04, early=True, prior=2)
    ),
}
DUAL = Recipe(DualBlock(0.15, max_reused=4, warmup=1))


@pytest.mark.parametrize("recipe", BY_INPUT)
@pytest.mark.parametrize("made", [ModulatedModel, TabledModel])
def test_what_enters_the_first_block_is_looked_at_by_sample(made, recipe):
    name = "modulated" if made is ModulatedModel else "tabled"

    def make(shape: str) -> Any:
        torch.manual_seed(0)
        return made().eval()

    given = {"make": make, "adapter": ADAPTERS[name]}
    outputs, actions, forwards, counts = mixed(BY_INPUT[recipe], **given)
    for r in range(REQUESTS):
        want, decided = alone(BY_INPUT[recipe], r, **given)
        assert actions[r] == decided, r
        torch.testing.assert_close(outputs[r], want, rtol=0, atol=1e-5)
    assert max(counts) <= 3 and max(forwards.sizes) > 2
    assert any("." in decided for decided in actions)


def batch(cache: fastcache.Cache, target: Any, step: int, requests: range) -> Tensor:
    contexts = [
        cache.context("cond", request=r, step_index=step, num_inference_steps=toys.STEPS)
        for r in requests
    ]
    return fastcache.mixed_batch(target, contexts, joined([(r, step) for r in requests], False))


class Blocks:
    """Samples that each block of a model has run, call by call."""

    def __init__(self, target: Any) -> None:
        self.ran: list[tuple[int, int]] = []  # block, samples
        for i, block in enumerate(target.blocks):
            block.register_forward_hook(lambda m, a, out, i=i: self.ran.append((i, len(out))))

    def take(self) -> list[tuple[int, int]]:
        ran, self.ran = self.ran, []
        return ran


@pytest.mark.parametrize("threshold", [0.0, 1e9, 0.08])
def test_the_first_block_runs_once_for_all_and_the_others_for_those_that_compute(threshold):
    target = toys.model()
    blocks, agreed = Blocks(target), 0
    with fastcache.enable(target, Recipe(FirstBlock(threshold))) as cache, torch.no_grad():
        batch(cache, target, 0, range(REQUESTS))
        blocks.take()
        for step in range(1, toys.STEPS):
            batch(cache, target, step, range(REQUESTS))
            found = [record.action for record in cache.stats][-REQUESTS:]
            due, agreed = found.count("compute"), agreed + (len(set(found)) == 1)
            rest = [(1, due), (2, due)] if due else []
            assert blocks.take() == [(0, REQUESTS), *rest], step
    assert agreed == toys.STEPS - 1 if threshold != 0.08 else agreed < toys.STEPS - 1


@pytest.mark.parametrize("recipe", [DUAL, Recipe(FirstBlock(0.08), Guided(guide="residual"))])
def test_a_sample_that_cannot_go_on_with_others_keeps_its_decision(recipe, monkeypatch):
    """It goes on alone, and its policy is not asked again."""
    together = StackTarget.together
    monkeypatch.setattr(
        StackTarget, "together", lambda self, s, head=None: None if head else together(self, s)
    )
    outputs, actions, _, counts = mixed(recipe)
    assert max(counts) > 3
    for r in range(REQUESTS):
        want, decided = alone(recipe, r)
        assert actions[r] == decided, r
        torch.testing.assert_close(outputs[r], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", range(3))
def test_an_exception_in_the_head_or_after_it_leaves_the_model_as_it_was(block):
    target, recipe = toys.model(), Recipe(FirstBlock(0.08), Guided(guide="residual"))
    failing = False

    def fail(*_: Any) -> None:
        if failing:
            raise ArithmeticError

    target.blocks[block].register_forward_pre_hook(fail)
    with fastcache.enable(target, recipe) as cache, torch.no_grad():
        stack: Any = cache.denoisers[0].targets[0]
        looks = copy.copy((stack.decider, stack.meter, stack.guide))
        for step in range(toys.STEPS):
            failing = step == 4
            try:
                batch(cache, target, step, range(4))
            except ArithmeticError:
                break
        failing = False
        assert step == 4 and all(
            a is b for a, b in zip(looks, (stack.decider, stack.meter, stack.guide), strict=True)
        )
        outputs = [batch(cache, target, step, range(4)) for step in range(toys.STEPS)]
    for r in range(4):
        want, _ = alone(recipe, r)
        torch.testing.assert_close([t[r : r + 1] for t in outputs], want, rtol=0, atol=1e-5)


def test_text_that_all_samples_share_goes_on_after_the_head():
    """It has no row per sample: blocks that do not give it back get it from the model again."""
    shape = "text optional, given"
    recipe, text = Recipe(FirstBlock(0.08), where=Stack(first=1)), torch.randn(1, 3, toys.DIM)
    calls = [
        [{**call, "encoder_hidden_states": text} for call in toys.inputs(seed=r, batch=1)]
        for r in range(4)
    ]
    target, want = toys.model(shape), []
    for own in calls:
        with fastcache.enable(target, recipe) as cache, cache.run(num_inference_steps=toys.STEPS):
            want.append([toys.step(target, call) for call in own])
    found, blocks = [], Blocks(target)
    with fastcache.enable(target, recipe) as cache, torch.no_grad():
        for step, at in enumerate(zip(*calls, strict=True)):
            contexts = [cache.context("cond", request=r, step_index=step) for r in range(4)]
            inputs = {k: torch.cat([call[k] for call in at]) for k in ("hidden_states", "timestep")}
            found.append(
                fastcache.mixed_batch(target, contexts, {**inputs, "encoder_hidden_states": text})
            )
        actions = [record.action for record in cache.stats]
    assert any(len(set(actions[i : i + 4])) == 2 for i in range(0, len(actions), 4))
    assert not any(b == 0 and n < 3 for b, n in blocks.ran[3:])
    for r in range(4):
        torch.testing.assert_close([t[r : r + 1] for t in found], want[r], rtol=0, atol=1e-5)
