# SPDX-License-Identifier: Apache-2.0
"""Step-by-step equality with the hooks of diffusers 0.42.1, and the schedules of its five methods.

Decisions are compared by what really ran: the leaf modules that each step executed, recorded by
forward hooks of the test's own on both sides. Tables of faults list what upstream cannot do; there
the test shows that upstream fails and that the model works here.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import fastcache
from fastcache.configs import CONFIGS, LITE_ACTIVE, LITE_INACTIVE
from fastcache.policies import REUSE, Magnitude, Step
from fastcache.policies.magnitude import resample

diffusers = pytest.importorskip("diffusers")
from diffusers import hooks as upstream  # noqa: E402
from diffusers.hooks import hooks as registry  # noqa: E402

MODELS = tuple(tiny.ENTRIES)
STEPS = 10
APPLY = {
    "FirstBlockCacheConfig": upstream.apply_first_block_cache,
    "TaylorSeerCacheConfig": upstream.apply_taylorseer_cache,
    "PyramidAttentionBroadcastConfig": upstream.apply_pyramid_attention_broadcast,
    "FasterCacheConfig": upstream.apply_faster_cache,
}
NEWEST = hasattr(registry, "CacheContext")  # diffusers 0.42; its contexts hold more than a name
if hasattr(upstream, "apply_mag_cache"):
    APPLY["MagCacheConfig"] = upstream.apply_mag_cache
needs_mag_cache = pytest.mark.skipif(
    "MagCacheConfig" not in APPLY, reason=f"diffusers {diffusers.__version__} has no MagCache"
)


@pytest.fixture(autouse=True)
def quiet():
    """Upstream warns about everything it does."""
    level = logging.getLogger("diffusers").level
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("diffusers").setLevel(level)


class Clock:
    """The timestep of the running step, for the callbacks of both sides."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Ran:
    """Names of the leaf modules that ran, one set per step."""

    def __init__(self, model: nn.Module) -> None:
        self.steps: list[set[str]] = []
        self.handles = [
            m.register_forward_hook(self._note(name))
            for name, m in model.named_modules()
            if not list(m.children())
        ]

    def _note(self, name: str) -> Callable:
        return lambda *_: self.steps[-1].add(name)


def walk(model, calls, clock, enter) -> tuple[list[Tensor], list[set[str]]]:
    """Run a trajectory; `enter(i)` is the context of step i."""
    ran, outputs = Ran(model), []
    for i, call in enumerate(calls):
        clock.now = float(call["timestep"].reshape(-1)[0])
        ran.steps.append(set())
        with enter(i):
            outputs.append(tiny.output(model, call))
    for handle in ran.handles:
        handle.remove()
    return outputs, ran.steps


