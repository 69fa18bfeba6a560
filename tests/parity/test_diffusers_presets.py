# SPDX-License-Identifier: Apache-2.0
"""Presets: every row has a source, builds, and hooks the model it is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

import tiny

import fastcache
from fastcache.configs.presets import preset, presets

MODELS = {
    "converged": "Flux",
    "quality": "Flux",
    "balanced": "CogVideoX",
    "fast": "Wan3D",
    "mask": "Flux",
    "flux": "Flux",
    "hunyuanvideo": "HunyuanVideo",
    "wan": "Wan3D",
    "latte": "Latte",
    "cogvideox": "CogVideoX",
}


@pytest.mark.parametrize("name", presets())
def test_a_preset_names_its_source_and_skips_on_its_model(name):
    row = presets()[name]
    assert len(row["source"]) > 20 and row["steps"] > 1
    model, inputs = tiny.build(MODELS[name.split("/")[0]])
    kind = fastcache.configs.CONFIGS.get(row.get("config"))
    timed = hasattr(kind, "current_timestep_callback")
    config = preset(name, **({"current_timestep_callback": lambda: 500} if timed else {}))
    guided = kind is fastcache.FasterCacheConfig
    if guided:
        inputs = {
            k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
        }
    with fastcache.enable(model, config) as cache:
        hooked = cache.hooked()
        for i in range(12):  # a still trajectory: whatever may be reused is
            with cache.context("cond_uncond" if guided else "cond", step_index=i):
                tiny.output(model, inputs)
        assert cache.stats.reused and any(hooked.values())


def test_the_budgets_are_recipes_that_compute_less_and_less():
    recipes = [preset(name) for name in ("quality", "balanced", "fast")]
    computed = [len(recipe.plan(28).computed) for recipe in recipes]
    assert computed == sorted(set(computed), reverse=True)


def test_changes_reach_the_policy_and_the_predictor():
    recipe = preset("quality", max_skips=2, guide="modulated")
    assert recipe.when == fastcache.Mask(
        preset("quality").when.compute, True, max_skips=2, last=True
    )
    assert recipe.what == fastcache.Guided(2, "modulated", 0.04, early=True, prior=2)
    with pytest.raises(TypeError, match=r"'fast' has no field threshold; it has .*order.*warmup"):
        preset("fast", threshold=0.1)


def test_budgets_were_measured():
    """Each names a point of the committed sweep, and dearer budgets are better."""
    results = Path(__file__).parents[2] / "bench" / "results" / "quality-cpu.jsonl"
    if not results.exists():
        pytest.skip("needs the source tree")
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    found = {
        (r["predictor"], r["setting"]): r
        for r in rows
        if (r["steps"], r["guidance"], r["system"]) == (28, "none", "fastcache")
    }
    points = [found[tuple(row["point"])] for row in presets().values() if "point" in row]
    assert len(points) == 3
    assert [p["psnr"] for p in points] == sorted((p["psnr"] for p in points), reverse=True)
    assert [p["compute"] for p in points] == sorted((p["compute"] for p in points), reverse=True)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'sdxl'.*flux.*cogvideox/pab"):
        preset("sdxl")
    assert preset("flux", threshold=0.1).threshold == 0.1
