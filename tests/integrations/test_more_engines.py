# SPDX-License-Identifier: Apache-2.0
"""xDiT 0.7.0 and TensorRT-LLM, by stubs of what they publish."""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch
import toys
from torch import nn

import fastcache
from fastcache.integrations import xdit
from fastcache.integrations.tensorrt_llm import FastcacheAccelerator

STEPS = 10
FIELDS = {"residual_diff_threshold": 0.9, "max_warmup_steps": 2, "max_continuous_cached_steps": -1}


def generate(model):
    with torch.no_grad():
        return torch.stack([toys.step(model, call).clone() for call in toys.inputs(STEPS)])


@pytest.fixture
def runner(monkeypatch):
    """xDiT's adapters, and a runner that has imported `apply_cache` by name."""

    def apply_cache(cache_method, num_steps, pipe, *rest):
        return cache_method, num_steps, pipe, *rest

    parts = xdit.HOME.split(".")
    for i in range(1, len(parts)):
        package = ModuleType(".".join(parts[:i]))
        package.__path__ = []
        monkeypatch.setitem(sys.modules, package.__name__, package)
    for name in (xdit.HOME, "xfuser.runner"):
        module = ModuleType(name)
        module.apply_cache = apply_cache
        monkeypatch.setitem(sys.modules, name, module)
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.7.0" if name == "xfuser" else version(name)
    )
    xdit.register()
    xdit.register()
    yield sys.modules["xfuser.runner"]
    xdit.unregister()
    assert sys.modules["xfuser.runner"].apply_cache is apply_cache


def test_xdit_takes_one_more_method_and_leaves_the_others(runner):
    model = toys.model()
    before, expected = toys.snapshot(model), generate(model)
    pipe = SimpleNamespace(transformer=model)
    assert runner.apply_cache("dbcache", 4, pipe)[:3] == ("dbcache", 4, pipe)
    assert runner.apply_cache("fastcache", STEPS, pipe, preset_kwargs=FIELDS) is model
    first, second = generate(model), generate(model)
    assert torch.equal(first, second) and not torch.equal(first, expected)
    assert vars(model)[xdit.ATTACHED].statistics()["reused"] == 2 * (STEPS - 2)
    xdit.remove(model)
    xdit.remove(model)
    assert toys.snapshot(model) == before and torch.equal(generate(model), expected)


def test_xdit_with_json_wrappers_and_several_transformers(runner):
    inner, other = toys.model(), toys.model(seed=1)
    wrapped = nn.Module()
    wrapped._fsdp_wrapped_module = inner
    found = runner.apply_cache(
        "fastcache", STEPS, None, transformer=wrapped, cache_config='{"preset": "fast"}'
    )
    assert found is wrapped and vars(inner)[xdit.ATTACHED].cache.enabled
    pipe = SimpleNamespace(transformer=toys.model(), transformer_2=other)
    several = [SimpleNamespace(transformer_attr=name) for name in ("transformer", "transformer_2")]
    assert runner.apply_cache("fastcache", STEPS, pipe, adapter_config=several) is None
    for module in (wrapped, pipe.transformer, other):
        assert hasattr(getattr(module, "_fsdp_wrapped_module", module), xdit.ATTACHED)
        xdit.remove(module)


def test_xdit_missing_or_of_another_version_is_said(runner, monkeypatch):
    xdit.unregister()
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    with pytest.raises(ImportError, match=r"xfuser is 1\.0"):
        xdit.register()
    monkeypatch.setitem(sys.modules, "xfuser", None)
    monkeypatch.setitem(sys.modules, xdit.HOME, None)
    with pytest.raises(ImportError, match="xfuser is not installed"):
        xdit.register()


def test_tensorrt_llms_accelerator():
    model = toys.model()
    before, expected = toys.snapshot(model), generate(model)
    accelerator = FastcacheAccelerator(fastcache.FirstBlockCacheConfig(0.9))
    assert not accelerator.is_enabled() and accelerator.get_stats() == {}
    with pytest.raises(ValueError, match="not wrapped"):
        accelerator.refresh(STEPS)
    accelerator.wrap(model)
    with pytest.raises(ValueError, match="wrapped already"):
        accelerator.wrap(model)
    outputs = []
    for _ in range(2):
        accelerator.refresh(STEPS)
        outputs.append(generate(model))
    assert torch.equal(*outputs) and accelerator.is_enabled()
    assert accelerator.get_stats()["reused"] == 2 * (STEPS - 1)
    assert {r.step for r in accelerator.attached.cache.stats} == set(range(STEPS))
    accelerator.unwrap()
    accelerator.unwrap()
    assert toys.snapshot(model) == before and torch.equal(generate(model), expected)
