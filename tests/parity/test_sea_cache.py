# SPDX-License-Identifier: Apache-2.0
"""SeaCache step by step against diffusers' own hook, and what that does not have."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import tiny
import torch
import toys
from modulated import WAYS
from torch import Tensor

import fastcache
from fastcache.targets.meters.filtered import signal_part

STEPS = 16


@pytest.fixture(autouse=True)
def compiled_anew():
    """Graphs of other tests count against the recompile limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sigmas(steps: int = STEPS) -> list[float]:
    """Of a flow with a shift, 1 down to near 0."""
    return [3 * s / (1 + 2 * s) for s in (1 - i / steps for i in range(steps))]


def video(name: str, seed: int, speed: float) -> list[dict[str, Any]]:
    """A run that turns faster in its middle."""
    _, inputs = tiny.build(name)
    inputs["hidden_states"] = torch.randn(
        inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(seed)
    )
    calls = tiny.trajectory(name, inputs, STEPS, speed)
    for i, call in enumerate(calls):
        call["hidden_states"] = call["hidden_states"] * (1 + 0.2 * math.sin(i + seed))
    return calls


def filtered(x: Tensor, sigma: float, power: float) -> Tensor:
    """The filter as its formula has it, over all axes of [C, T, H, W] after the first, in float64."""
    sigma = min(max(sigma, 1e-6), 1 - 1e-6)
    axes, gain = (1, 2, 3), torch.ones(1, dtype=torch.float64)
    for axis in axes:
        f = torch.fft.fftfreq(x.shape[axis], dtype=torch.float64).abs()
        spectrum = 1 / (f**power + 1e-16)
        g = (1 - sigma) * spectrum / ((1 - sigma) ** 2 * spectrum + sigma**2 + 1e-16)
        gain = gain * g.reshape([-1 if a == axis else 1 for a in range(4)])
    gain = gain / gain.mean()
    return torch.fft.ifftn(torch.fft.fftn(x.double(), dim=axes) * gain, dim=axes).real


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("shape", [(2, 3, 5, 6, 4), (1, 2, 1, 7, 8), (3, 1, 4, 1, 9)])
def test_the_filter_is_its_formula(shape, sigma):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    wanted = torch.stack([filtered(latent, sigma, 3.0) for latent in x])
    torch.testing.assert_close(signal_part(x, sigma, 3.0).double(), wanted, rtol=1e-4, atol=1e-5)
    if shape[2] == 1:  # a picture is a film of one frame
        torch.testing.assert_close(
            signal_part(x[:, :, 0], sigma, 3.0), signal_part(x, sigma, 3.0)[:, :, 0]
        )


SETTINGS = {
    "defaults": {},
    "larger threshold": {"threshold": 1.0},
    "order 0": {"threshold": 1.0, "residual_order": 0, "max_consecutive_cached": 3},
    "guards": {"retention_steps": 4, "cache_end_steps": 3, "threshold": 1.0},
    "no limit, other power": {"max_consecutive_cached": 0, "power_exp": 2.0, "threshold": 0.8},
    "no guards": {"retention_steps": 0, "cache_end_steps": 0, "threshold": 2.0},
}


def upstream() -> Any:
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers.hooks, "SeaCacheConfig"):
        pytest.skip(f"diffusers {diffusers.__version__} has no SeaCache")
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    return diffusers.hooks


def theirs(name: str, config: Any, runs: dict[str, list[dict]]) -> dict[str, tuple[str, list]]:
    """Actions and outputs by context, interleaved."""
    model, _ = tiny.build(name)
    ran: list[int] = []
    model.enable_cache(config)
    last = list(model.blocks)[1]
    last.attn1.register_forward_hook(lambda *_: ran.append(1))
    found: dict[str, tuple[str, list]] = {key: ("", []) for key in runs}
    for i, sigma in enumerate(sigmas()):
        for key, calls in runs.items():
            with model.cache_context(key, step_index=i, sigma=sigma, num_inference_steps=STEPS):
                ran.clear()
                output = tiny.output(model, calls[i])
            actions, outputs = found[key]
            found[key] = (actions + ("C" if ran else "."), [*outputs, output])
    return found


