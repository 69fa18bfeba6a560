# SPDX-License-Identifier: Apache-2.0
"""DBCacheConfig decides and computes as cache-dit 1.5.3 does; a table of decisions stands in where that is absent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import toys
from torch import Tensor

import fastcache
from fastcache import BlockAdapter, DBCacheConfig, DualBlock, Mask, Recipe, Stack, Taylor
from fastcache.policies import REUSE, Policy, Step

STEPS = 16
MASK = [1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 1]
STATIC = {"steps_computation_mask": MASK, "steps_computation_policy": "static"}
BASE = {"Fn_compute_blocks": 2, "max_warmup_steps": 2, "residual_diff_threshold": 0.3}
CASES: dict[str, dict[str, Any]] = {
    **{
        f"static F{fn}B{bn}": {**STATIC, "Fn_compute_blocks": fn, "Bn_compute_blocks": bn}
        for fn in (1, 2, 4)
        for bn in (0, 2)
    },
    **{
        f"dynamic F{fn}B{bn}": {**BASE, "Fn_compute_blocks": fn, "Bn_compute_blocks": bn}
        for fn in (1, 2, 4)
        for bn in (0, 2)
    },
    "warm-up in steps": {**BASE, "max_warmup_steps": 7, "warmup_interval": 3},
    "few in a row": {**BASE, "max_continuous_cached_steps": 1},
    "none in a row": {**BASE, "max_continuous_cached_steps": 0},
    "few in all": {**BASE, "max_cached_steps": 3},
    "budget": {**BASE, "max_accumulated_residual_diff_threshold": 2.0},
    "dynamic mask": {**BASE, "steps_computation_mask": MASK},
    "short mask": {**BASE, "steps_computation_mask": MASK[:8]},
    "everything": {**BASE, "residual_diff_threshold": 1.0},
    "refreshed": {**BASE, "force_refresh_step_hint": 6},
    "refreshed again": {**BASE, "force_refresh_step_hint": 5, "force_refresh_step_policy": "repeat"},
}  # fmt: skip
# what cache-dit 1.5.3 decides on the tiny Flux below, C for a computed step
TABLE: dict[str, str] = json.loads(Path(__file__).with_name("db_cache_decisions.json").read_text())


def flux() -> tuple[Any, list[dict[str, Any]]]:
    pytest.importorskip("diffusers")
    depth = {"num_layers": 7, "num_single_layers": 1}
    model, inputs = tiny.build_entry(tiny.ENTRIES["Flux"], depth)
    return model, tiny.trajectory("Flux", inputs, STEPS, speed=0.04)


def ours(config: DBCacheConfig) -> tuple[list[Tensor], str]:
    model, calls = flux()
    double = BlockAdapter(blocks=("transformer_blocks",))  # cache-dit counts each list for itself
    with fastcache.enable(model, config, adapter=double) as cache:
        outputs = []
        for i, call in enumerate(calls):
            with cache.context("cond", step_index=i, num_inference_steps=STEPS):
                outputs.append(tiny.output(model, call))
        return outputs, toys.actions(cache)


def theirs(fields: dict[str, Any]) -> tuple[list[Tensor], str]:
    other = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    model, calls = flux()
    last = model.transformer_blocks[-1 - fields.get("Bn_compute_blocks", 0)]
    ran: list[int] = []
    last.register_forward_hook(lambda *_: ran.append(1))
    adapter = other.BlockAdapter(
        transformer=model,
        blocks=model.transformer_blocks,
        forward_pattern=other.ForwardPattern.Pattern_1,
    )
    settings = other.DBCacheConfig(**fields, num_inference_steps=STEPS)
    other.enable_cache(adapter, cache_config=settings)
    outputs, marks = [], ""
    for call in calls:
        ran.clear()
        outputs.append(tiny.output(model, call))
        marks += "C" if ran else "."
    return outputs, marks


@pytest.mark.parametrize("case", CASES)
def test_the_installed_cache_dit_decides_and_computes_the_same(case):
    outputs, marks = theirs(CASES[case])
    found, actions = ours(DBCacheConfig(**CASES[case]))
    assert actions == marks == TABLE[case]
    for a, b in zip(found, outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_decisions_are_those_of_the_table(case):
    assert ours(DBCacheConfig(**CASES[case]))[1] == TABLE[case]


def test_defaults_are_those_of_cache_dit():
    other = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    theirs, ours = other.DBCacheConfig(), DBCacheConfig()
    assert {k: getattr(theirs, k) for k in vars(ours)} == vars(ours)


def test_its_recipe_says_what_it_means():
    recipe = DBCacheConfig(Fn_compute_blocks=4, Bn_compute_blocks=2, max_warmup_steps=3).recipe()
    assert recipe.where == Stack(4, 2) and recipe.name == "DBCacheConfig"
    assert recipe.when == DualBlock(0.08, warmup=3, max_skips=0, last=False)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    static = DBCacheConfig(**STATIC).recipe(Taylor(1))
    assert static.when == Mask(MASK) and static.what == Taylor(1)
    longer = DBCacheConfig(**STATIC, num_inference_steps=18, force_refresh_step_hint=9)
    marks = longer.recipe().when.compute
    assert [int(m) for m in marks] == [*MASK[:9], *MASK[:9]]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"Fn_compute_blocks": 0}, "Fn_compute_blocks"),
        ({"Bn_compute_blocks": -1}, "Bn_compute_blocks"),
        ({"residual_diff_threshold": -0.1}, "residual_diff_threshold"),
        ({"max_cached_steps": -2}, "max_cached_steps"),
        ({"warmup_interval": 0}, "warmup_interval"),
        ({"steps_computation_mask": [1, 2]}, "steps_computation_mask"),
        ({"steps_computation_policy": "loose"}, "steps_computation_policy"),
        ({"force_refresh_step_policy": "often"}, "force_refresh_step_policy"),
        ({"cfg_diff_compute_separate": False}, "cfg_diff_compute_separate"),
        ({**STATIC, "force_refresh_step_hint": 4}, "num_inference_steps"),
    ],
)
def test_what_is_out_of_range_is_named(fields, said):
    with pytest.raises((ValueError, TypeError), match=said):
        DBCacheConfig(**fields)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_where_nothing_limits_it_the_change_alone_is_looked_at_with_the_same_outcome(threshold):
    policy = DualBlock(threshold=threshold, warmup=2, max_skips=0)
    short, long = policy.begin(40), policy.begin(40)
    changes = [None, 0.1, 0.2, 0.3, 0.29, math.nan, 0.0, math.inf, 0.1, 0.5, 1.5, 0.1, 0.1]
    for index, change in enumerate(changes * 3):
        step = Step(index, 40, compute=index == 20)
        decision = policy.decide(short, step, change)
        assert decision == Policy.decide(policy, long, step, change)
        if decision.action == REUSE and index % 5 == 0:  # nothing valid was there
            policy.computed(short, step)
            policy.computed(long, step)
        assert (short.in_a_row, short.computed_at) == (long.in_a_row, long.computed_at)
        assert short.decision is decision
