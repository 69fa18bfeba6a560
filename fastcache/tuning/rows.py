# SPDX-License-Identifier: Apache-2.0
"""One run that a tuning has tried, and as plain JSON values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..files import FileError
from ..recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One run that was tried.

    Args:
        name: in words.
        recipe: None is a run without a cache.
        steps: `num_inference_steps` of the run, a count.
        computed: steps of it that were computed, as the share of the model's calls: a fraction where branches
            differ, or where a solver calls the model twice in a step.
        seconds: of the run.
        speedup: times as fast as the uncached run at the usual number of steps.
        psnr: to the reference, dB, mean over seeds; infinite where equal.
        seeds: that it was judged on.
    """

    name: str
    recipe: Recipe | None
    steps: int
    computed: float
    seconds: float
    speedup: float
    psnr: float
    seeds: tuple[int, ...]


def values_of(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "recipe": None if row.recipe is None else row.recipe.to_dict(),
        "steps": row.steps,
        "computed": round(row.computed, 3),
        "seconds": row.seconds,
        "speedup": round(row.speedup, 4),
        "psnr": round(row.psnr, 3) if math.isfinite(row.psnr) else None,
        "seeds": list(row.seeds),
    }


def row_from(held: Any, at: str) -> Row:
    number = (int, float)
    found = checked_fields(
        held, at, name=str, steps=int, computed=number, seconds=number, speedup=number
    )
    psnr, seeds, recipe = held.get("psnr"), held.get("seeds"), held.get("recipe")
    if not isinstance(psnr, int | float | None):
        raise FileError(f"recipe: {at}.psnr must be a number or null")
    if not isinstance(seeds, list) or not all(isinstance(s, int) for s in seeds):
        raise FileError(f"recipe: {at}.seeds must be a list of whole numbers")
    made = None if recipe is None else Recipe.from_dict(recipe)
    return Row(recipe=made, psnr=math.inf if psnr is None else psnr, seeds=tuple(seeds), **found)


def checked_fields(held: Any, at: str, **kinds: Any) -> dict[str, Any]:
    """Those fields of an object, each of its kind."""
    if not isinstance(held, dict):
        raise FileError(f"recipe: {at} must be an object")
    for name, kind in kinds.items():
        wrong = not isinstance(held.get(name), kind) or (
            kind is not bool and isinstance(held[name], bool)
        )
        if wrong:
            raise FileError(f"recipe: {at}.{name} is missing or of another kind")
    return {name: held[name] for name in kinds}


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other one beats in both time and error, the slowest first."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda r: (r.speedup, r.psnr), reverse=True):
        if not found or row.psnr > found[-1].psnr:
            found.append(row)
    return found[::-1]
