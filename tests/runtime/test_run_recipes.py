# SPDX-License-Identifier: Apache-2.0
"""Runs with recipes of their own on one model: each gets what it gets alone."""

from __future__ import annotations

import contextvars
import random
import threading
from typing import Any

import pytest
import tiny_pipelines
import torch
import toys
from torch import Tensor, nn

import fastcache
from fastcache import FirstBlock, Guided, Interval, Modules, Output, Recipe, Taylor

METHODS = ("first_block", "mag_cache", "taylor_seer")
RECIPES: dict[str, Any] = {
    **{method: toys.config(method) for method in METHODS},
    "balanced": "balanced",
    "off": "off",
    "forecast": Recipe(Interval(3), Taylor(1)),
    "guided": Recipe(FirstBlock(0.1, warmup=2), Guided(guide="residual")),
    "ends": fastcache.Recipe(Interval(2), Taylor(0), fastcache.Stack(first=1, last=1)),
    "output": Recipe(Interval(4), Taylor(1), Output()),
    "modules": Recipe(Interval(2), Taylor(1), Modules(("attn",))),
}


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def calls_of(request: int) -> list[dict[str, Any]]:
    return toys.inputs(seed=request, batch=1 + request % 2, tokens=4 + request % 3)


def alone(recipe: Any, request: int, shape: str = "tensor") -> list[Tensor]:
    target = toys.model(shape)
    with fastcache.enable(target, recipe) as cache, cache.run(num_inference_steps=toys.STEPS):
        return [toys.step(target, call) for call in calls_of(request)]


def interleaved(cache: fastcache.Cache, call: Any, names: list[str], seed: int = 0) -> list[list]:
    """Outputs of one request per recipe, their steps in random order, each in a context of variables of its own."""
    order = [r for r in range(len(names)) for _ in range(toys.STEPS)]
    random.Random(seed).shuffle(order)
    runs = [
        cache.run(r, num_inference_steps=toys.STEPS, recipe=RECIPES[name])
        for r, name in enumerate(names)
    ]
    places = [contextvars.copy_context() for _ in names]
    for place, run in zip(places, runs, strict=True):
        place.run(run.__enter__)
    outputs: list[list] = [[] for _ in names]
    for r in order:
        outputs[r].append(places[r].run(toys.step, call, calls_of(r)[len(outputs[r])]))
    for place, run in zip(places, runs, strict=True):
        place.run(run.__exit__, None, None, None)
    return outputs


@pytest.mark.parametrize("shape", ["tensor", "two lists", "(hidden, encoder)"])
@pytest.mark.parametrize("own", ["off", "first_block", "modules", "output"])
def test_each_interleaved_request_equals_the_same_request_alone(own, shape, monkeypatch):
    if toys.SHAPES[shape][1]:
        words = toys.inputs
        monkeypatch.setattr(toys, "inputs", lambda **k: words(**{**k, "text": True}))
    target, names = toys.model(shape), list(RECIPES) * 2
    kinds, found = [type(m) for m in target.modules()], {}
    with fastcache.enable(target, RECIPES[own]) as cache:
        outputs = interleaved(cache, target, names)
        for record in cache.stats:
            found.setdefault(record.request, []).append(record.action)
        assert not cache.nbytes() or all(not d.pool.states for d in cache.methods)
    assert [type(m) for m in target.modules()] == kinds
    for r, name in enumerate(names):
        assert equal(outputs[r], alone(RECIPES[name], r, shape)), name
        assert len(found[r]) == toys.STEPS
        assert ("reuse" in found[r]) == (name != "off"), name


def test_off_is_the_model_itself_and_keeps_nothing():
    target = toys.model()
    want = toys.plain(target, calls_of(0))
    with fastcache.enable(target, "off") as cache:
        assert equal(toys.run(cache, target, calls_of(0)), want) and not cache.nbytes()
        with cache.run(recipe=RECIPES["forecast"]):
            forecast = [toys.step(target, call) for call in calls_of(0)]
            assert cache.nbytes()
    assert cache.recipe.name == "off" and not equal(forecast, want)
    assert Recipe.from_dict(cache.recipe.to_dict()) == cache.recipe


