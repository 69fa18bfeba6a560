# SPDX-License-Identifier: Apache-2.0
"""The command line, and how configs and models are named on it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastcache
from fastcache import Calibration, FirstBlock, MagCacheConfig, Recipe, Stack, Taylor, cli
from fastcache.cli import command as commands
from fastcache.cli.parse import config_from, model_from
from fastcache.parts import dtype_named
from fastcache.tools.inspect import inspect_model
from fastcache.tools.memory import Shapes

EVERY = ("firstblock", "magcache", "taylorseer", "pab")


class Plain(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = hidden_states + 0.1 * block(hidden_states)
        return hidden_states


def own_run():
    """What `fastcache calibrate module:callable` calls."""
    torch.manual_seed(0)
    model = Plain().requires_grad_(False)

    def run(cache):
        for i in range(8):
            with cache.context(step_index=i, num_inference_steps=8):
                model(torch.full((1, 4, 8), 1.0 + 0.1 * i))

    return model, run


def own_tuning():
    """What `fastcache tune module:callable` calls."""
    model, _ = own_run()

    def generate(cache, num_inference_steps=8, seed=0):
        x = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed))
        for i in range(num_inference_steps):
            with cache.context(step_index=i, num_inference_steps=num_inference_steps):
                x = x - model(x) / num_inference_steps
        return x

    return model, generate


def not_a_run():
    return Plain()


def said(capsys, *args: str, status: int = 0) -> str:
    assert cli.main(list(args)) == status
    streams = capsys.readouterr()
    return streams.out if status == 0 else streams.err


# --- names ----------------------------------------------------------------------------------------


def test_configs_by_name_json_and_file(tmp_path):
    assert config_from("FirstBlockCacheConfig") == fastcache.FirstBlockCacheConfig()
    assert config_from('{"config": "firstblock", "threshold": 0.2}').threshold == 0.2
    assert (
        config_from(
            '{"config": "taylorseer", "taylor_factors_dtype": "float16"}'
        ).taylor_factors_dtype
        == torch.float16
    )
    assert config_from(
        '{"config": "pab", "spatial_attention_timestep_skip_range": [1, 9]}'
    ).spatial_attention_timestep_skip_range == (1, 9)
    flux = config_from('{"config": "MagCacheConfig", "mag_ratios": "flux"}')
    assert len(flux.mag_ratios) == 28
    path = tmp_path / "settings.json"
    path.write_text('{"config": "MagCacheConfig", "mag_ratios": [1.0, 0.9]}')
    assert isinstance(config_from(str(path)), MagCacheConfig)


def test_recipes_from_json():
    recipe = config_from(
        '{"when": {"FirstBlock": {"threshold": 0.1}}, "what": {"Taylor": {"order": 2}}}'
    )
    assert recipe == Recipe(FirstBlock(0.1), Taylor(order=2), Stack())
    assert config_from('{"when": {"Mask": {"compute": [1, 0]}}, "where": "Stack"}').where == Stack()


def test_a_calibration_file_is_a_config(tmp_path):
    path = Calibration([1.0, 0.9, 0.8]).save(tmp_path / "c.json")
    config = config_from(str(path))
    assert isinstance(config, MagCacheConfig) and config.num_inference_steps == 3
    text = json.dumps({"config": "MagCacheConfig", "threshold": 0.3, "mag_ratios": str(path)})
    assert config_from(text).threshold == 0.3


@pytest.mark.parametrize(
    "text, said",
    [
        ("NoSuchConfig", "NoSuchConfig.*FirstBlockCacheConfig"),
        ('{"threshold": 0.1}', "config"),
        ("{", "not JSON"),
        ('{"a":' * 3000, "not JSON"),
        ('{"config": "FirstBlockCacheConfig", "treshold": 1}', "treshold.*threshold"),
        ('{"config": "FirstBlockCacheConfig", "threshold": "x"}', "threshold"),
        ('{"config": "taylorseer", "taylor_factors_dtype": "float99"}', "float99"),
        ('{"when": {"NoPolicy": {}}}', "when.*FirstBlock"),
        ('{"when": "Reuse"}', "when.*FirstBlock"),
        ('{"when": "Policy"}', "when.*FirstBlock"),
        ('{"when": "FirstBlock", "what": "Predictor"}', "what.*Taylor"),
        ('{"when": {"FirstBlock": {"foo": 1}}}', "when.*foo"),
        ('{"when": {"FirstBlock": 3}}', "when"),
        ('{"when": "FirstBlock", "who": 1}', "who"),
        ("none.json", "no such file"),
    ],
)
def test_what_no_config_can_be_made_of_is_explained(text, said):
    with pytest.raises((ValueError, OSError), match=said):
        config_from(text)


def test_models_by_name():
    assert isinstance(model_from(f"{__name__}:Plain", {"depth": 5}), Plain)
    for text in ("NoSuchTransformer", "no.such.module:x", f"{__name__}:EVERY"):
        with pytest.raises(ValueError, match="MODEL is `demo`"):
            model_from(text)
    with pytest.raises(ValueError, match="dtype"):
        dtype_named("Tensor")


# --- inspect --------------------------------------------------------------------------------------

# image and text tokens of the tiny models
TOKENS = {
    "Flux": (16, 48),
    "Wan3D": (128, 12),
    "CogVideoX": (16, 8),
    "LTX": (512, 16),
    "QwenImage": (16, 8),
    "HunyuanVideo": (256, 12),
    "PixArt2D": (16, 8),
    "DiT2D": (16, 0),
}
CHECKED = '{"when": {"Interval": {}}, "what": {"Guided": {"order": 3, "guide": "input", "checked": true}}}'
GUIDED = '{"when": {"%s": {}}, "what": {"Guided": {"tokens": 5, "guide": "%s"}}}'
FORECAST = '{"when": {"Interval": {"n": 3}}, "what": {"Taylor": {"order": 2}}}'
CONFIGS = (
    "firstblock",
    '{"config": "magcache", "mag_ratios": "flux"}',
    "taylorseer",
    "pab",
    FORECAST,
    GUIDED % ("Interval", "input"),
    GUIDED % ("FirstBlock", "residual"),
    CHECKED,
)


@pytest.mark.filterwarnings("ignore:.*PyramidAttentionBroadcastConfig")
@pytest.mark.parametrize("name", TOKENS)
def test_memory_is_foretold_to_the_byte(name):
    pytest.importorskip("diffusers")
    import tiny

    model, inputs = tiny.build(name)
    shapes = Shapes(*TOKENS[name], batch=inputs["hidden_states"].shape[0], dtype="float32")
    for text in CONFIGS:
        config = config_from(text)
        if hasattr(config, "current_timestep_callback"):
            config.current_timestep_callback = lambda: 500.0
        with fastcache.enable(model, config) as cache:
            for call in tiny.trajectory(name, inputs, 2):
                tiny.output(model, call)
            held = cache.nbytes()
        assert inspect_model(model, config, shapes=shapes).nbytes == held, text


def test_inspect_leaves_the_model_as_it_was():
    model = Plain()
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    found = inspect_model(model, config_from("firstblock"), shapes=Shapes(16, 0, contexts=2))
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before
    assert found.hooked == (("blocks (3 blocks)",),) and found.shapes.width == 8
    assert found.graphs == 3 and found.plan is None
    assert found.captured == ("first block", "reuse")
    assert found.nbytes == 2 * sum(found.memory.values())


@pytest.mark.parametrize(
    ("config", "captured"),
    [(FORECAST, ("reuse",)), ('{"config": "magcache", "mag_ratios": "flux"}', ("reuse",))],
)
def test_inspect_tells_which_graphs_are_captured(config, captured):
    found = inspect_model(Plain(), config_from(config))
    assert found.graphs == 2 and found.captured == captured
    assert 'captured    reuse, with cudagraphs="reuse"' in found.text()


def test_inspect_names_what_came_close():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.refiner = nn.Module()
            self.refiner.layers = nn.ModuleList([nn.Linear(4, 4)])

    found = inspect_model(Two(), config_from("firstblock"))
    assert found.close_by == ("refiner.layers",)


def test_inspect_full_size_model_without_memory(capsys):
    pytest.importorskip("diffusers")
    out = said(capsys, "inspect", "FluxTransformer2DModel", "--config", "firstblock")
    assert "11,8" in out and "transformer_blocks (19 blocks)" in out and "48.0 MiB" in out


class Counting(Plain):
    """What graphs that enter a forward twice in a step would do twice."""

    def forward(self, x, bias=0.0):
        x = x + 0.0 * len(self.blocks)
        x += 1.0  # its own by now
        self.calls = getattr(self, "calls", 0) + 1
        x = x + torch.randn_like(x) + bias
        for block in self.blocks:
            x = block(x)
            self.seen = x  # in the loop: a block runs once
        return x


def test_inspect_says_whether_the_code_before_the_blocks_may_run_twice():
    def reentry(model, config="firstblock"):
        return inspect_model(model, config_from(config)).reentry

    assert reentry(Plain()).startswith("yes")
    found = reentry(Counting())
    assert "self.calls = " in found and "randn_like" in found
    assert found.count("line ") == 2
    assert reentry(Counting(), FORECAST) is None


def test_inspect_prints_json(capsys):
    out = said(
        capsys,
        "inspect",
        f"{__name__}:Plain",
        "--config",
        FORECAST,
        "--json",
        "--init",
        '{"depth": 2}',
    )
    found = json.loads(out)
    assert found["hooked"] == [["blocks (2 blocks)"]] and found["graphs"] == 2
    assert found["bytes"] == 3 * 4096 * 8 * 2
    assert found["plan"].startswith("12 of 28")


def test_inspect_says_when_nothing_can_be_hooked(capsys):
    config = '{"config": "taylorseer", "cache_identifiers": ["nope"]}'
    error = said(capsys, "inspect", f"{__name__}:Plain", "--config", config, status=1)
    assert "nothing to hook" in error and "nope" in error
    assert said(capsys, "inspect", "x", "--config", "pab", "--init", "[1]", status=1)


# --- plan -----------------------------------------------------------------------------------------


def test_plan_prints_the_schedule(capsys):
    out = said(capsys, "plan", "taylorseer", "--steps", "9")
    assert "CCC.C....\n" in out
    found = json.loads(said(capsys, "plan", "taylorseer", "--steps", "9", "--json"))
    assert found["computed"] == [0, 1, 2, 4]
    out = said(capsys, "plan", "pab", "--steps", "3", "--timesteps", "900,500,400")
    assert out.endswith("C.C\n")


def test_plan_of_firstblock_says_why_there_is_none(capsys):
    error = said(capsys, "plan", "firstblock", "--steps", "9", status=1)
    assert "first block" in error and "cache.stats" in error


# --- calibrate ------------------------------------------------------------------------------------


def test_calibrate_own_model(capsys, tmp_path):
    out = tmp_path / "c.json"
    text = said(
        capsys, "calibrate", f"{__name__}:own_run", "--out", str(out), "--speedup", "1.2", "--quiet"
    )
    assert Calibration.load(out).steps == 8
    assert (tmp_path / "c.png").stat().st_size > 10_000
    assert "1.2 times as fast" in text and "calls computed" in text and "Recipe(FirstBlock(" in text


def test_calibrate_plans_and_tries_the_plan(capsys, tmp_path):
    out = tmp_path / "own.json"
    text = said(
        capsys, "calibrate", f"{__name__}:own_run", "--out", str(out), "--quiet", "--plan", "5",
        "--cost", "final",
    )  # fmt: skip
    recipe = fastcache.Recipe.load(tmp_path / "plan.json")
    assert sum(recipe.when.compute) == 5
    assert "planned for 5 computed steps" in text and "plan of 5: 5 of" in text
    error = said(
        capsys, "calibrate", f"{__name__}:own_run", "--out", str(out), "--plan", "99", status=1
    )
    assert "computed is 99" in error


def test_calibrate_demo_model_shows_progress(capsys, tmp_path):
    pytest.importorskip("diffusers")
    args = ["calibrate", "--steps", "8", "--batch", "1", "--guidance", "2", "--speedup", "1.2"]
    assert cli.main([*args, "--out", str(tmp_path / "c.json")]) == 0
    streams = capsys.readouterr()
    assert "calibrate" in streams.err and "16" in streams.err
    assert list(Calibration.load(tmp_path / "c.json").contexts) == ["cond", "uncond"]
    assert "computed" in streams.out


def test_calibrate_reports_what_cannot_be_reached(capsys, tmp_path):
    text = said(
        capsys,
        *("calibrate", f"{__name__}:own_run", "--out", str(tmp_path / "c.json")),
        *("--speedup", "50", "--quiet"),
    )
    assert "no threshold computes fewer than" in text


@pytest.mark.parametrize("name", ["Nope", f"{__name__}:not_a_run"])
def test_calibrate_says_what_a_model_must_be(capsys, name, tmp_path):
    error = said(capsys, "calibrate", name, "--out", str(tmp_path / "c.json"), status=1)
    assert "(target, run)" in error


def test_tune_own_model(capsys, tmp_path):
    out = tmp_path / "t.json"
    args = (f"{__name__}:own_tuning", "--out", str(out), "--steps", "8,12", "--seeds", "3")
    text = said(capsys, "tune", *args, "--error", "30", "--quiet")
    found = fastcache.Tuning.load(out)
    assert found.evidence["steps"] == [8, 12] and found.evidence["seeds"] == [3]
    assert "fastest within 30 dB" in text and found.verdict in text
    assert (tmp_path / "t.png").stat().st_size > 10_000 and not (tmp_path / "t.journal").exists()


def test_tune_keeps_its_journal_where_time_is_over(capsys, tmp_path):
    out = tmp_path / "t.json"
    args = (f"{__name__}:own_tuning", "--out", str(out), "--steps", "8", "--quiet")
    assert "more minutes" in said(capsys, "tune", *args, "--minutes", "0")
    assert (tmp_path / "t.journal").exists()
    assert "speed-up" in said(capsys, "tune", *args)
    assert "(target, generate)" in said(capsys, "tune", f"{__name__}:not_a_run", status=1)


# --- the rest -------------------------------------------------------------------------------------


def test_every_command_has_help(capsys):
    for command in ("demo", "bench", "info", "calibrate", "tune", "doctor", "inspect", "plan"):
        try:
            assert cli.main([command, "--help"]) == 0
        except SystemExit as end:
            assert end.code == 0
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2


def test_info_prints_backends(capsys):
    assert "backend reference" in said(capsys, "info")


def test_info_says_what_was_installed_and_what_it_holds(capsys, monkeypatch, tmp_path):
    from fastcache.cli import info

    row = re.search(r"^wheel +(.*)", said(capsys, "info"), re.MULTILINE)[1]
    assert re.fullmatch(r"fastcache-dit \d\S+, py3-none-\w+(, editable)?", row)
    (tmp_path / "held.so").touch()
    monkeypatch.setattr(
        info, "LIBRARIES", {"C++ kernels": tmp_path / "held.so", "CUDA": tmp_path / "x.so"}
    )
    assert re.search(r"^holds +C\+\+ kernels \(held.so\), no CUDA$", said(capsys, "info"), re.M)
    monkeypatch.setattr(info, "DISTRIBUTION", "no-such-distribution")
    assert "imported from a folder" in said(capsys, "info")


def test_bench_without_a_checkout_says_where_it_is(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    error = said(capsys, "bench", "ops", status=1)
    assert "repository" in error and "clone it" in error
    assert "repository" in said(capsys, "demo", "--model", "pictures", status=1)


def test_bench_is_handed_its_arguments(monkeypatch, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text("import sys; sys.exit(len(sys.argv))")
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    assert cli.main(["bench", "ops", "--quick"]) == 3
    assert cli.main(["demo", "--seed", "1", "--model", "pictures"]) == 4, "bench pictures --seed 1"


def test_errors_are_one_line_unless_asked_for(capsys):
    assert said(capsys, "plan", "nope", "--steps", "3", status=1).count("\n") == 1
    with pytest.raises(ValueError, match="nope"):
        cli.main(["--traceback", "plan", "nope", "--steps", "3"])


def test_module_runs_like_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastcache", "plan", "taylorseer", "--steps", "4"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "CCC." in done.stdout
