# SPDX-License-Identifier: Apache-2.0
"""Every field of every config: changing it changes something, and a bad value is refused by name.

Then a fuzzer: thousands of random configs either work on a toy model or are refused by name.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import toys
from torch import Tensor, nn

import fastcache
from fastcache.configs import CONFIGS
from fastcache.signals import Signal

METHODS = {
    "FirstBlockCacheConfig": "first_block",
    "MagCacheConfig": "mag_cache",
    "TaylorSeerCacheConfig": "taylor_seer",
    "PyramidAttentionBroadcastConfig": "pyramid",
    "FasterCacheConfig": "faster_guided",
    "TeaCacheConfig": "tea",
    "EasyCacheConfig": "easy",
    "SeaCacheConfig": "sea",
    "SenCacheConfig": "sen",
    "DBCacheConfig": "db",
}


class CrossAttention(toys.Attention):
    is_cross_attention = True


class Norm(nn.Module):
    """What TeaCache looks at."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:]) * (1 + emb)


for model in ("Film", "Small"):
    row = fastcache.Block(modulation=("norm", "emb", "hidden_states"))
    fastcache.register_adapter(model, fastcache.BlockAdapter(block=row))


class Kinds(toys.Block):
    """Spatial, cross and temporal attention in one block."""

    def __init__(self) -> None:
        super().__init__()
        self.attn2, self.temporal_attn, self.norm = CrossAttention(), toys.Attention(), Norm()

    def forward(self, hidden_states, encoder_hidden_states=None):  # type: ignore[override]
        hidden = hidden_states + self.change(hidden_states)
        hidden = hidden + 0.5 * self.attn2(hidden, encoder_hidden_states)
        return hidden + 0.5 * self.temporal_attn(hidden.flip(1))


class Film(toys.Picture):
    """Pictures, with a list of spatial blocks and one of temporal ones."""

    def __init__(self) -> None:
        super().__init__(block=Kinds, lists=("blocks", "temporal_transformer_blocks"), depth=2)


