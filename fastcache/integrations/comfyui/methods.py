# SPDX-License-Identifier: Apache-2.0
"""What the node's method, speed and threshold stand for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ...configs import DBCacheConfig, EasyCacheConfig
from ...policies import Mask
from ...predictors import Reuse, Taylor
from ...recipe import Recipe

SCHEDULE = "schedule (speed)"
WARMUP = 3  # steps that a schedule computes at the start; a forecast needs them

# By name, as the node shows it: what a threshold makes of it.
BY_THRESHOLD: dict[str, Callable[[float], Any]] = {
    "first block": lambda threshold: dual(threshold).recipe(),
    "first block + forecast": lambda threshold: dual(threshold).recipe(Taylor(1)),
    "easy cache": lambda threshold: EasyCacheConfig(threshold),
}
METHODS = (*BY_THRESHOLD, SCHEDULE)


def dual(threshold: float) -> DBCacheConfig:
    return DBCacheConfig(
        Fn_compute_blocks=1, residual_diff_threshold=threshold, max_warmup_steps=WARMUP
    )


def recipe_of(method: str, speed: float, threshold: float, steps: int) -> Any:
    """What `fastcache.enable` takes for one generation.

    Args:
        method: one of METHODS.
        speed: how much fewer steps a schedule computes, unitless, from 1 on.
        threshold: of the other methods, unitless; 0 reuses nothing.
        steps: of the generation, a count.
    Returns:
        A config or recipe.
    Raises:
        ValueError: that names the field.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, must be one of {', '.join(METHODS)}")
    if not speed >= 1:
        raise ValueError(f"speed is {speed!r}, must be 1 or more")
    if not threshold >= 0:
        raise ValueError(f"threshold is {threshold!r}, must be 0 or more")
    if method == SCHEDULE:
        marks = schedule(steps, speed)
        return Recipe(Mask(marks), Reuse() if all(marks) else Taylor(1))
    if not threshold:
        return Recipe(Mask([1] * steps), Reuse())
    return BY_THRESHOLD[method](threshold)


def schedule(steps: int, speed: float) -> list[int]:
    """Marks of the steps that are computed: the first ones, the last one, and others evenly between.

    Args:
        steps: of the generation, a count.
        speed: how much fewer are computed, unitless, from 1 on.
    Returns:
        1 or 0 per step, at least WARMUP + 1 of them 1.
    """
    computed = min(steps, max(WARMUP + 1, math.ceil(steps / speed)))
    begin = WARMUP - 1
    between = computed - begin - 1
    if between < 1:
        return [1] * steps
    at = {begin + round(i * (steps - 1 - begin) / between) for i in range(between + 1)}
    return [int(i < begin or i in at) for i in range(steps)]
