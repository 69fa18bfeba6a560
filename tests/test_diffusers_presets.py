"""Presets: every row has a source, builds, and hooks the model it is for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

import tiny

import fastcache
from fastcache.presets import preset, presets

MODELS = {
    "flux": "Flux",
    "hunyuanvideo": "HunyuanVideo",
    "wan": "Wan3D",
    "latte": "Latte",
    "cogvideox": "CogVideoX",
}


@pytest.mark.parametrize("name", presets())
def test_a_preset_names_its_source_and_skips_on_its_model(name):
    row = presets()[name]
    assert len(row["source"]) > 20 and row["steps"] > 1
    model, inputs = tiny.build(MODELS[name.split("/")[0]])
    timed = hasattr(fastcache.configs.CONFIGS[row["config"]], "current_timestep_callback")
    config = preset(name, **({"current_timestep_callback": lambda: 500} if timed else {}))
    guided = row["config"] == "FasterCacheConfig"
    if guided:
        inputs = {
            k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
        }
    with fastcache.enable(model, config) as cache:
        hooked = cache.hooked()
        for i in range(12):  # a still trajectory: whatever may be reused is
            with cache.context("cond_uncond" if guided else "cond", step_index=i):
                tiny.output(model, inputs)
        assert cache.stats.reused and any(hooked.values())


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'sdxl'.*flux.*cogvideox/pab"):
        preset("sdxl")
    assert preset("flux", threshold=0.1).threshold == 0.1
