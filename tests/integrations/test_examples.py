# SPDX-License-Identifier: Apache-2.0
"""Every example runs, and does what it says; that of the server is in test_serve.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="needs the source tree")


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_of_them_are_run():
    elsewhere = {"serve", "export_aoti"}  # the latter compiles for minutes
    run = {"diffusers_pipeline", "hand_loop", "from_cache_dit", "engine_template"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == elsewhere | run


def test_a_diffusers_pipeline_end_to_end(capsys):
    found = example("diffusers_pipeline").main(["--steps", "12"])
    assert found["reused"] and "s without a cache" in capsys.readouterr().out
    difference = abs(found["plain"] - found["cached"]).mean()
    assert 0 < difference < 0.2  # of values from 0 to 1, with random weights


def test_a_loop_by_hand():
    cache = example("hand_loop").main(["--steps", "12"])
    assert {record.context for record in cache.stats} == {"cond", "uncond"}
    assert cache.stats.reused and not cache.enabled


def test_a_script_of_cache_dit_gives_the_same_picture_three_ways():
    pytest.importorskip("cache_dit", minversion="1.5")
    script = example("from_cache_dit")
    own, kernels, runtime = (
        script.main(["--steps", "12", *flag]) for flag in (["--own"], ["--kernels"], [])
    )
    assert torch.allclose(own, kernels, atol=1e-5) and torch.allclose(own, runtime, atol=1e-5)


def test_the_template_of_an_engine():
    found = example("engine_template").main()
    assert found["statistics"]["reused"] and not torch.equal(found["plain"], found["cached"])
    moved = (found["plain"] - 1).abs().mean()
    assert (found["plain"] - found["cached"]).abs().mean() < 0.2 * moved
    assert torch.equal(found["turns"][0], found["cached"]), "a slot is not what it is alone"
    assert torch.equal(found["plain"], found["after"])
