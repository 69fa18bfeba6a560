# SPDX-License-Identifier: Apache-2.0
"""SGLang's calls of cache-dit on fastcache; by stubs of what it publishes (0.5.23)."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

import pytest
import torch
import toys

from fastcache.integrations import sglang

STEPS = 10


def module(name: str, monkeypatch, **content) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@dataclass
class CacheDitConfig:
    """Fields of SGLang's config that matter here."""

    enabled: bool = True
    Fn_compute_blocks: int = 1
    Bn_compute_blocks: int = 0
    max_warmup_steps: int = 2
    residual_diff_threshold: float = 0.9
    max_continuous_cached_steps: int = -1
    enable_taylorseer: bool = False
    taylorseer_order: int = 1
    enable_dmd: bool = False
    num_inference_steps: int | None = STEPS
    steps_computation_mask: list[int] | None = None
    steps_computation_policy: str = "dynamic"


@pytest.fixture
def sgl(monkeypatch):
    """SGLang's cache-dit functions, and a stage that has imported them by name."""
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.5.23" if name == "sglang" else version(name)
    )
    parts = sglang.HOME.split(".")
    for i in range(1, len(parts)):
        module(".".join(parts[:i]), monkeypatch, __path__=[])
    functions = {name: (lambda *args, **kwargs: None) for name in sglang.OURS}
    home = module(sglang.HOME, monkeypatch, **functions)
    stage = module("sglang.multimodal_gen.stages", monkeypatch, **functions)
    importlib.reload(sglang)  # as SGLang imports it
    yield stage
    sglang.unregister()
    assert vars(home)["enable_cache_on_transformer"] is functions["enable_cache_on_transformer"]


def test_sglang_mounts_refreshes_and_unmounts(sgl):
    model, calls = toys.model(), toys.inputs(STEPS)
    before = toys.snapshot(model)

    def request():
        with torch.no_grad():
            return torch.stack([toys.step(model, call).clone() for call in calls])

    expected = request()
    assert sgl.enable_cache_on_transformer(model, CacheDitConfig(enabled=False)) is model
    assert sgl.enable_cache_on_transformer(model, CacheDitConfig(), "transformer") is model
    first = request()
    sgl.refresh_context_on_transformer(model, STEPS)
    assert torch.equal(first, request()) and not torch.equal(first, expected)
    attached, _ = sglang.kept(model)
    assert attached.statistics()["reused"] == 2 * (STEPS - 2)
    mask = [1, 1, 0, 0, 1, 0, 0, 1, 0, 0]
    sgl.refresh_context_on_transformer(
        model, STEPS, steps_computation_mask=mask, steps_computation_policy="static"
    )
    request()
    last = [r.action for r in list(attached.cache.stats)[-STEPS:]]
    assert last == ["compute" if m else "reuse" for m in mask]
    sgl.disable_cache_on_transformer(model)
    sgl.disable_cache_on_transformer(model)
    assert toys.snapshot(model) == before and torch.equal(request(), expected)
    with pytest.raises(ValueError, match="no cache is enabled"):
        sgl.refresh_context_on_transformer(model, STEPS)


def test_sglang_with_two_transformers(sgl):
    pair = toys.model(), toys.model(seed=1)
    configs = CacheDitConfig(num_inference_steps=6), CacheDitConfig(num_inference_steps=4)
    calls = toys.inputs(STEPS)
    assert sgl.enable_cache_on_dual_transformer(*pair, *configs, sp_group=None) == pair
    with torch.no_grad():
        for i, call in enumerate(calls):
            toys.step(pair[i >= 6], call)
    assert [sglang.kept(m)[0].statistics()["reused"] for m in pair] == [4, 2]
    sgl.refresh_context_on_dual_transformer(*pair, 6, 4)
    for model in pair:
        sgl.disable_cache_on_transformer(model)


def test_another_version_of_sglang_is_said(sgl, monkeypatch):
    sglang.unregister()
    monkeypatch.setattr(metadata, "version", lambda name: "0.7.0")
    with pytest.raises(ImportError, match=r"sglang is 0\.7\.0, .* 0\.5\.\*"):
        sglang.register()