STEPS = 10
# settings under which every field matters; guidance comes batched
BASE: dict[str, dict[str, Any]] = {
    "FirstBlockCacheConfig": {"threshold": 0.02},
    "MagCacheConfig": {"mag_ratios": toys.RATIOS, "num_inference_steps": STEPS, "threshold": 0.1},
    "TaylorSeerCacheConfig": {"cache_interval": 3, "cache_identifiers": [r"blocks\.\d\.attn"]},
    "PyramidAttentionBroadcastConfig": {
        "spatial_attention_block_skip_range": 2,
        "temporal_attention_block_skip_range": 3,
        "cross_attention_block_skip_range": 4,
        "temporal_attention_block_identifiers": ("temporal",),
        "spatial_attention_block_identifiers": (r"^blocks\.\d\.attn$",),
    },
    "FasterCacheConfig": {
        "spatial_attention_block_skip_range": 2,
        "temporal_attention_block_skip_range": 3,
        "spatial_attention_block_identifiers": (r"^blocks\.\d\.attn$",),
        "temporal_attention_block_identifiers": ("temporal_attn",),
        "tensor_format": "BCHW",
        "unconditional_batch_skip_range": 3,
    },
    "TeaCacheConfig": {"threshold": 0.6, "coefficients": (1, 0), "num_inference_steps": STEPS},
    "EasyCacheConfig": {"threshold": 0.4, "warmup": 2, "token_stride": 4},
    "SeaCacheConfig": {"threshold": 0.35},
    "SenCacheConfig": {"threshold": 6.0, "alpha_x": 0.5, "alpha_t": 0.001},
    "DBCacheConfig": {
        "Fn_compute_blocks": 1,
        "residual_diff_threshold": 0.5,
        "max_warmup_steps": 3,
        "warmup_interval": 2,
        "max_cached_steps": 4,
        "max_continuous_cached_steps": 2,
        "force_refresh_step_hint": 4,
    },
}
# field -> another value that must be seen in what happens
OTHER: dict[str, dict[str, Any]] = {
    "FirstBlockCacheConfig": {"threshold": 0.06},
    "MagCacheConfig": {
        "threshold": 0.02,
        "max_skip_steps": 1,
        "retention_ratio": 0.5,
        "num_inference_steps": 7,
        "mag_ratios": [1.0, 1.3] + [1.05] * 8,
        "calibrate": True,
    },
    "TaylorSeerCacheConfig": {
        "cache_interval": 2,
        "disable_cache_before_step": 5,
        "disable_cache_after_step": 6,
        "max_order": 2,
        "taylor_factors_dtype": torch.float32,
        "skip_predict_identifiers": [r"blocks\.1\.ff"],
        "cache_identifiers": [r"blocks\.\d\.ff"],
        "use_lite_mode": True,
    },
    "PyramidAttentionBroadcastConfig": {
        "spatial_attention_block_skip_range": 3,
        "temporal_attention_block_skip_range": 2,
        "cross_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (100, 600),
        "temporal_attention_timestep_skip_range": (100, 500),
        "cross_attention_timestep_skip_range": (100, 500),
        "spatial_attention_block_identifiers": (r"^blocks\.1\.attn$",),
        "temporal_attention_block_identifiers": (r"^blocks.*temporal",),
        "cross_attention_block_identifiers": (r"^blocks\.1",),
        "current_timestep_callback": lambda: 50.0,
    },
    "FasterCacheConfig": {
        "spatial_attention_block_skip_range": 3,
        "temporal_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 300),
        "temporal_attention_timestep_skip_range": (-1, 300),
        "low_frequency_weight_update_timestep_range": (99, 300),
        "high_frequency_weight_update_timestep_range": (-1, 600),
        "alpha_low_frequency": 1.3,
        "alpha_high_frequency": 1.3,
        "unconditional_batch_skip_range": 2,
        "unconditional_batch_timestep_skip_range": (-1, 300),
        "spatial_attention_block_identifiers": (r"^blocks\.1\.attn$",),
        "temporal_attention_block_identifiers": (r"^blocks.*temporal_attn",),
        "attention_weight_callback": lambda module: 0.1,
        "low_frequency_weight_callback": lambda module: 0.7,
        "high_frequency_weight_callback": lambda module: 0.7,
        "tensor_format": "BCFHW",
        "is_guidance_distilled": True,
        "current_timestep_callback": lambda: 990.0,
        "_unconditional_conditional_input_kwargs_identifiers": ["hidden_states", "timestep"],
    },
    "TeaCacheConfig": {
        "threshold": 0.3,
        "coefficients": (2.0, 0.0),
        "num_inference_steps": 7,
        "retention_steps": 5,
        "last": False,
    },
    "EasyCacheConfig": {
        "threshold": 0.1,
        "warmup": 5,
        "token_stride": 1,
        "start": 0.6,
        "stop": 0.5,
    },
    "SeaCacheConfig": {
        "threshold": 0.8,
        "residual_order": 0,
        "retention_steps": 4,
        "cache_end_steps": 3,
        "max_consecutive_cached": 1,
        "power_exp": 0.2,
        "raw_vision_callback": lambda model, args, kwargs: None,
    },
    "SenCacheConfig": {"threshold": 2.0, "alpha_x": 2.0, "alpha_t": 0.02},
    "DBCacheConfig": {
        "Fn_compute_blocks": 2,
        "Bn_compute_blocks": 1,
        "residual_diff_threshold": 0.02,
        "max_accumulated_residual_diff_threshold": 0.01,
        "max_warmup_steps": 1,
        "warmup_interval": 1,
        "max_cached_steps": 1,
        "max_continuous_cached_steps": 1,
        "enable_separate_cfg": True,
        "cfg_compute_first": True,
        "cfg_diff_compute_separate": True,
        "num_inference_steps": 7,
        "steps_computation_mask": [1, 0],
        "steps_computation_policy": "static",
        "force_refresh_step_hint": 6,
        "force_refresh_step_policy": "repeat",
    },
}
# taken, since branches are told apart by themselves
INERT = {"enable_separate_cfg", "cfg_compute_first", "cfg_diff_compute_separate"}
# field -> others without which it says nothing
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("DBCacheConfig", "steps_computation_policy"): {
        "steps_computation_mask": [1, 1, 0, 0, 1, 0],
        "num_inference_steps": STEPS,
        "residual_diff_threshold": 0.06,
    },
    ("DBCacheConfig", "num_inference_steps"): {
        "steps_computation_mask": [1, 1, 0, 0, 1, 0],
        "steps_computation_policy": "static",
        "num_inference_steps": STEPS,
    },
}


def made(name: str, clock: toys.Clock, **changes: Any) -> Any:
    settings = {**BASE[name], **changes}
    if "current_timestep_callback" in {f.name for f in fields(CONFIGS[name])}:
        settings.setdefault("current_timestep_callback", clock)
    return CONFIGS[name](**settings)


def length(name: str) -> int | None:
    """Steps that the context tells: those configs that have a field for it are left to themselves."""
    return None if "num_inference_steps" in {f.name for f in fields(CONFIGS[name])} else STEPS


def observed(name: str, **changes: Any) -> tuple[Any, ...]:
    """All that a user can see of a run: outputs, decisions, what is hooked, an error."""
    clock, target = toys.Clock(), Film()
    try:
        with fastcache.enable(target, made(name, clock, **changes)) as cache:
            context = {"num_inference_steps": length(name), "sigma": 0.5}
            calls = toys.inputs_for("faster_guided")
            outputs = toys.run(cache, target, calls, clock, **context)
            actions = [r.actions for r in cache.stats]
            return actions, cache.hooked(), [o.tolist() for o in outputs]
    except (ValueError, RuntimeError) as error:
        return (str(error),)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_tables_hold_every_field(name):
    assert set(OTHER[name]) == {f.name for f in fields(CONFIGS[name])} == set(BAD[name])


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    return {name: observed(name) for name in CONFIGS}