def ours(name: str, config: Any, runs: dict[str, list[dict]], way: str = "eager") -> dict:
    model, _ = tiny.build(name)
    with fastcache.enable(model, config) as cache:
        call_model = WAYS[way](model)
        outputs: dict[str, list] = {key: [] for key in runs}
        for i, sigma in enumerate(sigmas()):
            for key, calls in runs.items():
                with cache.context(key, step_index=i, sigma=sigma, num_inference_steps=STEPS):
                    outputs[key].append(tiny.output(call_model, calls[i]))
        actions = dict.fromkeys(runs, "")
        for record in cache.stats:
            actions[record.context] += "C" if record.action == "compute" else "."
    return {key: (actions[key], outputs[key]) for key in runs}


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_step_is_that_of_diffusers_on_wan(settings):
    hooks, fields = upstream(), SETTINGS[settings]
    for seed in range(3):
        runs = {"cond": video("Wan3D", seed, 0.05), "uncond": video("Wan3D", seed + 9, 0.02)}
        config = hooks.SeaCacheConfig(**fields)
        wanted, found = theirs("Wan3D", config, runs), ours("Wan3D", config, runs)
        for key in runs:
            assert found[key][0] == wanted[key][0], (seed, key)
            for i, (a, b) in enumerate(zip(found[key][1], wanted[key][1], strict=True)):
                assert (a - b).abs().max() <= 1e-5, (seed, key, i)
    assert "." in wanted["cond"][0]


def test_the_configs_fields_and_defaults_are_diffusers():
    from dataclasses import asdict

    theirs, mine = upstream().SeaCacheConfig(), fastcache.SeaCacheConfig()
    assert asdict(theirs) == asdict(mine)
    with fastcache.enable(tiny.build("Wan3D")[0], theirs) as cache:
        assert type(cache.config) is fastcache.SeaCacheConfig


def test_diffusers_own_calls_run_on_fastcache():
    from fastcache.integrations import diffusers as backend

    config, runs = upstream().SeaCacheConfig(1.0), {"cond": video("Wan3D", 0, 0.05)}
    wanted = theirs("Wan3D", config, runs)
    backend.install()
    try:
        model, _ = tiny.build("Wan3D")
        before = type(model), sorted(model.__dict__)
        model.enable_cache(config)
        cache, outputs = backend.cache_of(model), []
        for i, sigma in enumerate(sigmas()):
            with model.cache_context("cond", step_index=i, sigma=sigma, num_inference_steps=STEPS):
                outputs.append(tiny.output(model, runs["cond"][i]))
        assert toys.actions(cache) == wanted["cond"][0] and cache.stats.reused
        assert (
            max(float((a - b).abs().max()) for a, b in zip(outputs, wanted["cond"][1], strict=True))
            <= 1e-5
        )
        model.disable_cache()
        assert "forward" not in model.__dict__ and type(model) is before[0]
    finally:
        backend.uninstall()


# --- beyond it ------------------------------------------------------------------------------------------


def pictures(seed: int = 0) -> list[dict[str, Any]]:
    """Latents [2, 4, 6, 5] that turn slowly."""
    g = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(2, 4, 6, 5, generator=g) for _ in range(2))
    return [
        {
            "hidden_states": math.cos(0.1 * i) * one + math.sin(0.1 * i) * two,
            "timestep": torch.full((2,), 1000.0 * s),
        }
        for i, s in enumerate(sigmas())
    ]


def driven(
    model: Any, config: Any, calls: list[dict], given: Any = None, way: str = "eager"
) -> Any:
    given = sigmas() if given is None else given
    with fastcache.enable(model, config) as cache:
        call_model, outputs = WAYS[way](model), []
        for call, sigma in zip(calls, given, strict=True):
            with cache.context(num_inference_steps=STEPS, sigma=sigma):
                outputs.append(toys.step(call_model, call))
        return toys.actions(cache), outputs, list(cache.stats)


