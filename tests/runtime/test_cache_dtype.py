# SPDX-License-Identifier: Apache-2.0
"""Cached values kept in fewer bits: fewer bytes, outputs that stay near, the same in graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import Tensor

import fastcache
from fastcache import Extrapolate, Guided, Interval, Modules, Recipe, Reuse, Taylor

FP8 = torch.float8_e4m3fn
ERROR = {torch.bfloat16: 2**-8, torch.float16: 2**-11, FP8: 2**-3}  # of a cached value, relative

RECIPES = {
    "reuse": Recipe(Interval(3), Reuse()),
    "taylor": Recipe(Interval(3), Taylor(1)),  # weights up to 3 and -2
    "modules": Recipe(Interval(3), Reuse(), Modules()),
    "extrapolate": Recipe(Interval(2), Extrapolate(0.3), Modules()),
}


def run(config: Any, **options: Any) -> tuple[list[Tensor], fastcache.Cache]:
    target, calls = toys.Model(), toys.inputs()
    cache = fastcache.enable(target, config, **options)
    return toys.run(cache, target, calls), cache


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_fewer_bytes_and_outputs_that_stay_near(name, dtype):
    exact, held = run(RECIPES[name])
    small, cache = run(RECIPES[name], cache_dtype=dtype)
    assert 0 < apart(small, exact) < (5 if name == "taylor" else 2) * ERROR[dtype]
    assert [r.action for r in cache.stats] == [r.action for r in held.stats]
    scales = 4 / toys.DIM if dtype == FP8 else 0
    assert cache.nbytes() == held.nbytes() * (dtype.itemsize + scales) / 4
    assert all(x.dtype == y.dtype for x, y in zip(small, exact, strict=True))


def test_device_weights_take_bfloat16_rows():
    exact, held = run(Recipe(Interval(3), Guided(2)))
    small, cache = run(Recipe(Interval(3), Guided(2)), cache_dtype=torch.bfloat16)
    assert 0 < apart(small, exact) < 0.02
    assert cache.nbytes() < held.nbytes()


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("name", ["reuse", "taylor", "modules"])
def test_the_same_in_graphs(name, dtype):
    eager, _ = run(RECIPES[name], cache_dtype=dtype)
    target, calls = toys.Model(), toys.inputs()
    with fastcache.enable(target, RECIPES[name], cache_dtype=dtype) as cache, torch.no_grad():
        compiled = fastcache.compile(target, backend="eager")
        outputs = toys.run(cache, compiled, calls)
    assert cache.stats.reused and apart(outputs, eager) < 1e-6


@pytest.mark.parametrize(
    ("value", "error"), [("fp8", TypeError), (8, TypeError), (torch.int8, ValueError)]
)
def test_a_dtype_that_is_none_is_refused_by_name(value, error):
    with pytest.raises(error, match="cache_dtype"):
        fastcache.enable(toys.Model(), RECIPES["reuse"], cache_dtype=value)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (fastcache.TaylorSeerCacheConfig(), torch.bfloat16),
        (fastcache.MagCacheConfig(calibrate=True), torch.bfloat16),
        (Recipe(Interval(3), Guided(2)), FP8),
    ],
)
def test_what_cannot_be_had_is_said_and_the_model_left_alone(config, dtype):
    target = toys.Model()
    with pytest.raises(ValueError, match="cache_dtype"):
        fastcache.enable(target, config, cache_dtype=dtype)
    fastcache.enable(target, RECIPES["reuse"]).disable()
