# SPDX-License-Identifier: Apache-2.0
"""cache-dit's own calls on fastcache's runtime: the same steps and outputs, six patterns, all of it given back."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings

import pytest
import torch

cache_dit = pytest.importorskip("cache_dit", minversion="1.5")
diffusers = pytest.importorskip("diffusers", minversion="0.36")

import tiny  # noqa: E402
import toys  # noqa: E402
from cache_dit import (  # noqa: E402
    BlockAdapter,
    DBCacheConfig,
    DMDCalibratorConfig,
    FoCaCalibratorConfig,
    ForwardPattern,
    ParamsModifier,
    TaylorSeerCalibratorConfig,
)
from patterned import PatternModel, pattern_calls  # noqa: E402

import fastcache  # noqa: E402
from fastcache.integrations import cache_dit as backend  # noqa: E402
from fastcache.integrations.cache_dit.session import session_of  # noqa: E402

for logger in [n for n in logging.root.manager.loggerDict if n.lower().startswith("cache")]:
    logging.getLogger(logger).setLevel(logging.CRITICAL)

STEPS = 12
FAMILIES = {"Flux": 0.35, "Wan3D": 0.15, "QwenImage": 0.55}  # thresholds that cache some steps
MASK = [1, 1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0]
SETTINGS = {
    "F1B0": ({}, None),
    "F2B1": ({"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}, None),
    "limits": ({"max_cached_steps": 4, "max_continuous_cached_steps": 1}, None),
    "taylor 1": ({}, TaylorSeerCalibratorConfig(taylorseer_order=1)),
    "F2B1, taylor 2": (
        {"Fn_compute_blocks": 2, "Bn_compute_blocks": 1},
        TaylorSeerCalibratorConfig(taylorseer_order=2),
    ),
    "static mask, taylor 1": (
        {"steps_computation_mask": MASK, "steps_computation_policy": "static"},
        TaylorSeerCalibratorConfig(taylorseer_order=1),
    ),
    "dynamic mask": ({"steps_computation_mask": MASK}, None),
    "separate guidance": ({"enable_separate_cfg": True}, None),
}


@pytest.fixture
def installed():
    backend.install()
    yield
    backend.uninstall()


def config(**fields):
    given = {"Fn_compute_blocks": 1, "max_warmup_steps": 3, "enable_separate_cfg": False}
    return DBCacheConfig(**given | fields)


def run(name, fields, calibrator):
    """Outputs of two runs, and what cache-dit's summary says of the second one."""
    model, inputs = tiny.build(name, depth=4)
    fields = {"residual_diff_threshold": FAMILIES[name], "num_inference_steps": STEPS} | fields
    cache_dit.enable_cache(
        model, cache_config=config(**fields), calibrator_config=copy.deepcopy(calibrator)
    )
    outputs = []
    calls = tiny.trajectory(name, inputs, STEPS, speed=0.01)
    for number, call in enumerate(2 * calls):
        if number == STEPS:  # which cache-dit by itself does one step late
            cache_dit.refresh_context(model, num_inference_steps=STEPS)
        for branch in range(2 if fields.get("enable_separate_cfg") else 1):
            given = call | {"hidden_states": call["hidden_states"] * (1 - 0.1 * branch)}
            outputs.append(tiny.output(model, given))
    (said, *_) = cache_dit.summary(model, logging=False)
    cache_dit.disable_cache(model)
    return torch.stack(outputs), said


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_steps_and_outputs_are_those_of_cache_dit(name, setting):
    expected, theirs = run(name, *SETTINGS[setting])
    backend.install()
    try:
        found, ours = run(name, *SETTINGS[setting])
    finally:
        backend.uninstall()
    assert theirs.cached_steps, "nothing was cached: the case shows nothing"
    assert ours.cached_steps == theirs.cached_steps
    assert ours.cfg_cached_steps == theirs.cfg_cached_steps
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    for step, change in theirs.residual_diffs.items():
        assert ours.residual_diffs[step] == pytest.approx(change, rel=1e-4)


# --- patterns ----------------------------------------------------------------------------------------------