@pytest.mark.parametrize("name, field", [(name, field) for name in OTHER for field in OTHER[name]])
def test_changing_a_field_changes_what_happens(name, field, bases):
    beside = BESIDE.get((name, field), {})
    base = observed(name, **beside) if beside else bases[name]
    assert len(base) == 3, base
    assert any("reuse" in actions for actions in base[0])
    now = observed(name, **{**beside, field: OTHER[name][field]})
    if field in INERT:
        assert now == base
        return
    if field == "tensor_format":
        assert len(now) == 1 and "tensor_format" in now[0]
        return
    if field == "_unconditional_conditional_input_kwargs_identifiers":
        assert len(now) == 1, "the text keeps its full batch, so the model itself refuses"
        return
    assert len(now) == 3, now
    assert now != base
    changed = [a != b for a, b in zip(now, base, strict=True)]
    if "range" in field or "step" in field or field.endswith("_interval"):
        weights = ("low_frequency_weight_update", "high_frequency_weight_update")
        assert changed[0] or field.startswith(weights), "the schedule changes"
    if "identifiers" in field:
        assert changed[1], "other modules are hooked"
    values = ("alpha_low", "alpha_high", "weight", "max_order", "taylor_factors", "residual_order")
    if any(word in field for word in values):
        assert changed == [False, False, True], "the same schedule, other values"


# --- bad values ------------------------------------------------------------------------------------