class Upstream:
    """diffusers' own context around a call, for models with and without CacheMixin."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __enter__(self) -> None:
        self._set(self.name)

    def __exit__(self, *_: object) -> None:
        self._set(None)

    def _set(self, name: str | None) -> None:
        if NEWEST:
            context = None if name is None else registry.CacheContext(name)
            registry._set_cache_context(self.model, context)
        else:
            registry.HookRegistry.check_if_exists_or_initialize(self.model)._set_context(name)


def theirs(name: str, config: Callable, calls: list[dict], names=("cond",)):
    model, clock = tiny.build(name)[0], Clock()
    made = config(diffusers, clock, name)
    APPLY[type(made).__name__](model, made)
    return walk(model, calls, clock, lambda i: Upstream(model, names[i % len(names)]))


def ours(name: str, config: Callable, calls: list[dict], names=("cond",), adapt=None):
    model, clock = tiny.build(name)[0], Clock()
    with fastcache.enable(model, config(fastcache, clock, name), adapter=adapt) as cache:
        outputs, ran = walk(model, calls, clock, lambda i: cache.context(names[i % len(names)]))
        return outputs, ran, list(cache.stats)


def uncached(name: str, calls: list[dict]) -> tuple[list[Tensor], list[set[str]]]:
    model = tiny.build(name)[0]
    return walk(model, calls, Clock(), lambda i: Upstream(model, "cond"))


def calls_of(name: str, steps: int = STEPS) -> list[dict]:
    return tiny.trajectory(name, tiny.build(name)[1], steps)


def compare(name, config, calls, names=("cond",), tolerance=0.0, adapt=None):
    """Equal modules ran and equal outputs; returns the records of our run."""
    expected, their_modules = theirs(name, config, calls, names)
    outputs, our_modules, records = ours(name, config, calls, names, adapt)
    for i, (mine, other) in enumerate(zip(our_modules, their_modules, strict=True)):
        assert mine == other, f"step {i}: only one side ran {sorted(mine ^ other)[:6]}"
    for i, (mine, other) in enumerate(zip(outputs, expected, strict=True)):
        if tolerance:
            assert (mine - other).abs().max() <= tolerance * other.abs().max(), f"step {i}"
        else:
            assert torch.equal(mine, other), f"step {i}"
    return records


def works(name: str, config: Callable, calls: list[dict]) -> list[Any]:
    """What upstream cannot do runs here: modules are skipped, and step 0 is exact."""
    full, everything = uncached(name, calls)
    outputs, ran, records = ours(name, config, calls)
    assert torch.equal(outputs[0], full[0])
    assert all(torch.isfinite(o).all() for o in outputs)
    assert any(r.action == REUSE for r in records)
    skipped = [i for i, r in enumerate(records) if r.action == REUSE]
    assert all(ran[i] < everything[i] for i in skipped), "a reused step skipped nothing"
    assert any(not torch.equal(outputs[i], full[i]) for i in skipped)
    return records


def reused(records: list[Any]) -> list[int]:
    return [r.step for r in records if r.action == REUSE]


def cases(faulty: dict[str, str]) -> list[Any]:
    """All models, those that upstream cannot do marked with its fault."""
    assert set(faulty) <= set(MODELS)
    return [
        pytest.param(n, faulty.get(n), id=f"{n}-{faulty[n]}" if n in faulty else n) for n in MODELS
    ]


def broken(name: str, config: Callable, calls: list[dict]) -> None:
    """The list of faults is true: upstream raises."""
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)):
        theirs(name, config, calls)


# --- FirstBlockCache ----------------------------------------------------------------------------

# thresholds at which these trajectories both compute and reuse, with no decision on the edge
THRESHOLDS = {
    "Flux": 0.3, "Wan3D": 0.1, "CogVideoX": 0.1, "LTX": 0.06, "QwenImage": 0.48,
    "HunyuanVideo": 0.3, "Flux2": 0.8, "SD3": 0.35, "Chroma": 0.3, "SkyReelsV2": 0.1,
    "Latte": 0.06, "PixArt2D": 0.05,
    "DiT2D": 0.15, "Kandinsky5": 0.2, "Lumina2": 0.03,
}  # fmt: skip
STACK_FAULTS = {"Chroma": "F14", "SkyReelsV2": "F14", "Lumina2": "F14", "Latte": "F16"}


def first_block(lib, clock, name):
    return lib.FirstBlockCacheConfig(threshold=THRESHOLDS[name])


@pytest.mark.parametrize(
    "name, fault",
    cases(STACK_FAULTS | {"Flux2": "F18", "SD3": "F18", "Kandinsky5": "F15"}),
)
def test_first_block_cache_equals_upstream(name, fault):
    calls = calls_of(name)
    if fault:
        broken(name, first_block, calls)
    records = works(name, first_block, calls) if fault else compare(name, first_block, calls)
    signals = [r.signal for r in records[1:]]
    threshold = THRESHOLDS[name]
    assert len({r.action for r in records[1:]}) == 2, "both decisions must occur"
    assert all(abs(s / threshold - 1) > 0.01 for s in signals), "a decision lies on the edge"
    assert all((r.action == REUSE) == (r.signal <= threshold) for r in records[1:])


@pytest.mark.parametrize("name", ["Flux", "Wan3D"])
def test_first_block_cache_keeps_contexts_apart_as_upstream(name):
    calls = [c for c in calls_of(name) for _ in range(2)]
    for call in calls[1::2]:
        call["hidden_states"] = call["hidden_states"].flip(0, -1) * 0.9
    records = compare(name, first_block, calls, names=("cond", "uncond"))
    assert {r.context for r in records} == {"cond", "uncond"} and reused(records)


# --- MagCache -----------------------------------------------------------------------------------

WAVY = [1.0, 1.2, 1.02, 0.97, 1.01, 1.03, 0.9, 1.0, 0.99, 1.1]


def magnitude(lib, clock, name):
    return lib.MagCacheConfig(mag_ratios=WAVY, num_inference_steps=STEPS, threshold=0.1)


@needs_mag_cache
@pytest.mark.parametrize("name, fault", cases(STACK_FAULTS | {"Kandinsky5": None}))
def test_mag_cache_equals_upstream(name, fault):
    calls = calls_of(name)
    if fault:
        broken(name, magnitude, calls)
    records = works(name, magnitude, calls) if fault else compare(name, magnitude, calls)
    plan = magnitude(fastcache, None, name).recipe().plan(STEPS)
    assert tuple(r.action for r in records) == plan.actions
    assert 2 <= len(reused(records)) <= 8


@pytest.mark.parametrize("name", ["LTX", "PixArt2D", "DiT2D"])
def test_mag_cache_on_one_block_counts_calls_not_tail_runs(name):
    """F6: with one block upstream's counter stands still on skipped steps."""
    _, inputs = tiny.build(name, depth=1)
    model, _ = tiny.build(name, depth=1)
    with fastcache.enable(model, magnitude(fastcache, None, name)) as cache:
        for call in tiny.trajectory(name, inputs, STEPS):
            with cache.context("cond"):
                tiny.output(model, call)
        actions = tuple(r.action for r in cache.stats)
    assert actions == magnitude(fastcache, None, name).recipe().plan(STEPS).actions


