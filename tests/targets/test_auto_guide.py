# SPDX-License-Identifier: Apache-2.0
"""`Guided(guide="auto")`: the modulated guide where a model has one, the residual guide elsewhere."""

from __future__ import annotations

import pytest
import torch
import toys
from modulated import ADAPTER, ModulatedModel

import fastcache
from fastcache import Guided, InputChange, Interval, Recipe


def made(model, guide, adapter=None, when=None):
    recipe = Recipe(when or Interval(3, warmup=3), Guided(1, guide))
    with fastcache.enable(model, recipe, adapter=adapter) as cache:
        found = toys.run(cache, model, toys.inputs(toys.STEPS), num_inference_steps=toys.STEPS)
        assert cache.stats.reused > 2
    return torch.stack(found)


@pytest.mark.parametrize(
    ("model", "adapter", "same", "other"),
    [(ModulatedModel, ADAPTER, "modulated", "residual"), (toys.model, None, "residual", "input")],
    ids=["modulated", "plain"],
)
def test_it_takes_the_guide_that_the_model_has(model, adapter, same, other):
    wanted = made(model(), same, adapter)
    assert torch.equal(made(model(), "auto", adapter), wanted)
    assert not torch.equal(made(model(), other, adapter), wanted)


def test_it_goes_with_a_rule_that_looks_at_the_modulated_input():
    when = InputChange(0.5, (1.0, 0.0), warmup=3)
    with pytest.raises(ValueError, match="guide='residual'"):
        Recipe(when, Guided(1))
    wanted = made(ModulatedModel(), "modulated", ADAPTER, when)
    assert torch.equal(made(ModulatedModel(), "auto", ADAPTER, when), wanted)
    with pytest.raises(ValueError, match="InputChange needs"):
        fastcache.enable(toys.model(), Recipe(when, Guided(1, "auto")))


def test_a_model_without_a_known_modulation_is_refused():
    with pytest.raises(ValueError, match="modulated"):
        fastcache.enable(toys.model(), Recipe(Interval(3), Guided(1, "modulated")))