def patterned(pattern, **fields):
    model = PatternModel(pattern).eval()
    adapter = BlockAdapter(transformer=model, blocks=model.parts, forward_pattern=pattern)
    adapter = cache_dit.enable_cache(
        adapter, cache_config=config(residual_diff_threshold=0.5, **fields)
    )
    with torch.no_grad():
        outputs = [model(*call).clone() for call in pattern_calls()]
    return torch.stack(outputs), model, adapter


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("pattern", ForwardPattern.supported_patterns(), ids=lambda p: p.name)
def test_the_six_patterns(pattern, last):
    fields = {"Bn_compute_blocks": last}
    expected, _, adapter = patterned(pattern, **fields)
    cache_dit.disable_cache(adapter)
    backend.install()
    try:
        found, model, adapter = patterned(pattern, **fields)
        assert session_of(model).cache.stats.reused == 5
        cache_dit.disable_cache(adapter)
    finally:
        backend.uninstall()
    assert (found - expected).abs().max() <= 1e-5


# --- life ----------------------------------------------------------------------------------------------------


class Pipe(diffusers.DiffusionPipeline):
    """A pipeline that calls its transformer once a step."""

    def __init__(self, transformer):
        self.transformer = transformer

    @torch.no_grad()
    def __call__(self, calls):
        return torch.stack([self.transformer(*call).clone() for call in calls])


def test_each_call_of_a_pipeline_begins_anew_and_all_is_given_back(installed):
    model = PatternModel(ForwardPattern.Pattern_0).eval()
    pipe, before = Pipe(model), toys.snapshot(model)
    adapter = BlockAdapter(
        pipe=pipe,
        transformer=model,
        blocks=model.parts,
        forward_pattern=ForwardPattern.Pattern_0,
    )
    expected = pipe(pattern_calls())
    made = cache_dit.enable_cache(adapter, cache_config=config(residual_diff_threshold=0.5))
    assert type(pipe).__name__ == "Pipe" and isinstance(pipe, Pipe)
    first, second = pipe(pattern_calls()), pipe(pattern_calls())
    assert torch.equal(first, second) and not torch.equal(first, expected)
    assert model._cached_steps == model.parts._cached_steps == [3, 4, 5, 6, 7]
    assert inspect.signature(model.forward) == inspect.signature(
        PatternModel.forward.__get__(model)
    )
    assert cache_dit.summary(pipe, logging=False)
    again = cache_dit.enable_cache(adapter, cache_config=config())
    assert again is made and session_of(model).cache.recipe.rules[0].when.threshold == 0.5
    cache_dit.disable_cache(pipe)
    assert type(pipe) is Pipe and torch.equal(pipe(pattern_calls()), expected)
    assert toys.snapshot(model) == before


def test_a_transformer_is_as_it_was_after_disable_and_after_uninstall():
    model, inputs = tiny.build("QwenImage", depth=3)
    call = tiny.trajectory("QwenImage", inputs, 1)[0]
    expected, before = tiny.output(model, call), toys.snapshot(model)
    for give_back in (lambda: cache_dit.disable_cache(model), backend.uninstall):
        backend.install()
        cache_dit.enable_cache(model, cache_config=config())
        assert session_of(model)
        give_back()
        backend.uninstall()
        for (
            module
        ) in model.modules():  # what cache-dit itself leaves where it is not asked to disable
            for name in ("_forward_pattern", "_context_kwargs", "_has_separate_cfg"):
                vars(module).pop(name, None)
        assert toys.snapshot(model) == before and torch.equal(tiny.output(model, call), expected)