# --- TaylorSeer ---------------------------------------------------------------------------------

# F10: upstream's patterns are full matches ending in attn and hook nothing here
IDLE_BY_DEFAULT = (
    "Wan3D", "CogVideoX", "LTX", "SkyReelsV2", "Latte", "PixArt2D", "DiT2D", "Kandinsky5",
    "Lumina2",
)  # fmt: skip
ANY_ATTENTION = [r".*\battn\d*", r".*\.self_attention", r".*\.cross_attention"]


def taylor_default(lib, clock, name):
    return lib.TaylorSeerCacheConfig()


def taylor_attention(dtype, order):
    def make(lib, clock, name):
        return lib.TaylorSeerCacheConfig(
            cache_identifiers=ANY_ATTENTION,
            cache_interval=3,
            disable_cache_before_step=2,
            disable_cache_after_step=8,
            max_order=order,
            taylor_factors_dtype=dtype,
        )

    return make


def taylor_lite(lib, clock, name):
    return lib.TaylorSeerCacheConfig(use_lite_mode=True, max_order=2, cache_interval=3)


@pytest.mark.parametrize("name", MODELS)
def test_taylor_seer_defaults_equal_upstream_where_those_hook_something(name):
    calls = calls_of(name)
    if name in IDLE_BY_DEFAULT:
        everything = uncached(name, calls)[1]
        assert theirs(name, taylor_default, calls)[1] == everything, "upstream hooks something now"
        records = works(name, taylor_default, calls)
    else:
        records = compare(name, taylor_default, calls)
    assert reused(records) == [3, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "dtype, order",
    [(torch.bfloat16, 1), (torch.float32, 2), (None, 4), (torch.float16, 0), (torch.float64, 3)],
)
@pytest.mark.parametrize("name", MODELS)
def test_taylor_seer_on_named_attention_equals_upstream(name, dtype, order):
    if dtype is None and name in ("SD3", "LTX"):
        order = 3
    records = compare(name, taylor_attention(dtype, order), calls_of(name))
    assert reused(records) == [2, 4, 5, 7]


