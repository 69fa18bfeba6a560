# SPDX-License-Identifier: Apache-2.0
"""Every tiny model under every method that people know by name, inside fastcache.compile.

A cell runs a trajectory twice, eagerly and compiled: as many graphs as the method has programs, none later, no
recompiles, and the outputs of the eager run. `PYTHONPATH=tests:tests/parity python tests/graphs/test_compiled_matrix.py
[name ...] [--method ...]` prints the table, which takes an hour; the tests below hold what is special in it.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves, tree_map_only

pytest.importorskip("diffusers")

import test_matrix as matrix
from test_compile import Graphs

import fastcache
from fastcache import (
    DMD,
    Chebyshev,
    FirstBlock,
    Hermite,
    Mask,
    Recipe,
    Taylor,
    Widening,
)

STEPS = 7
PLAN = (1, 1, 0, 1, 0, 1, 0)
# what a method is, and its programs: what decides inside the model has its first part, and what follows either way
METHODS: dict[str, tuple[Callable[[], Any], int]] = {
    "DBCache": (
        lambda: fastcache.DBCacheConfig(
            1, 1, 0.05, max_warmup_steps=2, max_continuous_cached_steps=2
        ),
        3,
    ),
    "FirstBlock": (lambda: Recipe(FirstBlock(0.05, warmup=2, max_skips=2)), 3),
    "TeaCache": (lambda: fastcache.TeaCacheConfig(0.05, (1, 0)), 3),
    "EasyCache": (lambda: fastcache.EasyCacheConfig(0.05, warmup=2), 1),
    "SeaCache": (
        lambda: fastcache.SeaCacheConfig(0.05, raw_vision_callback=matrix.latents_of),
        2,
    ),
    "SenCache": (lambda: fastcache.SenCacheConfig(1.0, 1.0, 0), 2),
    "Spectrum": (lambda: Recipe(Widening(warmup=2), Chebyshev(1, ridge=0.0)), 2),
    "Hermite": (lambda: Recipe(Mask(PLAN), Hermite(1)), 2),
    "DMD": (lambda: Recipe(Mask((1, 1, 1, 1, 0, 1, 0)), DMD()), 2),
    "planned": (lambda: Recipe(Mask((1, 1, 0, 0, 1, 0, 0)), Taylor(1)), 2),
}
# Models that `torch.compile(model, fullgraph=True)` refuses without any cache, and why: what they do with a value
# of a tensor on the host. What eager calls refuse stands in test_matrix.REFUSED.
UNTRACED = {
    "HiDream": "counts the tokens of each expert on the host",
    "HunyuanVideo15": "asks whether an image was given by its values",
    "Lumina2": "compares the lengths of its prompts",
    "OmniGen": "compares its largest position with a limit",
    "QwenImage21": "makes a list of which tokens are of pictures",
}


def trajectory(model: nn.Module, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Calls whose latents grow a little each step, and much at one of them."""
    if "return_dict" in inspect.signature(model.forward).parameters:
        inputs = {**inputs, "return_dict": False}
    calls = []
    for i in range(STEPS):
        grown = 1 + 0.01 * i + 0.3 * (i >= 4)

        def grow(value: Tensor, grown: float = grown) -> Tensor:
            return value * grown if value.is_floating_point() else value

        moved = {
            k: tree_map_only(Tensor, grow, v) for k, v in inputs.items() if k in matrix.LATENTS
        }
        calls.append({**inputs, **moved})
    return calls


def drive(cache: Any, run: Callable, calls: list[dict[str, Any]]) -> tuple[list[list[Tensor]], str]:
    """All tensors of all outputs of two runs, and the actions."""
    outputs = []
    for _ in range(2):
        for i, call in enumerate(calls):
            told = {"step_index": i, "num_inference_steps": STEPS, "timestep": 500.0 - i}
            with cache.context("cond", sigma=0.5, **told), torch.no_grad():
                leaves = tree_leaves(run(**call))
            outputs.append([t.clone() for t in leaves if isinstance(t, Tensor)])
        cache.reset()
    return outputs, "".join("C" if r.action == "compute" else "." for r in cache.stats)


def cell(name: str, method: str) -> str:
    """Graphs of a cell, or what the model or the method refuses."""
    model, inputs = matrix.build(name)
    calls, (make, limit), graphs = trajectory(model, inputs), METHODS[method], Graphs()
    torch._dynamo.reset()
    counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with fastcache.enable(model, make()) as cache:
                wanted, actions = drive(cache, model, calls)
        except ValueError as error:
            return f"refused: {error}"
        try:
            with fastcache.enable(model, make()) as cache:
                found, marks = drive(cache, fastcache.compile(model, backend=graphs), calls)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError):
            return "untraced"
    assert marks == actions and {"C", "."} == set(marks)
    assert graphs.count == limit and not counters["recompiles"] and not counters["graph_break"]
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    return f"{graphs.count} graphs"


def traced_alone(name: str) -> bool:
    """Whether the model is one graph without a cache."""
    model, inputs = matrix.build(name)
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            compiled = torch.compile(model, backend=Graphs(), fullgraph=True)
            compiled(**trajectory(model, inputs)[0])
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError):
        return False
    return True


def test_a_third_stream_goes_through_the_parts_of_a_step() -> None:
    assert cell("LTX2", "DBCache") == "3 graphs"


def test_a_model_that_is_no_graph_by_itself_is_none_with_a_cache() -> None:
    assert UNTRACED.keys() <= set(matrix.NAMES)
    assert not traced_alone("Lumina2")
    assert cell("Lumina2", "DBCache") == "untraced"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="*", default=matrix.NAMES)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.name:
        for method in args.method:
            found = cell(name, method)
            refused = matrix.REFUSED.get(name, {}).get(method)
            if refused is not None:
                assert refused in found, found
            else:
                assert (found == "untraced") == (name in UNTRACED), found
            print(f"{name:22}{method:12}{found[:80]}", flush=True)


if __name__ == "__main__":
    main()
