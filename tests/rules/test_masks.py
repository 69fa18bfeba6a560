# SPDX-License-Identifier: Apache-2.0
"""Schedules that are written down: masks by name, and gaps that grow."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import fastcache
from fastcache import Growing, Mask, Recipe, Taylor, preset, presets, steps_mask

NAMES = ("slow", "medium", "fast", "ultra")
# what cache-dit 1.5.3 returns at 4 to 60 steps; it knows neither 5 nor 7
KNOWN = json.loads(Path(__file__).with_name("cache_dit_masks.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_named_masks_equal_those_of_cache_dit(name):
    assert sorted(map(int, KNOWN[name])) == [4, 6, *range(8, 61)]
    for steps, marks in KNOWN[name].items():
        assert "".join(map(str, steps_mask(name, int(steps)))) == marks


def test_the_installed_cache_dit_says_the_same():
    other = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    for name in NAMES:
        for steps in (4, 6, *range(8, 101)):
            assert steps_mask(name, steps) == other.steps_mask(mask_policy=name, total_steps=steps)
    for bins in (([2, 1, 1], [3, 2]), ([1], [2, 2]), ([0, 2], [1])):
        for steps in range(1, sum(map(sum, bins)) + 1):
            assert steps_mask(bins, steps) == other.steps_mask(*bins, steps)


def test_bins_are_computed_and_reused_by_turns():
    assert steps_mask(([3, 1], [2, 1]), 7) == [1, 1, 1, 0, 0, 1, 0]
    assert steps_mask(((2,), (4,)), 4) == [1, 1, 0, 0]
    assert steps_mask(([1], [1, 2]), 4) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "policy, steps, said",
    [
        ("quick", 28, "policy.*quick"),
        ("fast", 7, "num_inference_steps.*7"),
        ("fast", 5, "num_inference_steps.*5"),
        ("fast", 0, "num_inference_steps"),
        ("fast", 2.5, "num_inference_steps"),
        (3, 28, "policy"),
        ((1, 2, 3), 28, "policy"),
        (([1, -1], [1]), 1, r"policy\[0\]"),
        (([1], [1.5]), 1, r"policy\[1\]"),
        ((1, [1]), 1, r"policy\[0\]"),
        (([2], [1]), 4, "num_inference_steps.*3"),
    ],
)
def test_what_is_no_mask_is_named(policy, steps, said):
    with pytest.raises((TypeError, ValueError), match=said):
        steps_mask(policy, steps)


def test_a_mask_is_followed_exactly_whatever_predicts():
    for steps in (4, 6, 8, 9, 28):
        marks = steps_mask("fast", steps)
        assert Recipe(Mask(marks), Taylor(1)).plan(steps).actions == tuple(
            "compute" if m else "reuse" for m in marks
        )
    guarded = Recipe(Mask(steps_mask("fast", 6), warmup=5), Taylor(1))
    assert guarded.plan(6).computed == (0, 1, 2, 3, 4, 5)


MASKS = {name: row for name, row in presets().items() if name.startswith("mask/")}


@pytest.mark.parametrize("name", MASKS)
def test_a_preset_holds_the_mask_of_its_steps(name):
    steps = MASKS[name]["steps"]
    assert name == f"mask/{steps}"
    assert preset(name).when == Mask(steps_mask("medium", steps), max_skips=0)
    assert preset(name).plan(steps).computed == tuple(
        i for i, m in enumerate(steps_mask("medium", steps)) if m
    )


@pytest.mark.bench
def test_presets_of_few_steps_keep_their_lead_where_they_have_one():
    """The figures of their rows, in dB to the uncached run: above fewer steps from 8 on, below at 4 and 6."""
    pytest.importorskip("diffusers")
    from fastcache.demo import metrics, sample
    from fastcache.demo.model import load_model

    torch.set_num_threads(1)
    model, labels = load_model(), torch.arange(8) % 10
    for name, row in MASKS.items():
        steps, computed = row["steps"], sum(steps_mask("medium", row["steps"]))
        found = fewer = 0.0
        for seed in range(4):
            wanted = sample.generate(model, labels, steps=steps, seed=seed)
            short = sample.generate(model, labels, steps=computed, seed=seed)
            fewer += float(metrics.psnr(short, wanted)) / 4
            with fastcache.enable(model, name) as cache:
                images = sample.generate(model, labels, steps=steps, seed=seed, cache=cache)
                assert cache.stats.computed == computed
            found += float(metrics.psnr(images, wanted)) / 4
        said = [float(number) for number in re.findall(r"[0-9]+[.][0-9]", row["source"])][-2:]
        assert [found, fewer] == pytest.approx(said, abs=0.2)
        assert (found > fewer + 1) == (steps >= 8)


def computed(n: int, first: int, total: int) -> list[int]:
    """The definition: the first steps, then one gap after the other."""
    steps, gap = list(range(first)), 2
    while steps[-1] < total:
        steps.append(steps[-1] + min(gap, n))
        gap += 1
    return [s for s in steps if s < total]


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("first", range(1, 6))
def test_growing_gaps(n, first):
    for total in range(1, 70):
        for what in (fastcache.Reuse(), Taylor(1)):
            plan = Recipe(Growing(n, first), what).plan(total)
            assert list(plan.computed) == computed(n, first, total)
    assert Growing(n, first).never_reuses == (n == 1)


def test_growing_takes_guards_that_are_asked_for():
    assert Recipe(Growing(4)).plan(28).computed == (0, 1, 2, 3, 5, 8, 12, 16, 20, 24)
    assert Recipe(Growing(4, last=True)).plan(28).computed[-1] == 27
    assert Recipe(Growing(4, 1, warmup=3)).plan(12).computed == (0, 1, 2, 5, 9)
    for field, value in (("n", 0), ("first", 0), ("n", 1.5), ("last", 1)):
        with pytest.raises((TypeError, ValueError), match=field):
            Growing(**{field: value})