def test_threads_bring_recipes_of_their_own():
    target, outputs = toys.model(), {}
    names = ["first_block", "off", "modules", "output", "forecast", "mag_cache"]

    def serve(request: int) -> None:
        with cache.run(recipe=RECIPES[names[request]], num_inference_steps=toys.STEPS):
            outputs[request] = [toys.step(target, call) for call in calls_of(request)]

    with fastcache.enable(target, "balanced") as cache:
        threads = [threading.Thread(target=serve, args=(r,)) for r in range(len(names))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for request, name in enumerate(names):
        assert equal(outputs[request], alone(RECIPES[name], request)), name


def test_which_recipe_a_run_has():
    """None is that of the run around, else the cache's own; what equals the cache's own is its own."""
    target = toys.model()
    with fastcache.enable(target, RECIPES["first_block"]) as cache:
        same = toys.config("first_block")
        assert cache.run().method is cache.run(recipe=same).method is None
        assert cache.run(recipe=cache.recipe).method is None and not cache.methods.others
        with cache.run(recipe="off") as outer, cache.run() as inner, cache.run(recipe=same) as own:
            assert inner.method is outer.method is not None and own.method is None
        assert cache.run(recipe="off").method is outer.method
        again = [cache.run(recipe=Recipe(Interval(2))) for _ in range(3)]
        assert len({id(run.method) for run in again}) == 1


def test_a_run_inside_another_one_has_its_own_recipe():
    target = toys.model()
    with fastcache.enable(target, "off") as cache, cache.run("outer", recipe=Recipe(Interval(2))):
        toys.step(target, calls_of(0)[0])
        with cache.run("inner", recipe=Recipe(Interval(3))):
            toys.step(target, calls_of(1)[0])
        toys.step(target, calls_of(0)[1])
    assert [(r.request, r.action) for r in cache.stats] == [
        ("outer", "compute"), ("inner", "compute"), ("outer", "reuse"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "kind", "words"),
    [
        ("blanced", ValueError, "recipe is 'blanced'.*balanced.*'off'"),
        (3, TypeError, "recipe is 3"),
        ("nowhere.json", ValueError, "nowhere"),
        (Recipe(Interval(2), where=Modules(("no_such",))), ValueError, "no_such"),
        (Recipe(Interval(2), where=fastcache.Stack(first=9)), ValueError, "leaves none"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_before_the_run(recipe, kind, words):
    target = toys.model()
    with fastcache.enable(target, RECIPES["modules"]) as cache:
        hooked = [type(m) for m in target.modules()]
        with pytest.raises(kind, match=words):
            cache.run(recipe=recipe)
        assert [type(m) for m in target.modules()] == hooked and not cache.methods.others
        assert equal(toys.run(cache, target, calls_of(0)), alone(RECIPES["modules"], 0))
    with pytest.raises(ValueError, match="recipe: this cache is disabled"):
        cache.run(recipe="off")


def test_an_exception_forgets_that_run_alone():
    target = toys.model()
    with fastcache.enable(target, "balanced") as cache:
        runs = [cache.run(r, recipe=RECIPES[n]) for r, n in enumerate(("forecast", "modules"))]
        for run in runs:
            run.__enter__()
            run.pause()
        outputs: list[list] = [[], []]

        def step(r: int, call: dict[str, Any]) -> None:
            runs[r].resume()
            try:
                outputs[r].append(toys.step(target, call))
            finally:
                runs[r].pause()

        for i in range(4):
            for r in range(2):
                step(r, calls_of(r)[i])
        with pytest.raises(RuntimeError):
            step(1, {"hidden_states": torch.zeros(1, 4, 5), "timestep": torch.zeros(1)})
        for i in range(4, toys.STEPS):
            step(0, calls_of(0)[i])
        outputs[1].clear()
        for i in range(toys.STEPS):
            step(1, calls_of(1)[i])
    assert equal(outputs[0], alone(RECIPES["forecast"], 0))
    assert equal(outputs[1], alone(RECIPES["modules"], 1))


def test_update_and_disable_while_a_run_has_a_recipe_of_its_own():
    target = toys.model()
    cache = fastcache.enable(target, "balanced")
    calls = calls_of(0)
    with cache.run(recipe=RECIPES["modules"], num_inference_steps=toys.STEPS):
        outputs = [toys.step(target, call) for call in calls[:4]]
        with pytest.raises(ValueError):
            cache.update("no such")
        cache.update(RECIPES["output"])
        outputs += [toys.step(target, call) for call in calls[4:8]]
        cache.update("balanced")
        outputs += [toys.step(target, call) for call in calls[8:]]
        assert equal(outputs, alone(RECIPES["modules"], 0))
        cache.disable()
        assert equal([toys.step(target, calls[0])], toys.plain(toys.model(), calls[:1]))
    assert not any("fastcache" in name for m in target.modules() for name in m.__dict__)
    assert "forward" not in target.__dict__ and type(target.blocks) is nn.ModuleList


def test_recipes_that_nobody_uses_any_more_let_go_of_their_storage():
    target = toys.model()
    with fastcache.enable(target, "balanced") as cache:
        held = []
        for n in range(30):
            with cache.run(recipe=Recipe(Interval(2 + n))):
                toys.step(target, calls_of(0)[0])
            held.append(cache.nbytes())
        assert len(cache.methods.others) == 9 and held[-1] == held[9] < held[0] * 10


def test_a_budget_counts_the_runs_of_all_recipes():
    target = toys.model()
    names = ["forecast", "first_block", "guided", "modules"]
    with fastcache.enable(target, "balanced", max_bytes=2000) as cache:
        outputs = interleaved(cache, target, names)
        assert 0 < cache.nbytes() <= 2000
        assert any(r.reason == "no room for a cache" for r in cache.stats)
    assert all(torch.isfinite(t).all() for found in outputs for t in found)


@pytest.mark.parametrize("options", [{}, {"frozen": True}], ids=["guarded", "frozen"])
def test_compiled_runs_with_recipes_of_their_own(options):
    names = ["first_block", "off", "forecast", "modules", "output"]
    target = toys.model()
    with fastcache.enable(target, "balanced") as cache:
        call = fastcache.compile(target, backend="eager", dynamic=False, **options)
        outputs = interleaved(cache, call, names)
        again = interleaved(cache, call, names, seed=1)
    for r, name in enumerate(names):
        want = alone(RECIPES[name], r)
        for found in (outputs[r], again[r]):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


def test_under_the_users_own_compile_they_run_as_they_are():
    target = toys.model()
    with fastcache.enable(target, RECIPES["forecast"]) as cache:
        call = torch.compile(target, backend="eager")

        def run(request: int, recipe: Any) -> list[Tensor]:
            outputs = []
            with cache.run(request, num_inference_steps=toys.STEPS, recipe=recipe):
                for step in calls_of(request):
                    with cache.context("cond"):
                        outputs.append(toys.step(call, step))
            return outputs

        for recipe in ("forecast", "modules", "output", "forecast", "off"):
            given = None if recipe == "forecast" else RECIPES[recipe]
            torch.testing.assert_close(run(0, given), alone(RECIPES[recipe], 0), rtol=0, atol=1e-6)


# --- pipelines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["flux", "sd3_heun", "wan_video"])
def test_a_pipeline_inside_a_run_has_its_recipe(made):
    """Wan's two experts share a run; its recipe is both of theirs."""
    build = {"wan_video": lambda: tiny_pipelines.wan_video(2)}
    build = build.get(made) or getattr(tiny_pipelines, made)
    recipes = ["off", Recipe(Interval(3), Taylor(1)), RECIPES["output"]]

    def picture(pipe: Any, inputs: dict[str, Any]) -> Tensor:
        given = {**inputs, "generator": torch.Generator().manual_seed(0)}
        return torch.as_tensor(pipe(**given)[0])

    want = []
    for recipe in recipes:
        pipe, inputs = build()
        with fastcache.enable(pipe, recipe):
            want.append(picture(pipe, inputs))
    pipe, inputs = build()
    with fastcache.enable(pipe, recipes[1]) as cache:
        for place in (0, 2, 1, 0, 2):
            with cache.run(recipe=recipes[place]):
                assert torch.equal(picture(pipe, inputs), want[place])
        assert torch.equal(picture(pipe, inputs), want[1])  # outside of a run: the cache's own
        assert cache.stats.reused and not any(d.pool.states for d in cache.methods)