@pytest.mark.parametrize("way", WAYS)
def test_pictures_decide_by_the_mean_over_their_filtered_latents(way):
    calls = pictures()
    threshold, total, before, wanted = 0.4, 0.0, None, ""
    for i, (call, sigma) in enumerate(zip(calls, sigmas(), strict=True)):
        now = [filtered(x[:, None], sigma, 2.0) for x in call["hidden_states"]]
        if before is not None:
            changes = [
                (n - b).abs().mean() / b.abs().mean() for n, b in zip(now, before, strict=True)
            ]
            total += float(sum(changes) / len(changes))
        row = len(wanted) - len(wanted.rstrip("."))
        reuse = 0 < i < STEPS - 1 and row < 2 and total < threshold
        wanted, before = wanted + ("." if reuse else "C"), now
        total = total if reuse else 0.0
    assert 3 < wanted.count(".") < STEPS - 4
    config = fastcache.SeaCacheConfig(threshold, power_exp=2.0)
    actions, outputs, _ = driven(toys.Picture(), config, calls, way=way)
    assert actions == wanted
    if way != "eager":
        eager = driven(toys.Picture(), config, calls)[1]
        for a, b in zip(outputs, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_compiled_model_has_two_programs():
    made: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        made.append(len(made))
        return graph.forward

    model = toys.Picture()
    with fastcache.enable(model, fastcache.SeaCacheConfig(0.4)) as cache:
        compiled = fastcache.compile(model, backend=backend)
        for _ in range(2):
            for call, sigma in zip(pictures(), sigmas(), strict=True):
                with cache.context(num_inference_steps=STEPS, sigma=sigma):
                    toys.step(compiled, call)
            cache.reset()
        assert len(made) == 2 and cache.stats.reused


def test_missing_facts_compute_and_are_said():
    without = [None if 4 <= i < 7 else s for i, s in enumerate(sigmas())]
    actions, _, records = driven(toys.Picture(), fastcache.SeaCacheConfig(9.0), pictures(), without)
    # the first step with a sigma has nothing to compare with
    assert actions == "C..CCCCC..C..C.C"
    assert "no sigma" in records[4].reason and "nothing to compare" in records[7].reason
    config = fastcache.SeaCacheConfig(9.0)
    with pytest.warns(fastcache.FastcacheWarning, match=r"cache.context\(sigma="):
        driven(toys.Picture(), config, pictures(), [None] * STEPS)
    actions, _, records = driven(toys.Picture(), config, pictures(), [1.5, *sigmas()[1:]])
    assert records[0].reason == "first step" and actions[1] == "C"


def test_latents_may_come_from_a_callback_and_differ_in_shape():
    seen: list[Any] = []

    def latents(model, args, kwargs):
        seen.append(model)
        x = kwargs["hidden_states"]
        return None if len(seen) == 6 else [x[0, :, None], x[1, :, None, :3]]

    model = toys.Picture()
    config = fastcache.SeaCacheConfig(9.0, raw_vision_callback=latents)
    actions, _, records = driven(model, config, pictures())
    assert set(map(id, seen)) == {id(model)} and len(seen) == STEPS
    assert actions[:8] == "C..C.CC." and records[5].reason == records[6].reason
    x, y = (pictures()[i]["hidden_states"] for i in (0, 1))
    parts = []
    for cut in (lambda v: v[0, :, None], lambda v: v[1, :, None, :3]):
        a, b = (filtered(cut(v), s, 3.0) for v, s in zip((x, y), sigmas(), strict=False))
        parts.append(float((b - a).abs().mean() / a.abs().mean()))
    assert records[1].signal == pytest.approx(sum(parts) / 2, rel=1e-4)


def test_token_sequences_say_what_is_missing():
    with (
        fastcache.enable(toys.model(), fastcache.SeaCacheConfig()) as cache,
        pytest.raises(ValueError, match="raw_vision_callback"),
        cache.context(sigma=0.5),
    ):
        toys.step(cache.target, toys.inputs()[0])
