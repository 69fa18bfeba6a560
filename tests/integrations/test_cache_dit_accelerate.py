# SPDX-License-Identifier: Apache-2.0
"""cache-dit's decisions on fastcache's kernels: the same steps and outputs, fewer passes, all of it given back."""

from __future__ import annotations

import copy

import pytest
import torch

cache_dit = pytest.importorskip("cache_dit", minversion="1.5")
pytest.importorskip("diffusers", minversion="0.36")

import logging  # noqa: E402

import tiny  # noqa: E402
from cache_dit import (  # noqa: E402
    DBCacheConfig,
    FoCaCalibratorConfig,
    TaylorSeerCalibratorConfig,
)

from fastcache.integrations import cache_dit as backend  # noqa: E402

for logger in [n for n in logging.root.manager.loggerDict if n.lower().startswith("cache")]:
    logging.getLogger(logger).setLevel(logging.CRITICAL)

STEPS = 12
FAMILIES = {"Flux": 0.35, "Wan3D": 0.35, "QwenImage": 0.55}  # thresholds that cache some steps


@pytest.fixture
def accelerated():
    backend.accelerate()
    yield
    backend.uninstall()


def taylor(order=1, **fields):
    return TaylorSeerCalibratorConfig(taylorseer_order=order, **fields)


MASK = [1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0]
SETTINGS = {
    "F1B0": ({"Fn_compute_blocks": 1}, None),
    "F2B1": ({"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}, None),
    "limits": (
        {
            "Fn_compute_blocks": 1,
            "max_cached_steps": 4,
            "max_continuous_cached_steps": 1,
            "max_accumulated_residual_diff_threshold": 1.5,
        },
        None,
    ),
    "warm-up with gaps": ({"Fn_compute_blocks": 1, "warmup_interval": 2}, None),
    "taylor 1": ({"Fn_compute_blocks": 1}, taylor(1)),
    "F2B1, taylor 2": ({"Fn_compute_blocks": 2, "Bn_compute_blocks": 1}, taylor(2)),
    "taylor 3, hidden states": (
        {"Fn_compute_blocks": 1},
        taylor(3, calibrator_cache_type="hidden_states"),
    ),
    "foca": ({"Fn_compute_blocks": 1}, FoCaCalibratorConfig()),
    "dynamic mask": ({"Fn_compute_blocks": 1, "steps_computation_mask": MASK}, None),
    "static mask, taylor 1": (
        {
            "Fn_compute_blocks": 1,
            "steps_computation_mask": MASK,
            "steps_computation_policy": "static",
        },
        taylor(1),
    ),
    "separate guidance, one metric": (
        {"Fn_compute_blocks": 1, "enable_separate_cfg": True, "cfg_diff_compute_separate": False},
        taylor(1),
    ),
    "separate guidance": ({"Fn_compute_blocks": 1, "enable_separate_cfg": True}, None),
}


def run(name, fields, calibrator, dtype=torch.float32, depth=4):
    """Outputs of a run, and what cache-dit's contexts say of it."""
    model, inputs = tiny.build(name, depth=depth)
    model = model.to(dtype)
    fields = {"enable_separate_cfg": False} | fields
    cache_dit.enable_cache(
        model,
        cache_config=DBCacheConfig(
            residual_diff_threshold=FAMILIES[name],
            max_warmup_steps=3,
            num_inference_steps=STEPS,
            **fields,
        ),
        calibrator_config=copy.deepcopy(calibrator),
    )
    outputs = []
    for call in tiny.trajectory(name, inputs, STEPS, speed=0.01):
        call = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in call.items()
        }
        for branch in range(2 if fields["enable_separate_cfg"] else 1):
            call["hidden_states"] = call["hidden_states"] * (1 - 0.1 * branch)
            outputs.append(tiny.output(model, call))
    (context,) = model._context_manager._cached_context_manager.values()
    said = (
        context.cached_steps,
        context.cfg_cached_steps,
        dict(context.residual_diffs),
        dict(context.cfg_residual_diffs),
    )
    return torch.stack(outputs), said


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_decisions_and_outputs_are_those_of_cache_dit(name, setting):
    fields, calibrator = SETTINGS[setting]
    expected, theirs = run(name, fields, calibrator)
    backend.accelerate()
    try:
        found, ours = run(name, fields, calibrator)
    finally:
        backend.uninstall()
    assert theirs[0], "nothing was cached: the case shows nothing"
    assert ours[:2] == theirs[:2]
    for mine, other in zip(ours[2:], theirs[2:], strict=True):
        assert mine.keys() == other.keys()
        assert list(mine.values()) == pytest.approx(list(other.values()), rel=1e-5)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("setting", ["F1B0", "taylor 1", "static mask, taylor 1"])
@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_differs_by_one_rounding(name, setting):
    fields, calibrator = SETTINGS[setting]
    expected, theirs = run(name, fields, calibrator, torch.bfloat16)
    backend.accelerate()
    try:
        found, ours = run(name, fields, calibrator, torch.bfloat16)
    finally:
        backend.uninstall()
    assert theirs[0] and ours[:2] == theirs[:2]
    assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()


def compiled_run(name="Flux"):
    model, inputs = tiny.build(name, depth=3)
    config = DBCacheConfig(
        Fn_compute_blocks=1,
        residual_diff_threshold=FAMILIES[name],
        max_warmup_steps=2,
        enable_separate_cfg=False,
        num_inference_steps=6,
    )
    cache_dit.enable_cache(model, cache_config=config, calibrator_config=taylor())
    call = torch.compile(model, backend="eager")
    outputs = [tiny.output(call, c) for c in tiny.trajectory(name, inputs, 6, speed=0.01)]
    (context,) = model._context_manager._cached_context_manager.values()
    return torch.stack(outputs), context.cached_steps


def test_a_compiled_model_takes_the_same_steps():
    torch._dynamo.reset()
    expected, steps = compiled_run()
    torch._dynamo.reset()
    backend.accelerate()
    try:
        found, ours = compiled_run()
    finally:
        backend.uninstall()
    torch._dynamo.reset()
    assert steps and ours == steps
    assert torch.allclose(found, expected, atol=1e-5)