NOT_NUMBERS: list[Any] = ["2", "", b"2", [1], {}, object(), 1j, torch.ones(2), np.ones(3)]
WHOLE: list[Any] = [0, -1, 1.5, math.nan, math.inf, True, torch.tensor(1.5), *NOT_NUMBERS]
NUMBER: list[Any] = [math.nan, math.inf, -math.inf, True, 10**400, None, *NOT_NUMBERS]
THRESHOLD = [-1e-9, -1, math.nan, -math.inf, True, 10**400, None, *NOT_NUMBERS]
RANGE: list[Any] = [
    (5, 1), (1, 1), (1,), (1, 2, 3), (), (math.nan, 5), (0, math.nan), (0, math.inf), (-math.inf, 5),
    "ab", None, 5, ("a", "b"), (None, 5), ((1, 2), 3), True, {1, 2, 3}, object(),
]  # fmt: skip
NAMES: list[Any] = [
    "attn", b"attn", 5, [5], [None], ["("], ["a", "*"], ["[z-a]"], ["a{99999999999999}"],
    ["(" * 4000 + ")" * 4000], {"a": 1}, {"a"}, object(), True,
]  # fmt: skip
CALLBACK = [5, "now", [], True, torch.ones(1)]
BOOL = ["True", "", 1, 0, None, "no", 1.0, np.bool_(True), torch.tensor(True)]
BAD: dict[str, dict[str, list[Any]]] = {
    "FirstBlockCacheConfig": {"threshold": THRESHOLD},
    "MagCacheConfig": {
        "threshold": THRESHOLD,
        "max_skip_steps": [w for w in WHOLE if w is not WHOLE[0]] + [None],
        "retention_ratio": [-0.1, 1.01, *NUMBER],
        "num_inference_steps": [*WHOLE, None],
        "mag_ratios": [
            None, [], (), torch.tensor([]), "1,2", b"12", 1.0, {1: 1.0}, [1.0, 0.0], [1.0, -1.0],
            [1.0, math.nan], [math.inf], [1.0, "2"], [1.0, None], [[1.0, 2.0]], [True], [10**400],
            torch.ones(2, 2), torch.tensor(1.0), np.array(1.0), torch.tensor([1.0, math.nan]),
            torch.ones(3, dtype=torch.complex64), iter([1.0]), object(),
        ],
        "calibrate": BOOL,
    },
    "TaylorSeerCacheConfig": {
        "cache_interval": [*WHOLE, None],
        "disable_cache_before_step": [*WHOLE, None],
        "disable_cache_after_step": [w for w in WHOLE if w is not WHOLE[0]] + [0, 2],
        "max_order": [-1, 5, *(w for w in WHOLE if w is not WHOLE[0]), None],
        "taylor_factors_dtype": [
            "float32", float, torch.int8, torch.int64, torch.bool, torch.complex64, 32, np.float32,
        ],
        "skip_predict_identifiers": NAMES,
        "cache_identifiers": NAMES,
        "use_lite_mode": BOOL,
    },
    "PyramidAttentionBroadcastConfig": {
        **{f"{k}_attention_block_skip_range": WHOLE for k in ("spatial", "temporal", "cross")},
        **{f"{k}_attention_timestep_skip_range": RANGE for k in ("spatial", "temporal", "cross")},
        **{
            f"{k}_attention_block_identifiers": [*NAMES, None]
            for k in ("spatial", "temporal", "cross")
        },
        "current_timestep_callback": CALLBACK,
    },
    "FasterCacheConfig": {
        "spatial_attention_block_skip_range": [*WHOLE, None],
        "temporal_attention_block_skip_range": WHOLE,
        "spatial_attention_timestep_skip_range": RANGE,
        "temporal_attention_timestep_skip_range": RANGE,
        "low_frequency_weight_update_timestep_range": RANGE,
        "high_frequency_weight_update_timestep_range": RANGE,
        "alpha_low_frequency": NUMBER,
        "alpha_high_frequency": NUMBER,
        "unconditional_batch_skip_range": [*WHOLE, None],
        "unconditional_batch_timestep_skip_range": RANGE,
        "spatial_attention_block_identifiers": [*NAMES, None],
        "temporal_attention_block_identifiers": [*NAMES, None],
        "attention_weight_callback": CALLBACK,
        "low_frequency_weight_callback": CALLBACK,
        "high_frequency_weight_callback": CALLBACK,
        "tensor_format": ["BHWC", "bchw", "", None, 5, [], ("BCHW",)],
        "is_guidance_distilled": BOOL,
        "current_timestep_callback": CALLBACK,
        "_unconditional_conditional_input_kwargs_identifiers": [*NAMES, None],
    },
    "TeaCacheConfig": {
        "threshold": THRESHOLD,
        "coefficients": [
            (), [], "flax", "", b"12", 1.0, {1: 1.0}, {1.0}, (1.0, math.nan), (math.inf,), ("1",), (None,),
            (True,), [[1.0]], object(), iter([1.0]),
        ],
        "num_inference_steps": WHOLE,
        "retention_steps": [w for w in WHOLE if w is not WHOLE[0]] + [None],
        "last": BOOL,
    },
    "EasyCacheConfig": {
        "threshold": THRESHOLD,
        "warmup": [w for w in WHOLE if w is not WHOLE[0]] + [None],
        "token_stride": [*WHOLE, None],
        "start": [-0.1, 1.0, 1.5, *NUMBER],
        "stop": [-0.1, 0.0, 1.01, *NUMBER],
    },
    "SeaCacheConfig": {
        "threshold": [math.inf, *THRESHOLD],
        "residual_order": [2, *(w for w in WHOLE if w is not WHOLE[0]), None],
        "retention_steps": [w for w in WHOLE if w is not WHOLE[0]] + [None],
        "cache_end_steps": [w for w in WHOLE if w is not WHOLE[0]] + [None],
        "max_consecutive_cached": [w for w in WHOLE if w is not WHOLE[0]] + [None],
        "power_exp": [0, -1.0, *NUMBER],
        "raw_vision_callback": CALLBACK,
    },
    "SenCacheConfig": {
        "threshold": THRESHOLD,
        "alpha_x": [-0.1, *NUMBER],
        "alpha_t": [-0.1, *NUMBER],
    },
    "DBCacheConfig": {
        "Fn_compute_blocks": [*WHOLE, None],
        "Bn_compute_blocks": [w for w in WHOLE if w is not WHOLE[0]] + [None],
        "residual_diff_threshold": THRESHOLD,
        "max_accumulated_residual_diff_threshold": [t for t in THRESHOLD if t is not None],
        "max_warmup_steps": [w for w in WHOLE if w is not WHOLE[0]] + [None],
        "warmup_interval": [*WHOLE, None],
        "max_cached_steps": [-2, 1.5, math.nan, True, None, *NOT_NUMBERS],
        "max_continuous_cached_steps": [-2, 1.5, math.nan, True, None, *NOT_NUMBERS],
        "enable_separate_cfg": [b for b in BOOL if b is not None],
        "cfg_compute_first": BOOL,
        "cfg_diff_compute_separate": [False, *BOOL],
        "num_inference_steps": WHOLE,
        "steps_computation_mask": [
            [], (), "101", b"12", 1, [2], [0.5], [None], [math.nan], ["1"], object(), [[1, 0]],
        ],
        "steps_computation_policy": ["", "Dynamic", None, 1, b"static", ["static"]],
        "force_refresh_step_hint": WHOLE,
        "force_refresh_step_policy": ["", "Once", None, 1, b"repeat", ["repeat"]],
    },
}  # fmt: skip


@pytest.mark.parametrize("name, field", [(name, field) for name in BAD for field in BAD[name]])
def test_a_bad_value_is_refused_and_its_field_named(name, field):
    """At construction, and at `enable` where it was assigned afterwards."""
    clock, target = toys.Clock(), Film()
    before = toys.snapshot(target)
    assert len(BAD[name][field]) >= 5
    for bad in BAD[name][field]:
        with pytest.raises((TypeError, ValueError)) as caught:
            made(name, clock, **{field: bad})
        assert field in str(caught.value), f"{bad!r}: {caught.value}"
        late = made(name, clock)
        setattr(late, field, bad)
        with pytest.raises((TypeError, ValueError)) as caught:
            fastcache.enable(target, late)
        assert field in str(caught.value), f"{bad!r}: {caught.value}"
        assert len(str(caught.value)) < 20_000
    assert toys.snapshot(target) == before