def test_taylor_seer_skips_named_modules_with_zeros_as_upstream():
    def make(lib, clock, name):
        return lib.TaylorSeerCacheConfig(
            skip_predict_identifiers=[r".*\.ff"], cache_identifiers=[r".*\.attn\d*", r".*\.ff"]
        )

    for name in ("Flux", "CogVideoX"):
        assert reused(compare(name, make, calls_of(name)))


LITE_FAULTS = {"SD3": "F18"}
LITE_IDLE = ("DiT2D", "Kandinsky5", "Lumina2")  # their output projection has another name


@pytest.mark.parametrize("name, fault", cases(LITE_FAULTS))
def test_taylor_seer_lite_mode_equals_upstream(name, fault):
    calls = calls_of(name)
    if fault:
        broken(name, taylor_lite, calls)
    if fault or name in LITE_IDLE:
        records = works(name, taylor_lite, calls)
    else:
        records = compare(name, taylor_lite, calls)
    assert reused(records) == [3, 5, 6, 8, 9]


# --- Pyramid Attention Broadcast ----------------------------------------------------------------


def scaled(name: str, lo: float, hi: float) -> tuple[float, float]:
    return (lo / 1000, hi / 1000) if name in tiny.UNIT_TIMESTEPS else (lo, hi)


def broadcast(lib, clock, name):
    return lib.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=3,
        cross_attention_block_skip_range=4,
        spatial_attention_timestep_skip_range=scaled(name, 100, 850),
        temporal_attention_timestep_skip_range=scaled(name, 50, 750),
        cross_attention_timestep_skip_range=scaled(name, 150, 950),
        current_timestep_callback=clock,
    )


# F19: upstream takes Latte's temporal layers and the text attention of LTX and others for spatial
# ones, and hooks text refiners
MISCLASSED = {
    "LTX": "F19",
    "Latte": "F19",
    "Kandinsky5": "F19",
    "HunyuanVideo": "F19",
    "PixArt2D": "F19",
}


@pytest.mark.parametrize("name, fault", cases(MISCLASSED))
def test_pyramid_attention_broadcast_equals_upstream(name, fault):
    calls = calls_of(name)
    records = works(name, broadcast, calls) if fault else compare(name, broadcast, calls)
    assert reused(records)


def test_pyramid_attention_broadcast_classes_attention_by_what_it_is():
    """F19: temporal layers of Latte, text attention of LTX and PixArt, HunyuanVideo's refiner."""
    expected = {
        "Latte": {
            "spatial": r"transformer_blocks.0.attn1",
            "temporal": "temporal_transformer_blocks.0.attn1",
        },
        "LTX": {"spatial": "transformer_blocks.0.attn1", "cross": "transformer_blocks.0.attn2"},
        "PixArt2D": {
            "spatial": "transformer_blocks.0.attn1",
            "cross": "transformer_blocks.0.attn2",
        },
    }
    for name, kinds in expected.items():
        for kind, module in kinds.items():
            model, clock = tiny.build(name)[0], Clock()
            config = fastcache.PyramidAttentionBroadcastConfig(
                **{f"{kind}_attention_block_skip_range": 2}, current_timestep_callback=clock
            )
            with fastcache.enable(model, config) as cache:
                (hooked,) = cache.hooked().values()
            assert module in hooked
            others = set(kinds.values()) - {module}
            assert not others & set(hooked)
    model, clock = tiny.build("HunyuanVideo")[0], Clock()
    with fastcache.enable(model, broadcast(fastcache, clock, "HunyuanVideo")) as cache:
        (hooked,) = cache.hooked().values()
    assert not [n for n in hooked if "refiner" in n]


# --- contexts of the models themselves ----------------------------------------------------------


