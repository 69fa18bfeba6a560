# SPDX-License-Identifier: Apache-2.0
"""A call that says by its number that it is the next one of its run is located in fewer steps, and no other way."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
import toys

import fastcache
from fastcache import DBCacheConfig, FirstBlockCacheConfig

CONFIGS: dict[str, Any] = {
    "first_block": lambda: FirstBlockCacheConfig(0.08),
    "db_cache": lambda: DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.08),
    "taylor": lambda: toys.config("taylor_seer"),
    "timed": lambda: toys.config("pyramid"),
}


def calls(seed: int, count: int = 80) -> list[dict[str, Any]]:
    """Contexts and lengths of what is called in them: mostly one step after the other, now and then anything else."""
    choose, next_of = random.Random(seed), dict[tuple[int, str], int]()
    found = []
    for _ in range(count):
        request, name = choose.choice([0, 0, 0, 1]), choose.choice(["cond", "cond", "uncond"])
        step = next_of.get((request, name), 0)
        odd = choose.random()
        step = 0 if odd < 0.06 else max(step - 1, 0) if odd < 0.1 else step + 2 * (odd < 0.14)
        next_of[request, name] = step + 1
        context: dict[str, Any] = {"request": request, "name": name, "step_index": step}
        if 0.14 < odd < 0.2:
            del context["step_index"]
        if choose.random() < 0.1:
            context["timestep"] = 900.0 - step
        if choose.random() < 0.3:
            context["num_inference_steps"] = choose.choice([max(step + 1, 20), max(step + 1, 30)])
        if choose.random() < 0.1:
            context |= {"compute": True, "sigma": 0.5}
        found.append({"context": context, "tokens": choose.choice([6] * 9 + [5])})
    return found


def played(method: str, seed: int, short: bool) -> tuple[list[Any], list[Any], int]:
    """What the calls return or raise, their records, and how many took the short way."""
    model = toys.Model()
    inputs = {n: toys.inputs(2, seed=1, tokens=n) for n in (5, 6)}
    outcomes: list[Any] = []
    taken = 0
    with fastcache.enable(model, CONFIGS[method]()) as cache:
        runs = cache.denoisers[0].runs
        following = runs.following

        def noted(*args: Any) -> Any:
            nonlocal taken
            found = following(*args)
            taken += found is not None
            return found

        runs.following = noted  # type: ignore[method-assign]
        runs.by_number = runs.by_number and short
        for i, call in enumerate(calls(seed)):
            given = inputs[call["tokens"]][0]
            given = given | {"hidden_states": given["hidden_states"] * (1 + 0.01 * (i % 7))}
            try:
                with cache.context(**call["context"]):
                    outcomes.append(toys.step(model, given))
            except ValueError as error:
                outcomes.append(str(error))
        return outcomes, list(cache.stats), taken


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("method", CONFIGS)
def test_the_short_way_finds_what_the_general_one_finds(method: str, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes, records, taken = played(method, seed, True)
        expected, general, none = played(method, seed, False)
    assert records == general and not none
    assert bool(taken) == (method != "timed")  # whose rules want to know the time
    assert method == "timed" or {r.action for r in records} == {"compute", "reuse"}
    for ours, theirs in zip(outcomes, expected, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