GOOD = [
    ("FirstBlockCacheConfig", "threshold", [0, 0.0, 5, math.inf, np.float32(0.1), torch.tensor(0.1)]),
    ("MagCacheConfig", "threshold", [0, math.inf, np.float64(0.1)]),
    ("MagCacheConfig", "retention_ratio", [0.0, 0, 1, 1.0, np.float32(0.5)]),
    ("MagCacheConfig", "max_skip_steps", [0, 1, 10**9, np.int64(3), torch.tensor(3)]),
    ("MagCacheConfig", "num_inference_steps", [1, 2, 1000, np.int32(7)]),
    (
        "MagCacheConfig",
        "mag_ratios",
        [[1], (1.0, 2), torch.ones(3), torch.ones(3).double(), torch.ones(3).bfloat16(), np.ones(5),
         np.ones(4, dtype=np.float32), torch.ones(3, dtype=torch.int64), range(1, 5)],
    ),
    ("TaylorSeerCacheConfig", "disable_cache_after_step", [None, 3, 1000, np.int64(5)]),
    ("TaylorSeerCacheConfig", "max_order", [0, 1, 2, 3, 4]),
    (
        "TaylorSeerCacheConfig",
        "taylor_factors_dtype",
        [None, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2],
    ),
    ("TaylorSeerCacheConfig", "cache_identifiers", [None, [], (r".*attn",), [r".*attn", "nothing"]]),
    ("PyramidAttentionBroadcastConfig", "spatial_attention_timestep_skip_range", [[1, 2.5], (-5, 5)]),
    ("FasterCacheConfig", "alpha_low_frequency", [0, -1.0, 2, np.float32(1.1)]),
    ("FasterCacheConfig", "unconditional_batch_skip_range", [1, 10**9]),
    ("TeaCacheConfig", "threshold", [0, math.inf, np.float32(0.1)]),
    ("TeaCacheConfig", "coefficients", [(1, 0), [0.5], "flux", "wan2.1-t2v-14b", (np.float64(1), 0)]),
    ("TeaCacheConfig", "retention_steps", [0, 5, np.int64(2)]),
    ("EasyCacheConfig", "stop", [0.5, 1, np.float32(0.75)]),
    ("EasyCacheConfig", "token_stride", [1, 7, 10**6]),
    ("SeaCacheConfig", "threshold", [0, 5.0]),
    ("SenCacheConfig", "threshold", [0, math.inf]),
]  # fmt: skip


@pytest.mark.parametrize("name, field, values", GOOD)
def test_a_good_value_works(name, field, values):
    for value in values:
        clock, target = toys.Clock(), Film()
        with fastcache.enable(target, made(name, clock, **{field: value})) as cache:
            outputs = toys.run(cache, target, toys.inputs_for("faster_guided"), clock)
            assert all(torch.isfinite(o).all() for o in outputs)


def test_an_unknown_field_is_refused_and_named():
    for name in CONFIGS:
        with pytest.raises(TypeError, match="treshold"):
            CONFIGS[name](treshold=0.1)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"config": None}, "config"),
        ({"config": 5}, "config"),
        ({"config": "FirstBlockCacheConfig"}, "config"),
        ({"config": fastcache.FirstBlockCacheConfig}, "config"),
        ({"config": fastcache.FirstBlock(0.1)}, "config"),
        ({"config": {"threshold": 0.1}}, "config"),
        ({"target": None}, "target"),
        ({"target": 5}, "target"),
        ({"target": object()}, "target"),
        ({"target": toys.Model}, "target"),
        ({"adapter": "blocks"}, "adapter"),
        ({"adapter": ("blocks",)}, "adapter"),
        ({"backend": "gpu"}, "backend"),
        ({"backend": None}, "backend"),
        ({"backend": ["cpp"]}, "backend"),
        ({"process_group": "world"}, "process_group"),
        ({"ranks": "last"}, "ranks"),
    ],
)
def test_bad_arguments_of_enable(change, named):
    given = {"target": toys.Model(), "config": fastcache.FirstBlockCacheConfig(), **change}
    with pytest.raises((TypeError, ValueError), match=named):
        fastcache.enable(given.pop("target"), given.pop("config"), **given)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"when": 5}, "when"),
        ({"when": fastcache.Reuse()}, "when"),
        ({"when": None}, "when"),
        ({"what": 5}, "what"),
        ({"what": fastcache.Taylor}, "what"),
        ({"where": "blocks"}, "where"),
        ({"what": fastcache.Zeros()}, "what"),
        ({"where": fastcache.Modules(("attn",))}, "where"),
    ],
)
def test_bad_arguments_of_a_recipe(change, named):
    with pytest.raises((TypeError, ValueError), match=named):
        fastcache.Recipe(**{"when": fastcache.FirstBlock(0.1), **change})


