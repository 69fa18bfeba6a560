# SPDX-License-Identifier: Apache-2.0
"""`fastcache doctor`: what it says holds, and what could go wrong is seen."""

from __future__ import annotations

import warnings

import pytest
import torch
from patients import (
    Pipeline,
    Plain,
    Uncallable,
    eval_model,
    model,
    past_it,
    pipe,
    raising,
    with_a_run,
)
from torch import nn

import fastcache
from fastcache.ops import dispatch
from fastcache.ops.backends.table import BACKENDS
from fastcache.tools.doctor import Diagnosis, diagnose, steps_of


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


def test_warnings_of_others_are_not_kept_back():
    mine, run = with_a_run()

    def warns(cache):
        warnings.warn("a word of the model's own", stacklevel=1)
        run(cache)

    with pytest.warns(UserWarning, match="a word of the model's own"):
        found = diagnose(mine, run=warns)
    assert "a word" not in found.text()


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