@pytest.mark.parametrize("config", [first_block, magnitude, taylor_lite, broadcast])
def test_a_models_own_cache_context_and_reset_drive_the_cache(config):
    calls = calls_of("CogVideoX")
    expected, _, records = ours("CogVideoX", config, calls)
    model, clock = tiny.build("CogVideoX")[0], Clock()
    with fastcache.enable(model, config(fastcache, clock, "CogVideoX")) as cache:
        walk(model, calls[:4], clock, lambda i: model.cache_context("cond"))
        model._reset_stateful_cache()
        late = [
            {**c, "timestep": c["timestep"] - 1} for c in calls
        ]  # no timestep that goes back up
        late[0]["timestep"] = calls[3]["timestep"] - 1
        walk(model, late[:1], clock, lambda i: model.cache_context("cond"))
        assert [r.step for r in cache.stats] == [0, 1, 2, 3, 0]
        model._reset_stateful_cache()
        told = (lambda i: {"step_index": i}) if NEWEST else (lambda i: {})
        outputs, _ = walk(model, calls, clock, lambda i: model.cache_context("cond", **told(i)))
        last = list(cache.stats)[-len(calls) :]
    assert {r.context for r in last} == {"cond"}
    assert [r.action for r in last] == [r.action for r in records]
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


# --- FasterCache --------------------------------------------------------------------------------


def faster_distilled(lib, clock, name):
    return lib.FasterCacheConfig(
        is_guidance_distilled=True,
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=3 if name == "Latte" else None,
        spatial_attention_timestep_skip_range=scaled(name, -1, 681),
        temporal_attention_timestep_skip_range=scaled(name, -1, 681),
        attention_weight_callback=lambda module: 0.3,
        current_timestep_callback=clock,
    )


@pytest.mark.parametrize("name", MODELS)
def test_faster_cache_distilled_equals_upstream(name):
    calls = calls_of(name)
    if name in ("Kandinsky5", "Lumina2"):  # F20: upstream's own patterns hook nothing
        everything = uncached(name, calls)[1]
        assert theirs(name, faster_distilled, calls)[1] == everything
        records = works(name, faster_distilled, calls)
    else:
        records = compare(name, faster_distilled, calls, tolerance=1e-6)
    assert reused(records) == ([4, 5, 7, 8, 9] if name == "Latte" else [5, 7, 9])
    if name == "Latte":  # the temporal layers at interval 3 besides
        assert [sum(a == REUSE for a in r.actions) for r in records] == [
            0,
            0,
            0,
            0,
            1,
            2,
            0,
            2,
            1,
            1,
        ]


GUIDED = {
    "CogVideoX": "BFCHW",
    "Wan3D": "BCFHW",
    "Latte": "BCFHW",
    "DiT2D": "BCHW",
    "PixArt2D": "BCHW",
}


def doubled(name: str, steps: int) -> list[dict]:
    """A batched guidance run: every batched input twice along dimension 0, the text differing."""
    _, inputs = tiny.build(name)
    calls = tiny.trajectory(name, inputs, steps)
    batch = inputs["hidden_states"].shape[0]

    def twice(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or value.shape[0] != batch:
            return value
        other = value
        if key == "encoder_hidden_states":
            other = value.flip(-1) * 0.8
        elif key == "class_labels":
            other = value + 1
        return torch.cat([value, other])

    return [{k: twice(k, v) for k, v in call.items()} for call in calls]


def faster_guided(lib, clock, name):
    return lib.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=2 if name == "Latte" else None,
        tensor_format=GUIDED[name],
        attention_weight_callback=lambda module: 0.3,
        current_timestep_callback=clock,
        _unconditional_conditional_input_kwargs_identifiers=[
            *("hidden_states", "encoder_hidden_states", "timestep", "class_labels"),
            *("attention_mask", "encoder_attention_mask"),
        ],
    )


