# SPDX-License-Identifier: Apache-2.0
"""Batches of several requests on a compiled model: a program per action and size of batch, and what each gets alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import toys
from mixing import REQUESTS, alone, joined, mixed, mixed_runs
from modulated import ADAPTERS, TabledModel
from test_compile import Graphs, fresh
from torch._dynamo.utils import counters

import fastcache
from fastcache import (
    Chebyshev,
    DualBlock,
    FirstBlock,
    Growing,
    Guided,
    Hermite,
    InputChange,
    Interval,
    Misfit,
    Recipe,
    Stack,
    Taylor,
)
from fastcache.graphs import compiled
from fastcache.runtime.mixed import SIZES

RECIPES: dict[str, Any] = {
    "reuse": Recipe(Interval(3)),
    "taylor": Recipe(Interval(3), Taylor(2)),
    "hermite": Recipe(Growing(3, first=2), Hermite(1)),
    "chebyshev": Recipe(Interval(2, warmup=4), Chebyshev()),
    "ends": Recipe(Interval(3), Taylor(1), Stack(first=1, last=1)),
    "mag_cache": toys.config("mag_cache"),
    "residual": Recipe(Interval(3), Guided(guide="residual")),
    "entering": Recipe(Interval(3), Guided(guide="input")),
    "balanced": "balanced",
    "fast": "fast",
    "off": "off",
}
INSIDE: dict[str, Any] = {
    "first_block": toys.config("first_block"),
    "first_block, guided": Recipe(FirstBlock(0.15, warmup=2), Guided(guide="residual")),
    "misfit": Recipe(Misfit(0.12), Guided(guide="residual")),
    "dual": Recipe(DualBlock(0.15, max_reused=4, warmup=1), where=Stack(first=1, last=1)),
    "early": Recipe(FirstBlock(0.15, warmup=2), Guided(guide="residual"), Stack(first=2)),
}
ALL = RECIPES | INSIDE


class Sizes(Graphs):
    """Counts graphs, and says how many samples each is for."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[int] = []

    def __call__(self, module: Any, example_inputs: Any) -> Callable:
        run = super().__call__(module, example_inputs)
        outputs = next(node for node in module.graph.nodes if node.op == "output").args[0]
        self.samples += {
            o.meta["example_value"].shape[0] for o in outputs if o.meta["example_value"].dim() > 2
        }
        return run


def check(
    recipe: Any, found: tuple, shape: str = "tensor", near: float = 1e-6, **given: Any
) -> None:
    outputs, actions, *_ = found
    for r in range(REQUESTS):
        want, decided = alone(recipe, r, shape, **given)
        assert actions[r] == decided, r
        torch.testing.assert_close(outputs[r], want, rtol=0, atol=near)


CASES = [
    *((name, {}) for name in RECIPES),
    *((name, {"frozen": True}) for name in ("taylor", "fast")),
]


@pytest.mark.parametrize(("recipe", "options"), CASES, ids=str)
def test_a_program_per_action_and_size(recipe, options):
    fresh()
    graphs = Sizes()

    def driven(target: Any) -> Any:
        return fastcache.compile(target, backend=graphs, dynamic=False, **options)

    check(RECIPES[recipe], mixed(RECIPES[recipe], seed=3, driven=driven))
    assert set(graphs.samples) <= {1, *SIZES} and max(graphs.samples) == 4
    assert graphs.count <= (3 if recipe == "off" else 6)
    assert not counters["graph_break"] and not counters["recompiles"]


@pytest.mark.parametrize(
    ("shape", "recipe"),
    [("(encoder, hidden)", "taylor"), ("extra returns", "residual"), ("in place", "residual")],
)
def test_in_shapes_of_model(shape, recipe):
    fresh()
    driven = partial(fastcache.compile, backend="eager", dynamic=False)
    check(RECIPES[recipe], mixed(RECIPES[recipe], shape, driven=driven), shape)


INSIDE_CASES = [
    *((name, {}) for name in INSIDE),
    *((n, {"frozen": True}) for n in ("first_block", "early")),
]


@pytest.mark.parametrize(("recipe", "options"), INSIDE_CASES, ids=str)
def test_where_the_stack_decides_a_head_and_two_rests_per_size(recipe, options):
    fresh()
    graphs, recipe = Sizes(), INSIDE[recipe]
    driven = partial(fastcache.compile, backend=graphs, dynamic=False, **options)
    check(recipe, mixed(recipe, seed=3, driven=driven))
    assert set(graphs.samples) <= {1, *SIZES} and max(graphs.samples) == 4
    assert graphs.count <= 3 * 2 + 2 + 3  # sizes 4 and 2, rests of one, and of a call alone
    assert not counters["graph_break"] and not counters["recompiles"]


@pytest.mark.parametrize("when", [Interval(3, warmup=3), InputChange(0.3, (1.0, 0.0))], ids=type)
def test_what_enters_the_first_block(when):
    fresh()

    def make(shape: str) -> Any:
        torch.manual_seed(0)
        return TabledModel().eval()

    recipe = Recipe(when, Guided(guide="modulated"))
    given = {"make": make, "adapter": ADAPTERS["tabled"]}
    driven = partial(fastcache.compile, backend="aot_eager", dynamic=False)
    check(recipe, mixed(recipe, driven=driven, **given), **given)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("taylor", {"cache_dtype": torch.bfloat16}), ("balanced", {})],
    ids=str,
)
def test_by_inductor_and_with_other_storage(recipe, options):
    fresh()
    driven = partial(fastcache.compile, dynamic=False)
    recipe = ALL[recipe]
    found = mixed(recipe, driven=driven, **options)
    check(recipe, found, near=0.05 if "cache_dtype" in options else 1e-5, **options)


def test_requests_with_recipes_of_their_own_in_one_batch():
    fresh()
    names = ["reuse", "taylor", "first_block", "taylor", "off", "first_block"]
    target, graphs = toys.model(), Sizes()
    with fastcache.enable(target, "off") as cache, torch.no_grad():
        call = fastcache.compile(target, backend=graphs, dynamic=False)
        outputs = mixed_runs(cache, call, [ALL[name] for name in names])
    for r, name in enumerate(names):
        want, _ = alone(ALL[name], r)
        torch.testing.assert_close(outputs[r], want, rtol=0, atol=1e-6)
    assert 2 in graphs.samples


def test_captured_graphs_hold_one_state_so_samples_go_alone(monkeypatch):
    fresh()
    graphs = Sizes()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(
        compiled, "captured_options", lambda model, choice, options: {**options, "backend": graphs}
    )
    driven = partial(fastcache.compile, cudagraphs=True)
    check(RECIPES["taylor"], mixed(RECIPES["taylor"], driven=driven))
    assert set(graphs.samples) == {1}


def test_a_cache_that_is_updated_or_disabled():
    fresh()
    target, calls = toys.model(), joined([(0, 0), (1, 0)], False)
    cache = fastcache.enable(target, "off")
    call = fastcache.compile(target, backend="eager")
    with torch.no_grad():
        cache.update(RECIPES["taylor"])
        for step in range(5):
            contexts = [cache.context("cond", request=r, step_index=step) for r in range(2)]
            fastcache.mixed_batch(call, contexts, joined([(0, step), (1, step)], False))
        assert "." in toys.actions(cache)
        cache.disable()
        with pytest.raises(ValueError, match="model is not enabled"):
            fastcache.mixed_batch(call, contexts, calls)
