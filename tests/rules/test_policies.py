# SPDX-License-Identifier: Apache-2.0
"""What policies, predictors and targets say about themselves, and what others read off it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

import fastcache
from fastcache import (
    Broadcast,
    FirstBlock,
    Guidance,
    Guided,
    Interval,
    Magnitude,
    Mask,
    Misfit,
    Modules,
    Policy,
    Recipe,
    Reuse,
    Stack,
    Taylor,
    TimestepRange,
)
from fastcache.policies import COMPUTE, Step
from fastcache.policies.magnitude import Calibrate
from fastcache.signals import Signal

RATIOS = (1.0, 1.1, 0.9)


@dataclass(frozen=True)
class Latents(Policy):
    """A policy of a user's own."""

    signal = Signal("model_input", "previous")


@pytest.mark.parametrize(
    "policy, needs, measures, weighs",
    [
        (FirstBlock(0.1), True, "change", "change"),
        (Misfit(0.1), True, "misfit", "misfit"),
        (Latents(), True, "change", ""),
        (Magnitude(mag_ratios=RATIOS), False, "change", "error"),
        (Interval(3), False, "change", ""),
        (Mask((1, 0)), False, "change", ""),
    ],
)
def test_what_a_policy_needs_follows_from_its_signal(policy, needs, measures, weighs):
    assert (policy.needs_signal, policy.measures, policy.weighs) == (needs, measures, weighs)
    assert policy.needs_signal == (policy.signal is not None) == type(policy).needs_signal


@pytest.mark.parametrize(
    "policy, shape",
    [
        (FirstBlock(0.1), (2,)),
        (FirstBlock(0.1, per_sample=True), (7, 2)),
        (Misfit(0.1), (1,)),
        (Interval(3), (1,)),
    ],
)
def test_the_device_gives_as_many_numbers_as_the_signal_has(policy, shape):
    assert policy.sums(SimpleNamespace(shape=(7, 3, 5))) == shape


@pytest.mark.parametrize(
    "policy, never",
    [
        (FirstBlock(0.0), True),
        (FirstBlock(0.1), False),
        (Misfit(0.0), True),
        (Misfit(0.1), False),
        (Magnitude(0.0, mag_ratios=RATIOS), True),
        (Magnitude(0.1, 0, mag_ratios=RATIOS), True),
        (Magnitude(0.1, mag_ratios=RATIOS), False),
        (Calibrate(), True),
        (Interval(1), True),
        (Interval(2), False),
        (TimestepRange(1), True),
        (TimestepRange(2), False),
        (Broadcast((500,), 1), True),
        (Broadcast((500,), 2), False),
        (Mask((True, 1)), True),
        (Mask((True, 0)), False),
    ],
)
def test_settings_that_ask_for_every_step_say_so(policy, never):
    assert policy.never_reuses == never


def test_the_length_that_a_policy_is_made_for():
    assert Magnitude(num_inference_steps=9, mag_ratios=RATIOS).num_inference_steps == 9
    assert Interval(3).num_inference_steps is None


def test_guards_are_filled_in_once_and_keep_the_class():
    policy = Interval(3, warmup=2).guarded(warmup=4, last=True)
    assert policy == Interval(3, warmup=2, last=True)


def test_what_a_predictor_keeps_and_looks_at():
    assert (Reuse().depth, Reuse().guide, Reuse().dtype, Reuse().max_misfit) == (
        1,
        None,
        None,
        None,
    )
    assert (Taylor(2).depth, Taylor(2).forecasts, Taylor(0).forecasts) == (3, True, False)
    guided = Guided(1, "input", max_misfit=0.2)
    assert (guided.depth, guided.guide, guided.max_misfit) == (2, "input", 0.2)


def test_a_plan_is_a_sequence_of_actions():
    plan = Recipe(Mask((1, 0, 1, 0))).plan(4)
    assert plan[0] == "compute" and plan[-1] == "reuse"
    assert plan[1:3] == ("reuse", "compute") and list(plan) == list(plan.actions)
    assert plan.computed == (0, 2) and len(plan) == 4


def test_a_guide_is_planned_with_the_history_that_it_wants():
    """A guided rule computes until its history is full, whatever the mask says."""
    when = Mask((1, 0, 0, 0, 0), warmup=0, last=False)
    assert Recipe(when, Guided(2)).plan(5).computed == (0, 1, 2)
    assert Recipe(when, Taylor(2)).plan(5).computed == (0,)


def test_rules_that_share_no_model_are_refused_and_guidance_goes_first():
    def rule(where):
        return fastcache.Rule(Interval(2), Reuse(), where)

    assert [rule.where.scope for rule in Recipe.of([rule(Stack()), rule(Guidance())]).rules] == [
        "guidance",
        "stack",
    ]
    for wheres in ((Stack(), Stack()), (Stack(), Modules()), (Guidance(), Guidance()), ()):
        with pytest.raises(ValueError, match=r"^Recipe: "):
            Recipe.of([rule(where) for where in wheres])


def computed(policy: Policy, steps: int) -> list[int]:
    run = policy.begin(steps)
    return [i for i in range(steps) if policy.decide(run, Step(i, steps), None).action == COMPUTE]


@pytest.mark.parametrize(
    "n, phase, found",
    [
        (3.35, 4, [0, 4, 7, 10, 14, 17, 20, 24, 27]),
        (4.4, 4, [0, 4, 8, 12, 17, 21, 26]),
        (1.1, 0, [*range(10), *range(11, 21), *range(22, 28)]),  # 10 * 1.1 is a little above 11
        (2.0, 1, [0, *range(1, 28, 2)]),
        (29.0, 0, [0]),
        (1e300, 3, [0, 3]),
    ],
)
def test_a_distance_between_two_whole_numbers_mixes_their_gaps(n, phase, found):
    policy = Interval(n, phase=phase, warmup=0, last=False)
    assert computed(policy, 28) == found
    gaps = {b - a for a, b in itertools.pairwise(found)}
    assert all(gap <= policy.oldest + 1 for gap in gaps)


def test_a_whole_distance_is_one_however_it_is_written():
    assert Interval(3.0) == Interval(3) and repr(Interval(3.0).n) == "3"
    for n in range(1, 8):
        for phase in range(6):
            policy = Interval(n, phase=phase, warmup=0, last=False)
            assert computed(policy, 30) == [
                i for i in range(30) if not i or (i - phase) % n == 0
            ], "the first step has nothing to reuse"
