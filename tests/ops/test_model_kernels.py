# SPDX-License-Identifier: Apache-2.0
"""Whole models on kernels: nothing falls back unseen, and Triton's interpreter gives what the reference gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import interpreted
import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

import test_matrix  # noqa: E402
import tiny  # noqa: E402

import fastcache  # noqa: E402
from fastcache import FirstBlock, Guided, Interval, Recipe, Reuse, Taylor  # noqa: E402
from fastcache.ops import dispatch  # noqa: E402

E4M3 = torch.float8_e4m3fn
DTYPES = {"as they are": None, "bfloat16": torch.bfloat16, "float8": E4M3}


class Calls:
    """What `dispatch.resolve` has decided: ops that ran on the reference, and ops that copied an input."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()
        self.reference: set[str] = set()
        self.copied: set[str] = set()

    def note(self, op: str, tensors: list[Tensor], run: Callable, views: list[Tensor]) -> None:
        if run is dispatch.function("reference", op):
            self.reference.add(op)
            return
        self.kernels.add(op)
        if any(v.data_ptr() != t.data_ptr() for v, t in zip(views, tensors, strict=True)):
            self.copied.add(op)


@contextmanager
def recorded() -> Iterator[Calls]:
    calls, resolve = Calls(), dispatch.resolve

    def noting(op: str, tensors: list[Tensor], *more: Any) -> Any:
        run, views = resolve(op, tensors, *more)
        calls.note(op, tensors, run, views)
        return run, views

    dispatch.resolve = noting  # type: ignore[assignment]
    try:
        yield calls
    finally:
        dispatch.resolve = resolve


# --- no op falls back unseen ---------------------------------------------------------------------------------


METHODS: dict[str, Callable[[], Any]] = {
    "FirstBlock": test_matrix.METHODS["FirstBlock"],
    "MagCache": test_matrix.METHODS["MagCache"],
    "TaylorSeer": lambda: fastcache.TaylorSeerCacheConfig(
        disable_cache_before_step=2, cache_interval=3
    ),
    "FasterCache": test_matrix.METHODS["FasterCache"],
    "Taylor": lambda: Recipe(Interval(3, warmup=1), Taylor(2)),
    "Guided": lambda: Recipe(Interval(3, warmup=3), Guided(2)),
}
# Ops that run on the reference on some model, and why: none does.
REFERENCE: dict[tuple[str, str], str] = {}
# Models on which an op copies an input first, because two of its inputs lie in different orders, and why.
JOINED = (
    "the patch embedding leaves x transposed, and the last block returns a range of text and image"
)
BLOCK = "the patch embedding leaves x transposed, and a block's first projection makes y contiguous"
SKIPS = "the patch embedding leaves x transposed, and the last blocks join it with an earlier one"
FRAMES = "blocks over frames see the batch of others from the side"
STORE, BOTH = {"residual_store"}, {"residual_store", "residual_l1"}
COPIED: dict[str, tuple[set[str], str]] = {
    **dict.fromkeys(("HunyuanVideo", "HunyuanImage", "MotifVideo"), (STORE, JOINED)),
    **dict.fromkeys(
        ("Latte", "PixArt2D", "DiT2D", "DreamLite2D", "Sana", "SanaVideo", "Transformer2D"),
        (BOTH, BLOCK),
    ),
    "HunyuanDiT": (STORE, SKIPS),
    "LatteVideo": ({*BOTH, "linear_combine"}, FRAMES),
}
NATIVE = pytest.mark.skipif(
    dispatch.status("cpp") is not True, reason="without kernels all is on the reference"
)
IN_PARENT = pytest.mark.skipif(interpreted.INTERPRETS, reason="the parent process has done it")


@NATIVE
@IN_PARENT
@pytest.mark.parametrize("name", test_matrix.NAMES)
def test_every_op_of_every_method_runs_on_a_kernel(name: str) -> None:
    if not hasattr(diffusers, test_matrix.entry(name)["class"]):
        pytest.skip(f"diffusers {diffusers.__version__} has no {test_matrix.entry(name)['class']}")
    model, inputs = test_matrix.build(name)
    reference, copied, reused = set(), set(), 0
    for method, make in METHODS.items():
        with recorded() as calls, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a run of six steps without a hit
            try:
                with fastcache.enable(model, make()) as cache:
                    test_matrix.run(model, inputs, cache)
                    reused += cache.stats.reused
            except ValueError as error:
                assert test_matrix.COLLECTED in str(error) and name in test_matrix.REFUSED
                continue
        assert calls.kernels or method == "FasterCache"
        reference |= {(name, op) for op in calls.reference}
        copied |= calls.copied
    assert reused > 4
    assert reference == {pair for pair in REFERENCE if pair[0] == name}
    assert copied == COPIED.get(name, (set(), ""))[0]


@NATIVE
@IN_PARENT
@pytest.mark.parametrize("method", METHODS)
def test_a_backend_that_was_asked_for_runs_all_of_a_call(method: str) -> None:
    """Also what a recording call stores at its end."""
    model, inputs = tiny.build("Flux")
    with recorded() as calls, fastcache.enable(model, METHODS[method](), backend="reference") as c:
        test_matrix.run(model, inputs, c)
    assert calls.reference and not calls.kernels


# --- what the kernels give ----------------------------------------------------------------------------------


# the threshold is out of reach: rounding decides nothing
RECIPES = {
    "reuse": Recipe(FirstBlock(1e9, max_skips=2), Reuse()),
    "forecast": Recipe(Interval(2, warmup=2, last=False), Taylor(1)),
}
STEPS = 6
# Of the output, relative: the interpreter truncates where a kernel rounds to bfloat16.
ERROR = {None: 1e-5, torch.bfloat16: 1e-2, E4M3: 1e-5}


@pytest.mark.slow
@interpreted.starts_interpreter
def test_in_tritons_interpreter() -> None:
    interpreted.run_interpreted(__file__)


def outputs(
    name: str, model: Any, inputs: Any, recipe: str, kept: Any, backend: str
) -> list[Tensor]:
    found = []
    with fastcache.enable(model, RECIPES[recipe], cache_dtype=kept, backend=backend) as cache:
        for i, step in enumerate(tiny.trajectory(name, inputs, STEPS)):
            with cache.context("cond", step_index=i):
                found.append(tiny.output(model, step).clone())
        assert cache.stats.reused >= 2 and not cache.stats.fallbacks
    return found


@interpreted.in_interpreter
@pytest.mark.parametrize("name", tiny.ENTRIES)
def test_the_outputs_of_a_model_are_those_of_the_reference(name: str) -> None:
    model, inputs = tiny.build(name)
    for kept in DTYPES.values():
        for recipe in RECIPES:
            want = outputs(name, model, inputs, recipe, kept, "reference")
            with recorded() as calls:
                got = outputs(name, model, inputs, recipe, kept, "triton")
            assert calls.kernels and not calls.reference
            for i, (a, b) in enumerate(zip(got, want, strict=True)):
                error = ((a - b).norm() / b.norm()).item()
                assert error <= ERROR[kept], f"{recipe}, {kept}: step {i} is off by {error:.1e}"
