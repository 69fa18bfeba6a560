# SPDX-License-Identifier: Apache-2.0
"""The code that Inductor generates: the history store rides on the kernel that makes the value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from test_compile import PlainModel
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fastcache
from fastcache.storage import unit
from fastcache.storage.ring import Ring

STEPS = 12
CALL = re.compile(
    r"^ +(?:\w+ = )?(cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.fastcache\.\w+)", re.M
)
METHODS: dict[str, Callable[[], Any]] = {
    "magnitude_reuse": lambda: fastcache.MagCacheConfig(
        mag_ratios=torch.ones(STEPS), num_inference_steps=STEPS, retention_ratio=0.1
    ),
    "interval_taylor2": lambda: fastcache.Recipe(fastcache.Interval(3), fastcache.Taylor(2)),
    "taylorseer": lambda: fastcache.TaylorSeerCacheConfig(cache_interval=3),
}


class Projected(nn.Module):
    """A stack between two projections, so that nothing the cache touches is a graph input or output."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.project = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = PlainModel(width, 3).blocks

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = torch.relu(self.embed(hidden_states))
        for block in self.blocks:
            x = block(x)
        return self.project(torch.sigmoid(x))


def build() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Projected().eval().requires_grad_(False), torch.randn(1, 8, 16)


def launches(code: list[str]) -> list[str]:
    """Names of the kernels that generated code calls, in order."""
    return [name for source in code for name in CALL.findall(source)]


def buffers(code: list[str]) -> int:
    return sum(source.count("= empty_strided") for source in code)


def generated(method: str) -> dict[str, list[str]]:
    """The code of the computed and of the reused step."""
    dynamo.reset()
    model, x = build()
    found: dict[str, list[str]] = {}
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        fastcache.enable(model, METHODS[method]()) as cache,
    ):
        compiled = fastcache.compile(model)

        def step() -> Tensor:
            with cache.context("cond"), torch.no_grad():
                return compiled(x)

        for _ in range(STEPS):
            _, code = run_and_get_code(step)
            if code:
                found.setdefault(cache.stats[-1].action, code)
            if len(found) == 2:
                return found
    raise AssertionError(f"{method}: only {list(found)} was compiled")


@pytest.fixture(scope="module")
def uncached() -> list[str]:
    dynamo.reset()
    model, x = build()
    with torch._inductor.config.patch(fx_graph_cache=False), torch.no_grad():
        return run_and_get_code(torch.compile(model, fullgraph=True), x)[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_store_is_fused_and_nothing_is_cloned_or_copied_back(
    method: str, uncached: list[str]
) -> None:
    code = generated(method)
    computed, reused = launches(code["compute"]), launches(code["reuse"])
    for name in (*computed, *reused):
        assert "clone" not in name
        assert not re.fullmatch(r"cpp_fused_(copy_?|index_copy)_*\d*", name), "a copy of its own"
    assert len(computed) == len(launches(uncached)), "a computed step has the uncached kernels"
    # the stack's input lives until its residual is taken, where it would be overwritten otherwise
    held = 0 if method == "taylorseer" else 2
    assert buffers(code["compute"]) <= buffers(uncached) + held
    # what is stored is a difference, and nothing else here is
    assert sum("_sub_" in name for name in computed) == (3 if method == "taylorseer" else 1)
    if method != "taylorseer":  # which skips attention only: here each block's one layer
        assert [n for n in reused if n.startswith("extern")] == ["extern_kernels.addmm"] * 2
    assert sum(n.startswith("cpp") for n in reused) <= 2, (
        "input of the stack, prediction and its reader"
    )


class OpRing(Ring):
    """A ring that calls our ops in compiled code, as it does in eager."""

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        torch.ops.fastcache.residual_store_.default(self.buffer[0], y, x)

    def predict(self, base: Tensor | None, weights: Any) -> Tensor:
        out = torch.empty_like(base)
        torch.ops.fastcache.residual_apply_.default(out, base, self.buffer[0])
        return out


def test_aten_makes_fewer_kernels_than_our_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why traced code does not call them: an opaque op is a launch of its own and splits its neighbours."""
    aten = generated("magnitude_reuse")
    monkeypatch.setattr(unit, "Ring", OpRing)
    ops = generated("magnitude_reuse")
    assert any("residual_store_" in name for name in launches(ops["compute"]))
    counts = {a: (len(launches(aten[a])), len(launches(ops[a]))) for a in aten}
    assert all(few < many for few, many in counts.values())