CONTEXT = {
    "name": ["", None, 5, b"cond", ["cond"]],
    "step_index": [-1, 1.5, math.nan, "0", True, 10, torch.tensor(0.5), [0]],
    "num_inference_steps": [0, -1, 2.5, "10", True, torch.ones(2)],
    "timestep": [math.nan, math.inf, "900", [900], torch.tensor([]), torch.tensor(math.nan), True],
    "sigma": [math.nan, "1", [1.0]],
    "request": [[], {}, set()],
}


@pytest.mark.parametrize("argument", CONTEXT)
def test_bad_arguments_of_a_context(argument):
    with fastcache.enable(toys.Model(), fastcache.FirstBlockCacheConfig()) as cache:
        for bad in CONTEXT[argument]:
            given = {argument: bad}
            if argument == "step_index":
                given["num_inference_steps"] = 10
            with pytest.raises((TypeError, ValueError), match=argument), cache.context(**given):
                pass
        with cache.context("a", step_index=np.int64(3), num_inference_steps=torch.tensor(4)):
            toys.step(cache.target, toys.inputs()[0])
        assert next(iter(cache.stats)).step == 3


MAGNITUDE = partial(fastcache.Magnitude, mag_ratios=(1.0,))
POLICIES = [
    (fastcache.Interval, "n", [0, -1, 0.5, math.inf, math.nan, None, "2", True]),
    (fastcache.Interval, "phase", [-1, 1.5, "2"]),
    (fastcache.Interval, "stop", [-1, 1.5, "2"]),
    (fastcache.Interval, "warmup", [-1, 1.5, "2", True]),
    (fastcache.Interval, "max_skips", [-1, 1.5, "2"]),
    (fastcache.Interval, "last", [1, "yes", 0.0]),
    (fastcache.TimestepRange, "timesteps", [(5, 1), (1,), "ab", None]),
    (fastcache.Mask, "compute", [[], "101", [2], [None], 5, ["a"]]),
    (fastcache.Widening, "window", [0.5, math.nan, math.inf, "2", None, True]),
    (fastcache.Widening, "flex", [-0.1, math.nan, math.inf, "2", None, True]),
    (fastcache.Fitted, "keep", [0, 8, 1.5, "3", None]),
    (
        fastcache.Fitted,
        "rows",
        [
            "rows",
            5,
            None,
            [5],
            [(3, (2, 1), (1.0,))],
            [(3, (1, 2), (1.0, 0.0))],
            [(3, (3,), (1.0,))],
            [(9, (8, 7, 6, 5), (1.0,) * 4)],
            [(3, (2,), (math.nan,))],
            [(3, (2,), ("1",))],
            [(0, (), ())],
        ],
    ),
    (fastcache.FirstBlock, "threshold", [-1, math.nan, "0.1", None]),
    (fastcache.FirstBlock, "per_sample", [1, None]),
    (fastcache.Misfit, "threshold", [-1, math.nan, "0.1", None]),
    (fastcache.Broadcast, "timesteps", [(), "ab", 5, (math.nan,)]),
    (fastcache.InputChange, "threshold", [-1, math.nan, "0.1", None]),
    (fastcache.InputChange, "coefficients", [(), "flux", 1.0, (math.nan,), ("1",)]),
    (fastcache.InputChange, "at", ["first_block", None, ["block_input"]]),
    (partial(fastcache.InputChange, at="model_input"), "power", [0, -1, math.nan, "3"]),
    (fastcache.InputChange, "power", [3.0]),
    (partial(fastcache.InputChange, at="model_input", power=3.0), "latents", [5, "now"]),
    (fastcache.InputChange, "latents", [lambda *a: None]),
    (fastcache.InputChange, "num_inference_steps", [0, 1.5, "9"]),
    (fastcache.InputChange, "end_steps", [-1, 1.5, None]),
    (fastcache.InputChange, "per_sample", [1, None]),
    (fastcache.OutputSlope, "threshold", [-1, math.nan, "0.1", None]),
    (fastcache.OutputSlope, "token_stride", [0, 1.5, None]),
    (fastcache.OutputSlope, "start", [-0.1, 1.0, None]),
    (fastcache.OutputSlope, "stop", [0, 1.1, None]),
    (fastcache.OutputSlope, "per_sample", [1, None]),
    (fastcache.Sensitivity, "threshold", [-1, math.nan, "0.1", None]),
    (fastcache.Sensitivity, "alpha_x", [-1, math.nan, None]),
    (fastcache.Sensitivity, "alpha_t", [-1, math.inf, None]),
    (fastcache.Sensitivity, "per_sample", [1, None]),
    (partial(fastcache.Broadcast, (500,)), "steps", [0, 1.5, None]),
    (MAGNITUDE, "threshold", [-1, math.nan, "0.1", None]),
    (MAGNITUDE, "max_skip_steps", [-1, 1.5, None]),
    (MAGNITUDE, "retention_ratio", [-0.1, 1.1, math.nan, None]),
    (MAGNITUDE, "num_inference_steps", [0, 2.5, None]),
    (MAGNITUDE, "mag_ratios", [(), (0.0,), (-1.0,), (math.nan,), "1", None]),
    (MAGNITUDE, "precision", ["float16", None, ["float32"]]),
    (fastcache.Guided, "order", [0, 4, 1.5, None]),
    (fastcache.Guided, "guide", ["residuals", None, ["input"]]),
    (fastcache.Guided, "ridge", [-1, math.nan, None]),
    (fastcache.Guided, "tokens", [0, 1.5, None]),
    (fastcache.Guided, "max_misfit", [-1, math.nan, "0.1"]),
    (Signal, "at", ["last_block", None, ["first_block"]]),
    (partial(Signal, "first_block"), "against", ["next", None]),
    (partial(Signal, "first_block"), "measure", ["sum", None]),
    (partial(Signal, "model_input"), "power", [0, -1, "3"]),
    (partial(Signal, "model_input"), "stride", [0, 1.5, None]),
    (partial(Signal, "model_input"), "latents", [5, "now"]),
    (
        fastcache.Block,
        "modulation",
        ["norm1", ("norm1", "emb"), ("norm1", "emb", 5), ("a", "b", "c", "d")],
    ),
    (fastcache.Taylor, "order", [-1, 5, 1.5, "1", None]),
    (fastcache.Taylor, "spacing", ["even", None, 1]),
    (fastcache.Taylor, "skip_first", [1, "yes"]),
    (fastcache.Extrapolate, "weight", ["0.5", None, math.nan]),
    (fastcache.Extrapolate, "feeds_back", [1, None]),
    (fastcache.Modules, "match", ["contains", None]),
    (fastcache.Modules, "kind", ["spacial", None]),
    (fastcache.Modules, "patterns", ["attn", [5], ["("]]),
    (fastcache.Modules, "exclude", ["attn", [5], ["("]]),
    (fastcache.Guidance, "tensor_format", ["BHWC", None, 5]),
    (fastcache.Guidance, "grid", ["3x4", (0, 3), (2.5, 3), 5, (1, 2, 3, 4)]),
    (fastcache.Guidance, "inputs", ["hidden_states", [5], 5]),
    (fastcache.Guidance, "low", ["1.1", math.nan]),
    (fastcache.Guidance, "high", ["1.1", math.nan]),
    (fastcache.Guidance, "compounding", [1, None]),
    (fastcache.BlockAdapter, "blocks", ["blocks", [5], 5, [""]]),
    (fastcache.BlockAdapter, "attention", ["attn", [5], ["("]]),
    (fastcache.BlockAdapter, "temporal", ["attn", [5], ["("]]),
    (fastcache.BlockAdapter, "block", ["hidden", 5]),
    (fastcache.BlockAdapter, "encoder_read", ["no", 1]),
    (fastcache.BlockAdapter, "norm", [5, "", ("norm",)]),
    (fastcache.Stack, "normed", ["yes", 1, None]),
    (partial(fastcache.Stack, last=1), "normed", [True]),
    (fastcache.Block, "returns", ["hidden", ("image",), 5]),
    (fastcache.Block, "hidden", [5, ""]),
    (fastcache.Block, "encoder", [5, ""]),
]