@pytest.mark.parametrize("name", GUIDED)
def test_faster_cache_with_batched_guidance_equals_upstream(name):
    calls = doubled(name, 12)
    for call in calls:  # a listed None is upstream's fault F28
        for key in [k for k, v in call.items() if v is None]:
            del call[key]
    records = compare(name, faster_guided, calls, ("cond_uncond",), tolerance=1e-5)
    guidance = [r.step for r in records if r.actions[0] == REUSE]
    assert guidance == [6, 7, 8, 9, 11]
    attention = [r.step for r in records if REUSE in r.actions[1:]]
    assert attention == [7, 9, 11]


def test_faster_cache_guidance_on_token_outputs_takes_a_grid():
    """F27: upstream's hooks crash on [batch, tokens, channels]; a grid says what the tokens are."""
    calls = doubled("LTX", 8)
    with pytest.raises((RuntimeError, ValueError)):
        theirs("LTX", lambda lib, clock, name: guided_tokens(lib, clock), calls)
    with pytest.raises(ValueError, match="tensor_format"):
        ours("LTX", lambda lib, clock, name: guided_tokens(lib, clock), calls, ("cond_uncond",))
    model, clock = tiny.build("LTX")[0], Clock()
    where = fastcache.Guidance(tensor_format="BSC", grid=(2, 16, 16))
    recipe = fastcache.Recipe(fastcache.TimestepRange(3, (-1, 900)), fastcache.Reuse(), where)
    with fastcache.enable(model, recipe) as cache:
        outputs, _ = walk(model, calls, clock, lambda i: cache.context("cond"))
        assert [r.step for r in cache.stats if r.action == REUSE] == [1, 2, 4, 5, 7]
    full, _ = uncached("LTX", calls)
    half = len(full[0]) // 2
    for step, (a, b) in enumerate(zip(outputs, full, strict=True)):
        assert torch.allclose(a[half:], b[half:], atol=1e-5), f"conditional half of step {step}"
    # the unconditional half: the conditional one plus the difference of the last full step
    expected = outputs[1][half:] + (full[0][:half] - full[0][half:])
    assert torch.allclose(outputs[1][:half], expected, atol=1e-5)


def guided_tokens(lib, clock):
    return lib.FasterCacheConfig(current_timestep_callback=clock)


# --- schedules: policies alone, no tensors ------------------------------------------------------


def computed(recipe, steps, timesteps=None) -> list[int]:
    return list(recipe.plan(steps, timesteps).computed)


TENTHS = [950, 850, 750, 650, 550, 450, 350, 250, 150, 50]


def row(actions) -> str:
    return "".join("C" if a != REUSE else "r" for a in actions)


@pytest.mark.parametrize(
    "n, timesteps, expected",
    [
        (2, TENTHS, "CCCrCrCrCC"),
        (3, TENTHS, "CCrCrrCrrC"),
        (1, TENTHS, "CCCCCCCCCC"),
        (100, [900, 800, 799, 101, 100, 50], "CCrrCC"),
    ],
)
def test_pyramid_attention_broadcast_schedule(n, timesteps, expected):
    config = fastcache.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=n, current_timestep_callback=lambda: 0
    )
    assert row(config.recipe().plan(len(timesteps), timesteps)) == expected


def test_faster_cache_schedule():
    plan = (
        fastcache.FasterCacheConfig(current_timestep_callback=lambda: 0).recipe().plan(10, TENTHS)
    )
    guidance, attention = plan.rows
    assert row(guidance) == "CCCCrCrrrr"  # r: the conditional half alone
    assert row(attention) == "CCCCCCCrCr"
    distilled = fastcache.FasterCacheConfig(
        is_guidance_distilled=True, current_timestep_callback=lambda: 0
    )
    assert row(distilled.recipe().plan(10, TENTHS)) == "CCCrCrCrCr"


