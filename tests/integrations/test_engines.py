# SPDX-License-Identifier: Apache-2.0
"""What engines attach to, and what all integrations promise: no engine imported, clear errors, an entry point."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch
import toys

import fastcache
from fastcache import integrations
from fastcache.integrations import attached, sglang, vllm_omni
from fastcache.integrations.from_fields import config_of

STEPS = 10


def test_fields_of_engines_become_a_config():
    assert config_of({}) == "balanced" and config_of({"preset": "fast"}) == "fast"
    dual = config_of({"Fn_compute_blocks": 2, "enable_taylorseer": True, "taylorseer_order": 2})
    (rule,) = dual.rules
    assert (rule.where.first, rule.what, rule.when.threshold) == (2, fastcache.Taylor(2), 0.24)
    assert config_of({"enable_dmd": True, "dmd_history": 5}).rules[0].what.keep == 5
    with pytest.raises(ValueError, match="'thresh' is not known"):
        config_of({"thresh": 1})
    with pytest.raises(ValueError, match="preset stands for all"):
        config_of({"preset": "fast", "Fn_compute_blocks": 2})


def test_what_engines_attach_to():
    model, calls = toys.model(), toys.inputs(STEPS)
    with pytest.raises(ValueError, match="denoisers"):
        attached.Attached([], "balanced")
    engine = attached.Attached([model, toys.model(seed=1)], fastcache.FirstBlockCacheConfig(0.9))
    with torch.no_grad(), engine.run(STEPS):
        for i, call in enumerate(calls):
            for branch in ("cond", "uncond"):
                with engine.call(branch, step_index=i):
                    toys.step(model, call)
    assert engine.statistics()["reused"] == 2 * (STEPS - 1)
    engine.close()
    engine.close()


@pytest.mark.parametrize(
    "register, package", [(vllm_omni.register, "vllm-omni"), (sglang.register, "sglang")]
)
def test_a_missing_engine_is_said(register, package):
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ImportError, match=f"{package} is not installed.*install {package}"):
        register()


def test_the_entry_point_is_found_after_an_install():
    (found,) = (
        point
        for point in metadata.entry_points(group="vllm_omni.general_plugins")
        if point.name == "fastcache"
    )
    assert found.load() is vllm_omni.register


def test_importing_integrations_imports_no_engine():
    names = {module.name for module in pkgutil.iter_modules(integrations.__path__)} - {"diffusers"}
    assert {"cache_dit", "sglang", "vllm_omni"} <= names
    code = (
        "import sys, importlib, fastcache\n"
        f"for name in {names}: importlib.import_module('fastcache.integrations.' + name)\n"
        "engines = {'cache_dit', 'comfy', 'diffusers', 'sglang', 'tensorrt_llm', 'vllm_omni', 'xfuser'}\n"
        "assert not engines & set(sys.modules), engines & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