@pytest.mark.parametrize("kind, field, values", POLICIES)
def test_bad_fields_of_policies_predictors_targets_and_adapters(kind, field, values):
    for bad in values:
        with pytest.raises((TypeError, ValueError)) as caught:
            kind(**{field: bad})
        assert field in str(caught.value), f"{bad!r}: {caught.value}"


# --- fuzzing --------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Three blocks, quick; a picture in and out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer_blocks = nn.ModuleList(SmallBlock() for _ in range(3))
        self.proj_out = nn.Linear(4, 4)
        self.eval().requires_grad_(False)

    def forward(self, hidden_states: Tensor, timestep: float, encoder_hidden_states=None) -> Tensor:
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, encoder_hidden_states)
        return self.proj_out(hidden_states)


class SmallAttention(nn.Linear):
    def __init__(self, cross: bool) -> None:
        super().__init__(4, 4)
        self.is_cross_attention = cross

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(super().forward(hidden_states))


class SmallBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = SmallAttention(False), SmallAttention(True)
        self.temporal_attn, self.norm = SmallAttention(False), Norm()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        hidden_states = hidden_states + self.attn1(hidden_states)
        return hidden_states + self.attn2(hidden_states) + self.temporal_attn(hidden_states)


def pools(name: str) -> dict[str, list[Any]]:
    """Values of each field: bad ones, and good ones of its kind."""
    good: dict[str, list[Any]] = {}
    for f in fields(CONFIGS[name]):
        field = f.name
        if "skip_range" in field and "timestep" not in field:
            good[field] = [1, 2, 3, 7, np.int64(2)]
        elif "timestep_skip_range" in field or "update_timestep" in field:
            good[field] = [(100, 800), (-1, 681), [0, 1000], (0.5, 900.5), (2000, 3000)]
        elif "identifiers" in field:
            good[field] = [("attn",), [r".*attn\d"], ["transformer_blocks"], (".*",), ["proj_out"],
                           [r"transformer_blocks\.\d"], [".*attn1", ".*ff"], ("nothing",), []]  # fmt: skip
        elif field == "coefficients":
            good[field] = [(1, 0), [0.3], "flux", (2.0, 0.5, 0.0)]
        elif field in ("start", "stop"):
            good[field] = [0.2, 0.5] if field == "start" else [0.6, 0.9, 1.0]
        elif field == "residual_order":
            good[field] = [0, 1]
        elif field == "raw_vision_callback":
            good[field] = [
                None,
                lambda model, args, kwargs: list(kwargs.get("hidden_states", args[0])),
            ]
        elif field in ("Fn_compute_blocks", "Bn_compute_blocks"):
            good[field] = [1, 1, 1, 2] if field.startswith("F") else [0, 0, 0, 1]
        elif field == "steps_computation_mask":
            good[field] = [[1, 1, 0, 1, 0, 0], (True, False), None]
        elif field == "steps_computation_policy":
            good[field] = ["dynamic", "static"]
        elif field == "force_refresh_step_policy":
            good[field] = ["once", "repeat"]
        elif "cfg" in field:
            good[field] = [True]
        elif field in ("threshold", "retention_ratio") or field.endswith("_threshold"):
            good[field] = [0, 0.0, 0.1, 0.5, 1.0]
        elif field == "mag_ratios":
            good[field] = [[1.0], [1.0, 1.1, 0.9] * 3, torch.ones(6), np.linspace(0.9, 1.1, 5)]
        elif field == "taylor_factors_dtype":
            good[field] = [None, torch.float32, torch.bfloat16, torch.float16, torch.float64]
        elif field in ("calibrate", "use_lite_mode", "is_guidance_distilled", "last"):
            good[field] = [True, False]
        elif field == "tensor_format":
            good[field] = ["BCHW", "BCFHW", "BFCHW"]
        elif "callback" in field:
            good[field] = [lambda *_: 0.5, lambda *_: 300, None]
        elif "alpha" in field:
            good[field] = [1.0, 1.1, 0, 2]
        else:  # counts of steps
            good[field] = [1, 2, 3, 5]
    return good


