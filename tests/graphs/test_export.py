# SPDX-License-Identifier: Apache-2.0
"""torch.export of a cached model: variants that share storage of the caller's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from test_compile import PlainModel
from torch import Tensor

import fastcache

STEPS = 8
METHODS: dict[str, Callable[[], Any]] = {
    "mag": lambda: fastcache.MagCacheConfig(
        mag_ratios=torch.ones(STEPS), num_inference_steps=STEPS, retention_ratio=0.1
    ),
    "interval_taylor2": lambda: fastcache.Recipe(fastcache.Interval(3), fastcache.Taylor(2)),
    "taylorseer": lambda: fastcache.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    ),
}


def follow(exported: Any, programs: dict[str, Callable], calls: list[dict]) -> list[Tensor]:
    """One run under a host schedule, in storage of its own."""
    own = exported.fresh()
    addresses = {name: t.data_ptr() for name, t in own.items()}
    outputs = []
    for call, (action, facts) in zip(calls, exported.plan(len(calls)), strict=True):
        for name, value in facts.items():
            own[name].copy_(value)
        with torch.no_grad():
            outputs.append(programs[action](own, **call))
    assert {name: t.data_ptr() for name, t in own.items()} == addresses
    return [o if isinstance(o, Tensor) else o[0] for o in outputs]


@pytest.mark.parametrize("method", METHODS)
def test_exported_variants_repeat_the_run_in_eager(method: str) -> None:
    model, inputs = tiny.build("Wan3D")
    calls = [{**c, "return_dict": False} for c in tiny.trajectory("Wan3D", inputs, STEPS)]
    with fastcache.enable(model, METHODS[method]()) as cache:
        exported = fastcache.export_variants(model, (), calls[0])
        assert not len(cache.stats), "exporting is no run"
        with cache.context(num_inference_steps=STEPS), torch.no_grad():
            expected = [model(**call)[0].clone() for call in calls]
        decided = [r.action for r in cache.stats]
    assert [action for action, _ in exported.plan(STEPS)] == decided
    assert {"compute", "reuse"} == set(decided)
    computed, reused = (len(exported[a].graph.nodes) for a in ("compute", "reuse"))
    assert reused < computed
    programs = {name: program.module() for name, program in exported.variants.items()}
    for _ in range(2):
        for got, want in zip(follow(exported, programs, calls), expected, strict=True):
            assert torch.allclose(got, want, atol=1e-5)


def test_a_run_goes_on_undisturbed_after_an_export() -> None:
    model, inputs = tiny.build("Wan3D")
    calls = [{**c, "return_dict": False} for c in tiny.trajectory("Wan3D", inputs, STEPS)]
    outputs = []
    for interrupted in (False, True):
        with fastcache.enable(model, METHODS["interval_taylor2"]()), torch.no_grad():
            for i, call in enumerate(calls):
                if interrupted and i == 5:
                    fastcache.export_variants(model, (), call)
                outputs.append(model(**call)[0].clone())
    for before, after in zip(outputs[:STEPS], outputs[STEPS:], strict=True):
        assert torch.equal(before, after)


def test_what_cannot_be_exported_is_refused() -> None:
    model, inputs = tiny.build("Wan3D")
    with pytest.raises(ValueError, match="not enabled"):
        fastcache.export_variants(model, (), inputs)
    with (
        fastcache.enable(model, fastcache.FirstBlockCacheConfig(0.3)),
        pytest.raises(ValueError, match="decides from values inside"),
    ):
        fastcache.export_variants(model, (), inputs)


@pytest.mark.slow
def test_aot_inductor_packages_share_one_cache(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = PlainModel().eval().requires_grad_(False)
    start, drift = torch.randn(1, 8, 16), torch.randn(1, 8, 16)
    calls = [{"hidden_states": start + 0.02 * i * drift} for i in range(STEPS)]
    with fastcache.enable(model, METHODS["interval_taylor2"]()) as cache, torch.no_grad():
        exported = fastcache.export_variants(model, (), calls[0])
        with cache.context(num_inference_steps=STEPS):
            expected = [model(**call).clone() for call in calls]
    packages = {}
    for name, program in exported.variants.items():
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / f"{name}.pt2")
        )
        packages[name] = torch._inductor.aoti_load_package(path)
    for got, want in zip(follow(exported, packages, calls), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-5)
