"""`fastcache doctor`: what it says holds, and what could go wrong is seen."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch import nn

import fastcache
from fastcache import cli
from fastcache.cli.doctor import target_from
from fastcache.cli.parse import config_from, written
from fastcache.ops import dispatch
from fastcache.ops.backends.table import BACKENDS
from fastcache.tools.doctor import Diagnosis, diagnose, steps_of


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        return x + 0.1 * self.mix(x)


class Plain(nn.Module):
    """Blocks of a class that nobody knows."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class Pipeline:
    """One that opens no contexts."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)

    def __call__(self, num_inference_steps: int = 12):
        with torch.no_grad():
            return [self.transformer(x) for x in torch.ones(num_inference_steps, 1, 4, 8)]


class Uncallable:
    def __init__(self) -> None:
        self.transformer = eval_model()


def eval_model(depth: int = 3) -> Plain:
    torch.manual_seed(0)
    return Plain(depth).eval().requires_grad_(False)


model = eval_model()
pipe = Pipeline(transformer=eval_model())
number = 3


def made():
    return Plain()


def with_a_run():
    """What `fastcache doctor module:function` tries."""
    mine = eval_model()

    def run(cache):
        with cache.run(num_inference_steps=8):
            for i in range(8):
                mine(torch.full((1, 4, 8), 1.0 + 0.1 * i))

    return mine, run


def past_it():
    mine = eval_model()
    return mine, lambda: mine.blocks[0](torch.ones(1, 4, 8))


def raising():
    return eval_model(), lambda: {}["prompt"]


def broken_pair():
    return eval_model(), 3


def said(found: Diagnosis, level: str) -> str:
    return "\n".join(f"{f.what} -> {f.do}" for f in found.findings if f.level == level)


# --- it works -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Flux", "SD3", "Wan, two experts"])
def test_a_pipeline_of_diffusers_is_well_and_the_lines_are_right(kind):
    pytest.importorskip("diffusers", minversion="0.36")
    import tiny_pipelines

    pipe, inputs = tiny_pipelines.KINDS[kind]()
    found = diagnose(pipe)
    assert found.works and found.method == '"balanced"' and found.steps == steps_of(pipe)
    assert not said(found, "warning") and not said(found, "error")
    names = {"fastcache": fastcache, "pipe": pipe}
    exec(found.lines[0], names)  # the model is as it was: it can be enabled
    cache = names["cache"]
    assert {d.name: list(d.hooked) for d in found.denoisers} == cache.hooked()
    pipe(**{**inputs, "num_inference_steps": 12, "output_type": "latent"})
    assert cache.stats.reused
    cache.disable()


def test_the_lines_for_a_model_drive_it():
    mine = eval_model()
    found = diagnose(mine, steps=8)
    source = "\n".join([*found.lines, "        model(x)"]).replace(
        "    with cache.context", "    for x in timesteps:\n     with cache.context"
    )
    names = {"fastcache": fastcache, "model": mine, "timesteps": torch.ones(8, 1, 4, 8)}
    exec(source, names)
    assert names["cache"].stats.reused
    names["cache"].disable()


def test_the_model_is_left_as_it_was():
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    diagnose(model)
    diagnose(model, fastcache.FirstBlockCacheConfig())
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before
    kind = type(pipe)
    diagnose(pipe)
    assert type(pipe) is kind


def test_where_no_block_is_found_the_whole_output_is_cached():
    found = diagnose(nn.Sequential(nn.Linear(8, 8)).eval())
    assert found.works and found.method == "fastcache.EasyCacheConfig()"
    assert '"balanced" does not fit: ' in said(found, "note")


def test_few_steps_get_a_mask_of_their_own():
    assert diagnose(model, steps=4).method == '"mask/4"'
    assert diagnose(model, steps=28).method == '"balanced"'


def test_a_generation_that_is_given_is_tried():
    mine, run = with_a_run()
    found = diagnose(mine, run=run)
    assert found.works and found.tried.startswith("8 calls: ") and ", 0 reused" not in found.tried


# --- it does not ----------------------------------------------------------------------------------


def refused(found: Diagnosis, what: str) -> None:
    assert not found.works and what in said(found, "error"), found.text()


def test_what_has_no_denoiser():
    refused(diagnose(3), "target is int")
    refused(diagnose(Pipeline(unet=nn.Linear(2, 2))), "give the one that denoises, of unet")


def test_what_is_enabled_already():
    mine = eval_model()
    with fastcache.enable(mine, "balanced"):
        refused(diagnose(mine), "already enabled")
    assert diagnose(mine).works


def test_a_config_that_fits_nothing():
    config = fastcache.TaylorSeerCacheConfig(cache_identifiers=["nope"])
    refused(diagnose(model, config), "nothing to hook")


def test_a_config_that_computes_every_step():
    refused(diagnose(model, "balanced", steps=3), "all of 3 steps would be computed")


@pytest.mark.parametrize(
    ("pair", "what"),
    [
        (past_it, "never called the model's forward"),
        (raising, "raised KeyError"),
        (lambda: (model, lambda: model(torch.ones(1, 4, 8))), "nothing was reused"),
    ],
)
def test_a_generation_in_which_nothing_is_cached(pair, what):
    mine, run = pair()
    refused(diagnose(mine, run=run), what)


def test_enabling_makes_nothing_callable():
    mine = Uncallable()
    with fastcache.enable(mine, "balanced"):
        assert not callable(mine)


# --- what could go wrong --------------------------------------------------------------------------


def test_no_contexts():
    assert "opens no contexts" in said(diagnose(pipe), "note")
    assert "cannot be called" in said(diagnose(Uncallable()), "warning")


def test_compiled_before():
    whole = torch.compile(eval_model(), backend="eager")
    assert "needs an open context" in said(diagnose(whole), "note")
    found = diagnose(whole, fastcache.FirstBlockCacheConfig())
    assert "fastcache.compile(model)" in said(found, "warning")
    owned = Pipeline(transformer=torch.compile(eval_model(), backend="eager"))
    assert "is compiled already" in said(diagnose(owned), "note")
    in_place, blocks = eval_model(), eval_model()
    in_place.compile(backend="eager")
    blocks.blocks[1].compile(backend="eager")
    assert "is compiled already" in said(diagnose(in_place), "note")
    assert "1 modules of Plain are compiled" in said(diagnose(blocks), "note")


def test_ranks(monkeypatch):
    assert "ranks" not in diagnose(model).text()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "4 ranks: this method's schedule" in said(diagnose(model), "note")
    found = diagnose(model, fastcache.FirstBlockCacheConfig())
    assert "process_group=group" in said(found, "warning")


def test_weights():
    found = diagnose(Plain())
    assert "training mode" in said(found, "warning") and "no_grad" in said(found, "note")
    assert "torch.float64" in said(diagnose(eval_model().double()), "note")
    assert "meta device" in said(diagnose(eval_model().to("meta")), "note")
    assert not said(diagnose(model), "warning")


def test_kernels_that_do_not_run_here(monkeypatch):
    monkeypatch.setitem(BACKENDS["cpp"].__dict__, "status", "no compiler")
    monkeypatch.setattr(dispatch, "active", lambda device: "reference")  # which keeps its choice
    found = said(diagnose(model), "warning")
    assert "no kernels on cpu" in found and "cpp: no compiler" in found and "cuda" not in found


def test_offloading():
    accelerate = pytest.importorskip("accelerate")
    mine = eval_model()
    accelerate.cpu_offload(mine, execution_device=torch.device("cpu"))
    assert "offloaded by accelerate" in said(diagnose(mine), "note")


def test_hooks_of_diffusers():
    hooks = pytest.importorskip("diffusers.hooks")
    mine = eval_model()
    hooks.apply_group_offloading(
        mine, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level"
    )
    assert "group_offloading" in said(diagnose(mine), "note")


def test_blocks_that_nobody_knows():
    found = said(diagnose(model), "note")
    assert "Block in blocks is not a class that is known: it takes 'x'" in found
    assert "how Block brings the timestep in" in found
    known = fastcache.BlockAdapter(block=fastcache.Block(returns=("hidden",)))
    assert "not a class that is known" not in diagnose(model, adapter=known).text()


def test_adapters():
    mine = eval_model()
    mine.peft_config = {}
    assert "cache.reset()" in said(diagnose(mine), "note")


def test_what_enable_warns_of():
    class Attending(Plain):
        def __init__(self) -> None:
            super().__init__()
            for block in self.blocks:
                block.attn1 = nn.Linear(8, 8)

    config = fastcache.PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500)
    assert "PyramidAttentionBroadcastConfig" in said(
        diagnose(Attending().eval(), config), "warning"
    )


# --- the command ----------------------------------------------------------------------------------


def command(capsys, *args: str) -> tuple[int, str]:
    status = cli.main(["doctor", *args])
    streams = capsys.readouterr()
    return status, streams.out + streams.err


@pytest.mark.parametrize("name", ["model", "pipe", "made", "Plain", "with_a_run"])
def test_objects_functions_and_classes(name, capsys):
    status, text = command(capsys, f"{__name__}:{name}")
    assert status == 0 and text.startswith("works") and "what to write:\n    cache = " in text
    assert ("tried" in text) == (name == "with_a_run")


def test_the_status_tells_that_it_will_not_work(capsys):
    for name in ("number", "past_it", "raising"):
        status, text = command(capsys, f"{__name__}:{name}")
        assert status == 1 and text.startswith("works      no\n")


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["no.such.module:x"], "cannot import"),
        ([f"{__name__}:nothing"], "has no 'nothing'"),
        ([f"{__name__}:broken_pair"], "must return (target, run)"),
        ([f"{__name__}:model", "--config", "nope"], "config: 'nope'"),
        ([f"{__name__}:model", "--steps", "0"], "steps is 0"),
    ],
)
def test_bad_input_is_one_line(args, what, capsys):
    status, text = command(capsys, *args)
    assert status == 1 and what in text and text.count("\n") == 1


FIRST = '{"config": "firstblock", "threshold": 0.5}'


def test_json(capsys):
    status, text = command(capsys, f"{__name__}:with_a_run", "--json", "--config", FIRST)
    found = json.loads(text)
    assert status == 0 and found["works"] and found["computed"] is None
    assert found["denoisers"][0]["hooked"] == ["blocks (3 blocks)"]
    assert {"level", "what", "do"} == set(found["findings"][0])


def test_configs_are_written_as_a_program_has_them(tmp_path):
    recipe = fastcache.Recipe(fastcache.Interval(3), fastcache.Taylor(1))
    saved = recipe.save(tmp_path / "r.json")
    measured = fastcache.Calibration([1.0, 0.9]).save(tmp_path / "c.json")
    plain = tmp_path / "s.json"
    plain.write_text('{"config": "firstblock", "threshold": 0.2}')
    names = {"fastcache": fastcache}
    for text in (
        "quality",
        "firstblock",
        '{"config": "MagCacheConfig", "mag_ratios": [1.0, 0.9], "num_inference_steps": 2}',
        '{"when": {"Interval": {"n": 3}}, "what": {"Taylor": {"order": 1}}}',
        str(saved),
        str(measured),
        str(plain),
    ):
        given = config_from(text)
        found = eval(written(text, given), names)
        settings = fastcache.enable(eval_model(), found)
        assert settings.recipe == fastcache.enable(eval_model(), given).recipe, text
    assert written(str(plain), config_from(str(plain))) == (
        "fastcache.FirstBlockCacheConfig(threshold=0.2)"
    )


def test_the_demo_model(capsys):
    pytest.importorskip("diffusers")
    status, text = command(capsys, "demo")
    assert status == 0 and "transformer_blocks (2 blocks)" in text
    assert isinstance(target_from("demo")[0], nn.Module)


def test_steps_of_a_pipeline():
    assert steps_of(pipe) == 12 and steps_of(model) == 28 == steps_of(Uncallable())
    assert steps_of(functools.partial(print)) == 28