MID_RUN = ("tensor_format", "grid")  # known to fit only when the model has returned something
CHUNKS = 4
EACH = 150  # configs of a kind and chunk
NEEDED = {
    "TeaCacheConfig": ("coefficients",),
    "SenCacheConfig": ("threshold", "alpha_x", "alpha_t"),
    "DBCacheConfig": ("Fn_compute_blocks",),
}


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize("name", CONFIGS)
def test_random_configs_work_or_are_refused_by_name(name, chunk):
    """A config either runs on a toy model or raises at once, naming a field; the model stays whole."""
    rng = random.Random(f"{name}-{chunk}")
    good, kind = pools(name), CONFIGS[name]
    names = [f.name for f in fields(kind)]
    target, clock, worked, refused = Small(), toys.Clock(), 0, 0
    before = toys.snapshot(target)
    latents = torch.randn(2, 4, 3, 4, generator=torch.Generator().manual_seed(1))
    steps = [(latents + 0.1 * i, 1000.0 - 180 * i) for i in range(6)]
    for number in range(EACH):
        chosen = [n for n in names if rng.random() < 0.5] or names[:1]
        chosen += [n for n in NEEDED.get(name, ()) if n not in chosen]
        bad = rng.choice(chosen) if rng.random() < 0.35 else None
        given = {n: rng.choice(BAD[name][n] if n == bad else good[n]) for n in chosen}
        if "current_timestep_callback" in names and rng.random() < 0.9:
            given.setdefault("current_timestep_callback", clock)
        stage = "made"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = kind(**given)
                stage = "enabled"
                with fastcache.enable(target, config) as cache:
                    stage = "run"
                    for x, t in steps:
                        clock.now = t
                        with cache.context("one"), torch.no_grad():
                            out = target(x, timestep=t)
                        assert out.shape == x.shape and torch.isfinite(out).all()
                    assert len(list(cache.stats)) == len(steps)
            worked += 1
        except (TypeError, ValueError) as error:
            message = str(error)
            named = [n for n in (*names, "target") if n in message]
            assert named, f"{number}: {given}: {error!r}"
            assert stage != "run" or any(n in message for n in MID_RUN), f"{given}: {error!r}"
            refused += 1
        if number % 10 == 0 or stage == "enabled":
            assert toys.snapshot(target) == before, f"{number}: {given}"
    assert toys.snapshot(target) == before
    assert worked > 10 and refused > 10, (worked, refused)


def test_the_fuzzer_makes_the_promised_number():
    assert EACH * len(list(itertools.product(CONFIGS, range(CHUNKS)))) >= 5000
    assert set(METHODS) == set(CONFIGS)
