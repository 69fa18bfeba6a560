# SPDX-License-Identifier: Apache-2.0
"""vLLM-Omni loads fastcache as a plugin; by stubs of what it publishes (0.30)."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest
import torch
import toys
from torch import nn

import fastcache
from fastcache.integrations import vllm_omni

STEPS = 10
EAGER = {"residual_diff_threshold": 0.9, "max_warmup_steps": 2, "max_continuous_cached_steps": -1}


def module(name: str, monkeypatch, **content) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.fixture
def omni(monkeypatch):
    """The modules of vLLM-Omni that matter here, with the runner that has imported the selector by name."""

    class CacheBackend(ABC):
        @abstractmethod
        def enable(self, pipeline): ...

        @abstractmethod
        def refresh(self, pipeline, num_inference_steps, verbose=True): ...

    def get_cache_backend(cache_backend, cache_config):
        if cache_backend in (None, "none"):
            return None
        raise ValueError(f"Unsupported cache backend: {cache_backend}")

    for name in ("vllm_omni", "vllm_omni.diffusion", "vllm_omni.diffusion.cache"):
        module(name, monkeypatch, __path__=[])
    module("vllm_omni.diffusion.cache.base", monkeypatch, CacheBackend=CacheBackend)
    select = {"get_cache_backend": get_cache_backend}
    module(vllm_omni.SELECTOR, monkeypatch, **select)
    runner = module("vllm_omni.diffusion.runner", monkeypatch, **select)
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.30.0" if name == "vllm-omni" else version(name)
    )
    vllm_omni.register()
    yield SimpleNamespace(runner=runner, base=CacheBackend, original=get_cache_backend)
    vllm_omni.unregister()


class Pipeline(nn.Module):
    """A pipeline as vLLM-Omni has them: a module whose `forward` is a whole generation."""

    _dit_modules = ("transformer",)

    def __init__(self, model):
        super().__init__()
        self.transformer = model

    def forward(self, calls):
        return torch.stack([toys.step(self.transformer, call) for call in calls])


def pipeline():
    return Pipeline(toys.model()), toys.inputs(STEPS)


def generate(pipe, calls, mode=torch.inference_mode):
    with mode():
        return pipe.forward(calls).clone()


def test_a_runner_that_has_imported_the_selector_gets_the_backend_too(omni):
    backend = omni.runner.get_cache_backend("fastcache", dict(EAGER))
    assert isinstance(backend, omni.base) and not backend.is_enabled()
    assert omni.runner.get_cache_backend("none", {}) is None
    with pytest.raises(ValueError, match="Unsupported"):
        omni.runner.get_cache_backend("other", {})
    vllm_omni.unregister()
    assert omni.runner.get_cache_backend is omni.original


@pytest.mark.parametrize("compiled", ["", "forward", "compile", "wrapped"])
def test_blocks_that_are_compiled_already_are_attached_to(omni, compiled):
    """Regional compilation comes first there, and calls run under inference_mode."""
    pipe, calls = pipeline()
    expected = generate(pipe, calls)
    blocks = pipe.transformer.blocks
    for i, block in enumerate(blocks):
        if compiled == "forward":  # as vLLM-Omni does it
            block.forward = torch.compile(block.forward, backend="eager")
        elif compiled == "compile":
            block.compile(backend="eager")
        elif compiled:
            blocks[i] = torch.compile(block, backend="eager")
    assert torch.allclose(generate(pipe, calls), expected, atol=1e-6)
    before = dict(vars(pipe)), type(blocks), dict(vars(pipe.transformer))
    never = omni.runner.get_cache_backend("fastcache", {"residual_diff_threshold": 0.0})
    never.enable(pipe)
    never.refresh(pipe, STEPS)
    assert torch.allclose(generate(pipe, calls), expected, atol=1e-6)
    never.disable()
    backend = omni.runner.get_cache_backend("fastcache", dict(EAGER))
    backend.enable(pipe)
    outputs = []
    for _ in range(2):  # the second request meets nothing of the first
        backend.refresh(pipe, STEPS)
        outputs.append(generate(pipe, calls))
    stats = backend.attached.statistics()
    assert torch.equal(*outputs) and not torch.equal(outputs[0], expected)
    assert stats["reused"] == 2 * (STEPS - 2) and stats["bytes"] > 0
    backend.disable()
    assert (dict(vars(pipe)), type(blocks), dict(vars(pipe.transformer))) == before
    torch._dynamo.reset()


def test_a_request_that_nobody_refreshes_begins_all_the_same(omni):
    pipe, calls = pipeline()
    backend = omni.runner.get_cache_backend("fastcache", dict(EAGER))
    backend.enable(pipe)
    first = generate(pipe, calls[:5])
    assert torch.equal(first, generate(pipe, calls[:5]))
    records = [r.step for r in backend.attached.cache.stats]
    assert records == 2 * list(range(5))
    with pytest.raises(RuntimeError, match="half way"):
        backend.attached.cache.models[0][1].register_forward_pre_hook(fail := failing())
        generate(pipe, calls[:5])
    fail.armed = False
    assert torch.equal(first, generate(pipe, calls[:5]))
    backend.disable()


def failing():
    def hook(*_):
        if hook.armed:
            raise RuntimeError("half way")

    hook.armed = True
    return hook


def test_a_mask_by_name_follows_the_steps_of_each_batch(omni):
    pipe, calls = pipeline()
    fields = {"scm_steps_mask_policy": "fast", "scm_steps_policy": "static"}
    backend = omni.runner.get_cache_backend("fastcache", fields)
    backend.enable(pipe)
    for steps in (8, 10, 10):
        backend.refresh(pipe, steps)
        generate(pipe, calls[:steps])
        actions = [r.action for r in list(backend.attached.cache.stats)[-steps:]]
        assert actions == ["compute" if m else "reuse" for m in fastcache.steps_mask("fast", steps)]
    backend.disable()


def test_slots_keep_requests_that_take_turns_apart(omni):
    pipe, calls = pipeline()
    backend = omni.runner.get_cache_backend("fastcache", dict(EAGER))
    backend.enable(pipe)
    others = [{k: v + 0.3 for k, v in call.items()} for call in calls]
    with torch.inference_mode():
        alone = []
        for given in (calls, others):
            with backend.attached.run(STEPS):
                alone.append([toys.step(pipe.transformer, call).clone() for call in given])
        driver = vllm_omni.SlotDriver(backend)
        slots = [driver.create_empty_slot() for _ in range(2)]
        for slot in slots:
            driver.initialize_fresh_slot(slot, STEPS)
            assert driver.is_slot_compatible(slot)
        for i in range(STEPS):
            for number, (slot, given) in enumerate(zip(slots, (calls, others), strict=True)):
                if number and i == 4:
                    driver.clear_slot(slot)  # it is given up half way, and another takes the slot
                    driver.initialize_fresh_slot(slot, STEPS)
                at = i - 4 if number and i >= 4 else i
                driver.install_slot(slot)
                found = toys.step(pipe.transformer, given[at]).clone()
                driver.deactivate_slot(slot)
                assert torch.equal(found, alone[number][at])
        assert driver.estimate_slot_bytes(slots[0]) > 0
        for slot in slots:
            driver.clear_slot(slot)
        assert driver.estimate_slot_bytes(slots[0]) == 0
    assert driver.backend_name == "fastcache"
    backend.disable()


def test_another_version_is_said_where_the_backend_is_asked_for(omni, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "9.1")
    assert omni.runner.get_cache_backend(None, {}) is None
    with pytest.raises(ImportError, match=r"vllm-omni is 9\.1"):
        omni.runner.get_cache_backend("fastcache", {})


def test_beside_an_engine_without_the_interface_the_plugin_only_warns(omni, monkeypatch):
    vllm_omni.unregister()
    monkeypatch.setitem(sys.modules, vllm_omni.SELECTOR, None)
    with pytest.warns(fastcache.FastcacheWarning, match="cannot select it"):
        vllm_omni.register()
    module(vllm_omni.SELECTOR, monkeypatch)
    with pytest.warns(fastcache.FastcacheWarning, match="get_cache_backend"):
        vllm_omni.register()
    assert omni.runner.get_cache_backend is omni.original


def test_of_the_engines_own_config_object_counts_what_was_set(omni):
    @dataclass
    class DiffusionCacheConfig:
        Fn_compute_blocks: int = 1
        residual_diff_threshold: float = 0.24
        rel_l1_thresh: float | None = None
        _extra_params: dict | None = None

    assert vllm_omni.fields_of(DiffusionCacheConfig()) == {}
    assert vllm_omni.fields_of(DiffusionCacheConfig(2, _extra_params={"preset": "fast"})) == {
        "Fn_compute_blocks": 2,
        "preset": "fast",
    }
    assert vllm_omni.fields_of('{"preset": "fast"}') == {"preset": "fast"}
    assert vllm_omni.fields_of(None) == {}


def test_a_pipeline_without_a_denoiser_is_refused_and_left_alone(omni):
    backend = omni.runner.get_cache_backend("fastcache", {})
    with pytest.raises(ValueError, match="no denoiser"):
        backend.enable(SimpleNamespace())
    assert not backend.is_enabled()
