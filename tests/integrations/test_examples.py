# SPDX-License-Identifier: Apache-2.0
"""Every example runs, and does what it says; that of the server is in test_serve.py."""

from __future__ import annotations

import importlib.util
import sys
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
    elsewhere = {"serve"}
    run = {"diffusers_pipeline", "hand_loop", "from_cache_dit", "engine_template", "export_aoti"}
    run |= {"flux", "wan", "qwen_image"}  # but for loading weights
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


@pytest.mark.parametrize(
    "model", [pytest.param("WanTransformer3DModel", marks=pytest.mark.slow), "Plain"]
)
def test_two_packages_share_a_cache(model, monkeypatch, tmp_path, capsys):
    """All but AOTInductor, which compiles for minutes: the exported programs are packaged as they are."""

    def package(program: Any, package_path: str) -> str:
        torch.export.save(program, package_path)
        return package_path

    def load(path: str) -> Any:
        return torch.export.load(path).module()

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    if model == "Plain":
        monkeypatch.setitem(sys.modules, "diffusers", None)  # not installed
    script = example("export_aoti")
    built, _ = script.build()
    assert type(built).__name__ == model
    assert script.main(tmp_path) < 1e-5
    assert {path.name for path in tmp_path.iterdir()} == {"compute.pt2", "reuse.pt2"}
    said = capsys.readouterr().out
    assert said.count(": compute differs") + said.count(": reuse   differs") == script.STEPS


# --- for large checkpoints: everything but loading them, with pipelines of the same class -----------------


def without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in inputs.items() if k not in names}


def test_flux_compares_three_runs(capsys):
    from test_pipelines import flux

    pipe, inputs = flux()
    found = example("flux").compare(pipe, without(inputs, "output_type"), 12, "balanced")
    assert list(found) == ["no cache", "cache", "fewer steps"]
    assert found["cache"].computed == found["fewer steps"].computed < 12
    assert found["cache"].psnr > 20 and found["cache"].picture.shape == (16, 16, 3)
    assert not hasattr(pipe.transformer, "_fastcache")
    assert "denoiser calls" in capsys.readouterr().out


def test_wan_counts_both_experts():
    from test_pipelines import wan

    pipe, inputs = wan(2)
    limit = 2**30
    found = example("wan").generate(pipe, inputs, 14, "balanced", limit)
    assert set(found["experts"]) == {"transformer", "transformer_2"}
    assert all(count["compute"] and count["reuse"] for count in found["experts"].values())
    assert found["frames"].shape[0] == 5


def test_qwen_image_measures_once_and_computes_the_share(tmp_path):
    from test_pipelines import qwen

    import fastcache

    pipe, inputs = qwen()
    script = example("qwen_image")
    path = tmp_path / "c.json"
    calibration = script.measure(pipe, inputs, 12, path)
    assert set(calibration.contexts) == {"cond", "uncond"}
    written = path.stat().st_mtime_ns
    assert script.measure(pipe, inputs, 12, path).steps == 12 == calibration.steps
    assert path.stat().st_mtime_ns == written
    with fastcache.enable(pipe, script.recipe_for(calibration, 0.6)) as cache:
        script.generate(pipe, inputs, 12)
    assert {r.context for r in cache.stats} == {"cond", "uncond"}
    assert 0 < cache.stats.reused <= 0.6 * len(cache.stats)


@pytest.mark.parametrize("name", ["flux", "wan", "qwen_image"])
def test_what_was_not_run_says_so(name):
    script = example(name)
    assert "Not run here" in script.__doc__
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