def test_faster_cache_weights_compound():
    """Weights of the two bands: alpha inside its range, 1 outside, multiplied at every skip."""
    config = fastcache.FasterCacheConfig(current_timestep_callback=lambda: 0)
    where = config.recipe().rules[0].where
    low, high, seen = 1.0, 1.0, []
    for action, t in zip(config.recipe().plan(10, TENTHS).rows[0], TENTHS, strict=True):
        if action != REUSE:
            low = high = 1.0
            continue
        low, high = low * where.low(None, t), high * where.high(None, t)
        seen.append((round(low, 3), round(high, 3)))
    assert seen == [(1.1, 1.0), (1.1, 1.0), (1.21, 1.1), (1.331, 1.21), (1.331, 1.331)]


def test_first_block_schedule():
    policy = fastcache.FirstBlockCacheConfig(threshold=0.1).recipe().when
    run, reference, decisions = policy.begin(), None, []
    for i, r in enumerate([1.00, 1.04, 1.08, 1.12, 1.16, 1.20, 1.24]):
        change = None if reference is None else abs(r - reference) / abs(reference)
        decisions.append(policy.decide(run, Step(i), change).action)
        reference = r if decisions[-1] != REUSE else reference
    assert row(decisions) == "CrrCrrC"
    assert policy.decide(policy.begin(), Step(1), 0.1).action == REUSE  # equality reuses


@pytest.mark.parametrize(
    "before, interval, after, expected",
    [
        (3, 5, None, [0, 1, 2, 4, 9, 14, 19, 24, 29]),
        (3, 3, None, [0, 1, 2, 4, 7, 10, 13, 16, 19, 22, 25, 28]),
        (2, 4, None, [0, 1, 3, 7, 11, 15, 19, 23, 27]),
        (1, 3, None, [0, 2, 5, 8, 11, 14, 17, 20, 23, 26, 29]),
        (3, 5, 12, [0, 1, 2, 4, 9, *range(12, 30)]),
    ],
)
def test_taylor_seer_schedule(before, interval, after, expected):
    config = fastcache.TaylorSeerCacheConfig(
        cache_interval=interval, disable_cache_before_step=before, disable_cache_after_step=after
    )
    assert computed(config.recipe(), 30) == expected


@pytest.mark.parametrize(
    "ratios, settings, expected",
    [
        ((1.0,) * 12, {"num_inference_steps": 12}, [0, 1, 5, 9]),
        (fastcache.FLUX_MAG_RATIOS, {}, [*range(6), 7, 9, 13, 17, 21, 24, 26, 27]),
        (fastcache.FLUX_MAG_RATIOS, {"threshold": 0.12}, [*range(6), 8, 11, 15, 19, 23, 26]),
        (
            fastcache.FLUX_MAG_RATIOS,
            {"threshold": 0.24, "max_skip_steps": 5, "retention_ratio": 0.1},
            [0, 1, 2, 5, 9, 15, 21, 26],
        ),
        (fastcache.FLUX_MAG_RATIOS, {"num_inference_steps": 10}, [0, 1, 3, 6, 9]),
        (
            fastcache.FLUX_MAG_RATIOS,
            {"num_inference_steps": 50},
            [*range(10), 11, 13, 15, 17, 19, 23, 27, 31, 35, 39, 42, 44, *range(46, 50)],
        ),
    ],
)
def test_mag_cache_schedule(ratios, settings, expected):
    config = fastcache.MagCacheConfig(mag_ratios=list(ratios), **settings)
    assert computed(config.recipe(), config.num_inference_steps) == expected


def test_mag_cache_accumulated_errors():
    """The trace of the specification: ratio, error and the step that pays for it."""
    policy = fastcache.MagCacheConfig(mag_ratios=list(fastcache.FLUX_MAG_RATIOS)).recipe().when
    run = policy.begin(28)
    decisions = {i: policy.decide(run, Step(i, 28)) for i in range(28)}
    expected = {6: 0.03125, 7: 0.1028, 8: 0.0234, 9: 0.0789, 10: 0.0234, 11: 0.0269, 12: 0.0460}
    assert {i: decisions[i].signal for i in expected} == pytest.approx(expected, abs=6e-5)
    assert row(decisions[i].action for i in range(6, 14)) == "rCrCrrrC"