def test_refresh_begins_anew_with_other_settings(installed):
    model = PatternModel(ForwardPattern.Pattern_3).eval()
    adapter = BlockAdapter(
        transformer=model, blocks=model.parts, forward_pattern=ForwardPattern.Pattern_3
    )
    adapter = cache_dit.enable_cache(adapter, cache_config=config(residual_diff_threshold=0.5))

    def actions(count):
        with torch.no_grad():
            for call in pattern_calls(count):
                model(*call)
        return "".join(
            "." if r.action == "reuse" else "C"
            for r in list(session_of(model).cache.stats)[-count:]
        )

    assert actions(6) == "CCC..."
    assert actions(2) == ".."  # nobody has said that a run is over
    cache_dit.refresh_context(model, num_inference_steps=4)
    assert actions(8) == "CCC.CCC."
    cache_dit.refresh_context(
        model,
        cache_config=DBCacheConfig().reset(
            num_inference_steps=6,
            steps_computation_mask=[1, 0, 0, 1, 0, 1],
            steps_computation_policy="static",
        ),
    )
    assert actions(6) == "C..C.C"
    assert session_of(model).cache.recipe.rules[0].where.first == 1  # what was not said stays
    cache_dit.disable_cache(adapter)


def test_a_context_that_names_a_branch_is_believed(installed):
    model, inputs = tiny.build("Flux", depth=3)
    cache_dit.enable_cache(model, cache_config=config(residual_diff_threshold=0.9))
    for call in tiny.trajectory("Flux", inputs, 6):
        for branch in ("cond", "uncond"):
            with model.cache_context(branch):
                tiny.output(model, call)
    records = list(session_of(model).cache.stats)
    assert [(r.context, r.step) for r in records[:4]] == [
        ("cond", 0), ("uncond", 0), ("cond", 1), ("uncond", 1),
    ]  # fmt: skip
    assert sum(r.action == "reuse" for r in records) == 6
    cache_dit.disable_cache(model)


@pytest.mark.parametrize(
    "fields, calibrator, reason",
    [
        ({}, FoCaCalibratorConfig(), "foca"),
        ({}, TaylorSeerCalibratorConfig(calibrator_cache_type="hidden_states"), "hidden_states"),
        (
            {"enable_separate_cfg": True, "cfg_diff_compute_separate": False},
            None,
            "cfg_diff_compute_separate",
        ),
    ],
)
def test_what_has_no_counterpart_runs_in_cache_dit_and_is_said(
    installed, fields, calibrator, reason
):
    model, inputs = tiny.build("QwenImage", depth=3)
    with pytest.warns(fastcache.FastcacheWarning, match=f"{reason}.*no counterpart"):
        cache_dit.enable_cache(model, cache_config=config(**fields), calibrator_config=calibrator)
    assert session_of(model) is None and hasattr(model, "_context_manager")
    tiny.output(model, tiny.trajectory("QwenImage", inputs, 1)[0])
    cache_dit.refresh_context(model, num_inference_steps=8)
    cache_dit.disable_cache(model)
    assert not hasattr(model, "_context_manager")


def test_dmd_and_modifiers(installed):
    model, _ = tiny.build("QwenImage", depth=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache_dit.enable_cache(
            model,
            cache_config=config(),
            calibrator_config=DMDCalibratorConfig(dmd_history=6),
            params_modifiers=ParamsModifier(
                cache_config=DBCacheConfig().reset(Fn_compute_blocks=2)
            ),
        )
    (rule,) = session_of(model).cache.recipe.rules
    assert rule.what.keep == 6 and rule.where.first == 2
    cache_dit.disable_cache(model)


def test_what_is_wrong_is_said_and_the_model_left_alone(installed):
    model, _ = tiny.build("QwenImage", depth=3)
    before = toys.snapshot(model)
    with pytest.raises(ValueError, match="residual_diff_threshold"):
        cache_dit.enable_cache(model, cache_config=config(residual_diff_threshold=float("nan")))
    assert toys.snapshot(model) == before and session_of(model) is None


def test_uninstall_restores_cache_dit_exactly():
    from cache_dit.caching.cache_adapters import CachedAdapter

    before, summary = dict(vars(CachedAdapter)), cache_dit.summary
    backend.uninstall()
    backend.install()
    backend.install()
    backend.accelerate()
    assert dict(vars(CachedAdapter)) != before and cache_dit.summary is not summary
    backend.uninstall()
    backend.uninstall()
    assert dict(vars(CachedAdapter)) == before and cache_dit.summary is summary