@needs_mag_cache
@pytest.mark.parametrize(
    "length, count", [(28, 10), (4, 9), (28, 50), (7, 1), (50, 28), (3, 30), (1, 4)]
)
def test_resampled_ratios_equal_upstream(length, count):
    values = torch.linspace(0.5, 1.5, length)
    theirs = upstream.mag_cache.nearest_interp(values, count)
    assert resample(tuple(values.tolist()), count) == tuple(theirs.tolist())


@needs_mag_cache
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, "float64"])
def test_mag_cache_decides_in_the_dtype_of_its_ratios(kind):
    """tensor(0.1) <= 0.1 holds in float32, not in float64: the host repeats that rounding."""
    values = [1.0, 1.0, 0.9, 1.0, 1.1, 1.0, 1.0, 1.0, 0.95, 1.05]
    ratios = torch.tensor(values, dtype=torch.float64) if kind == "float64" else kind(values)
    settings = {"num_inference_steps": 10, "retention_ratio": 0.0, "threshold": 0.1}
    calls, make = (
        calls_of("PixArt2D"),
        lambda lib, *_: lib.MagCacheConfig(mag_ratios=ratios, **settings),
    )
    records = compare("PixArt2D", make, calls)
    plan = make(fastcache).recipe().plan(10)
    assert tuple(r.action for r in records) == plan.actions and reused(records)
    assert Magnitude(mag_ratios=values).precision == "float32"
    assert make(fastcache).recipe().when.precision == (
        "float64" if kind == "float64" else "float32"
    )


# --- fields and defaults ------------------------------------------------------------------------


@pytest.mark.skipif(not NEWEST, reason="fields and defaults are those of diffusers 0.42.1")
@pytest.mark.parametrize("name", APPLY)
def test_configs_have_upstreams_fields_and_defaults(name):
    needed = {"mag_ratios": [1.0]} if name == "MagCacheConfig" else {}
    mine, other = CONFIGS[name](**needed), getattr(diffusers, name)(**needed)
    assert [f.name for f in fields(mine)] == [f.name for f in fields(other)]
    assert list(inspect.signature(CONFIGS[name]).parameters) == [f.name for f in fields(other)]
    for f in fields(other):
        a, b = getattr(mine, f.name), getattr(other, f.name)
        if f.name == "mag_ratios":
            assert torch.equal(a, b)
        else:
            assert a == b and type(a) is type(b), f.name


def test_lite_mode_has_upstreams_patterns():
    assert list(LITE_ACTIVE) == list(upstream.taylorseer_cache._PROJ_OUT_IDENTIFIERS)
    assert list(LITE_INACTIVE) == list(upstream.taylorseer_cache._BLOCK_IDENTIFIERS)


@needs_mag_cache
def test_flux_ratios_equal_upstreams():
    published = upstream.mag_cache.FLUX_MAG_RATIOS
    assert torch.equal(torch.tensor(fastcache.FLUX_MAG_RATIOS), published)
    assert math.isclose(sum(fastcache.FLUX_MAG_RATIOS), float(published.sum()), rel_tol=1e-6)


@pytest.mark.parametrize("name", APPLY)
def test_upstreams_own_config_object_is_taken_and_not_written_to(name):
    """F12: upstream writes into the caller's config."""
    clock = Clock()
    needed = {"mag_ratios": torch.ones(4)} if name == "MagCacheConfig" else {}
    if name in ("PyramidAttentionBroadcastConfig", "FasterCacheConfig"):
        needed["current_timestep_callback"] = clock
    given = getattr(diffusers, name)(**needed)
    before = {f.name: getattr(given, f.name) for f in fields(given)}
    with fastcache.enable(tiny.build("CogVideoX")[0], given) as cache:
        assert type(cache.config) is CONFIGS[name]
    for key, value in before.items():
        assert getattr(given, key) is value
