"""The five documented configs, with the fields, types and defaults of diffusers 0.42.1.

A config is sugar: `recipe()` says what it means as rules of when × what × where. Fields are checked when
the object is built and again by `recipe()`, since they can be assigned in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from .policies import Interval, Magnitude, Policy, TimestepRange
from .policies.base import flag, interval_of, limit, real, whole
from .policies.first_block import FirstBlock
from .policies.magnitude import Calibrate, checked_ratios, resample
from .predictors import MAX_ORDER, Extrapolate, Reuse, TaylorTable, Zeros
from .recipe import Recipe, Rule
from .targets.spec import Guidance, Modules, Stack, identifiers

TENSOR_FORMATS = ("BCFHW", "BFCHW", "BCHW")
FACTOR_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
# Guards that a documented method does not have; they stay off so that schedules equal diffusers'.
BARE: dict[str, Any] = {"warmup": 0, "max_skips": 0, "last": False}

_SPATIAL = (
    "blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "visual_transformer_blocks",
)
_TEMPORAL = ("temporal_transformer_blocks",)
_CROSS = ("blocks", "transformer_blocks", "layers")
_SPATIAL_ATTENTION = (
    "^blocks.*attn",
    "^transformer_blocks.*attn",
    "^single_transformer_blocks.*attn",
)
_TEMPORAL_ATTENTION = ("^temporal_transformer_blocks.*attn",)
_GUIDANCE_INPUTS = (
    "hidden_states",
    "encoder_hidden_states",
    "timestep",
    "attention_mask",
    "encoder_attention_mask",
)
LITE_ACTIVE, LITE_INACTIVE = ("^proj_out$",), (r"^[^.]*block[^.]*\.[^.]+$",)


class Config:
    """Shared behaviour of the five configs."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raise a TypeError or ValueError that names the field unless every field makes sense."""
        raise NotImplementedError

    def recipe(self) -> Recipe:
        """The rules that this config stands for."""
        raise NotImplementedError

    @property
    def timestep_callback(self) -> Callable[[], Any] | None:
        return getattr(self, "current_timestep_callback", None)

    def _name(self) -> str:
        return type(self).__name__

    def _whole(
        self, low: int, *names: str, optional: bool = False, high: int | None = None
    ) -> None:
        for name in names:
            value = getattr(self, name)
            if not (optional and value is None):
                whole(self._name(), name, value, low, high)

    def _ranges(self, *names: str) -> None:
        for name in names:
            interval_of(self._name(), name, getattr(self, name))

    def _identifiers(self, *names: str, optional: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            if not (optional and value is None):
                identifiers(self._name(), name, value)

    def _callables(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{self._name()}: {name} is {value!r}, must be callable or None")


@dataclass
class FirstBlockCacheConfig(Config):
    """Skip the blocks after the first while its residual has changed by at most `threshold` (relative L1).

    Source: diffusers 0.42.1, from ParaAttention; cf. TeaCache (arXiv 2411.19108).
    """

    threshold: float = 0.05

    def validate(self) -> None:
        limit(self._name(), "threshold", self.threshold)

    def recipe(self) -> Recipe:
        self.validate()
        return Recipe.of(
            (Rule(FirstBlock(float(self.threshold), **BARE), Reuse(), Stack()),), self._name()
        )


@dataclass
class MagCacheConfig(Config):
    """Skip all blocks while calibrated magnitude ratios promise little accumulated error.

    mag_ratios: one per step, from `fastcache.calibrate`; another length is resampled to
    `num_inference_steps`. calibrate: measure the ratios instead of skipping (see `cache.calibration`).
    Source: MagCache (arXiv 2506.09045), diffusers 0.42.1.
    """

    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    num_inference_steps: int = 28
    mag_ratios: torch.Tensor | Sequence[float] | None = None
    calibrate: bool = False

    def validate(self) -> None:
        name = self._name()
        limit(name, "threshold", self.threshold)
        self._whole(0, "max_skip_steps")
        if real(name, "retention_ratio", self.retention_ratio, 0.0) > 1:
            raise ValueError(f"{name}: retention_ratio is {self.retention_ratio}, must be in 0..1")
        self._whole(1, "num_inference_steps")
        flag(name, "calibrate", self.calibrate)
        if self.mag_ratios is None:
            if not self.calibrate:
                raise ValueError(
                    f"{name}: mag_ratios is None; pass the ratios of your model (fastcache.calibrate measures "
                    "them, fastcache.FLUX_MAG_RATIOS are those published for Flux) or calibrate=True"
                )
            return
        values = self.mag_ratios
        if isinstance(values, torch.Tensor):
            if values.dim() != 1:
                raise ValueError(
                    f"{name}: mag_ratios has shape {tuple(values.shape)}, must be one-dimensional"
                )
            ratios = checked_ratios(name, values.tolist())
        else:
            ratios = checked_ratios(name, values)
            try:
                values = torch.tensor(values)  # dtype as upstream's
            except (
                TypeError,
                ValueError,
                RuntimeError,
            ):  # numbers of a kind that torch does not know
                values = torch.tensor(ratios)
        if not values.dtype.is_floating_point:
            values = values.float()
        if len(ratios) != self.num_inference_steps and not self.calibrate:
            values = torch.tensor(
                resample(tuple(values.tolist()), self.num_inference_steps), dtype=values.dtype
            )
        self.mag_ratios = values

    def recipe(self) -> Recipe:
        self.validate()
        if self.calibrate:
            policy: Policy = Calibrate(**BARE)
        else:
            ratios: Any = self.mag_ratios
            policy = Magnitude(
                float(self.threshold),
                self.max_skip_steps,
                float(self.retention_ratio),
                self.num_inference_steps,
                tuple(ratios.tolist()),
                "float64" if ratios.dtype == torch.float64 else "float32",
                **BARE,
            )
        return Recipe.of((Rule(policy, Reuse(), Stack()),), self._name())


@dataclass
class TaylorSeerCacheConfig(Config):
    """Forecast module outputs by Taylor series from the last computed steps.

    Computed: step < disable_cache_before_step, then every `cache_interval`-th step counted from
    disable_cache_before_step + 1, and every step from disable_cache_after_step on.
    cache_identifiers: full matches of dotted names of the modules to forecast; None means the attention
    modules. skip_predict_identifiers: modules that return zeros on forecast steps. use_lite_mode: forecast
    only the output projection. taylor_factors_dtype: storage of the factors, None for the model's dtype.
    Source: TaylorSeer (arXiv 2503.06923), diffusers 0.42.1.
    """

    cache_interval: int = 5
    disable_cache_before_step: int = 3
    disable_cache_after_step: int | None = None
    max_order: int = 1
    taylor_factors_dtype: torch.dtype | None = torch.bfloat16
    skip_predict_identifiers: list[str] | None = None
    cache_identifiers: list[str] | None = None
    use_lite_mode: bool = False

    def validate(self) -> None:
        name = self._name()
        self._whole(1, "cache_interval", "disable_cache_before_step")
        self._whole(0, "disable_cache_after_step", optional=True)
        after, before = self.disable_cache_after_step, self.disable_cache_before_step
        if after is not None and after < before:
            raise ValueError(
                f"{name}: disable_cache_after_step is {after}, before disable_cache_before_step = {before}; "
                "nothing would ever be cached"
            )
        self._whole(0, "max_order", high=MAX_ORDER)
        dtype = self.taylor_factors_dtype
        if dtype is not None:
            if not isinstance(dtype, torch.dtype):
                raise TypeError(
                    f"{name}: taylor_factors_dtype is {dtype!r}, must be a torch dtype or None"
                )
            if dtype not in FACTOR_DTYPES:
                raise ValueError(
                    f"{name}: taylor_factors_dtype is {dtype}, must be None or one of {FACTOR_DTYPES}"
                )
        self._identifiers("skip_predict_identifiers", "cache_identifiers", optional=True)
        flag(name, "use_lite_mode", self.use_lite_mode)

    def recipe(self) -> Recipe:
        self.validate()
        before = self.disable_cache_before_step
        when = Interval(
            self.cache_interval,
            phase=before + 1,
            stop=self.disable_cache_after_step,
            warmup=before,
            max_skips=0,
            last=False,
        )
        what = TaylorTable(self.max_order, self.taylor_factors_dtype)
        if self.use_lite_mode:
            inactive: Sequence[str] | None = LITE_INACTIVE
            active = Modules(LITE_ACTIVE, "full", "any", fallback="output", label="use_lite_mode")
        else:
            inactive = self.skip_predict_identifiers
            given = self.cache_identifiers or None
            active = Modules(
                tuple(given) if given else (*_SPATIAL_ATTENTION, *_TEMPORAL_ATTENTION),
                "full",
                "any",
                fallback=None if given else "attention",
                label="cache_identifiers",
            )
        rules = []
        if inactive:  # first, since inactive beats active where both match
            fallback = "blocks" if self.use_lite_mode else None
            label = "skip_predict_identifiers"
            off = Modules(tuple(inactive), "full", "any", fallback=fallback, label=label)
            rules.append(Rule(when, Zeros(), off))
        rules.append(Rule(when, what, active))
        return Recipe.of(rules, self._name())


@dataclass
class PyramidAttentionBroadcastConfig(Config):
    """Reuse attention outputs for n - 1 of n steps inside a timestep range, n by kind of attention.

    current_timestep_callback: returns the timestep of the running step (a number or a tensor).
    Source: Pyramid Attention Broadcast (arXiv 2408.12588), diffusers 0.42.1.
    """

    spatial_attention_block_skip_range: int | None = None
    temporal_attention_block_skip_range: int | None = None
    cross_attention_block_skip_range: int | None = None
    spatial_attention_timestep_skip_range: tuple[int, int] = (100, 800)
    temporal_attention_timestep_skip_range: tuple[int, int] = (100, 800)
    cross_attention_timestep_skip_range: tuple[int, int] = (100, 800)
    spatial_attention_block_identifiers: tuple[str, ...] = _SPATIAL
    temporal_attention_block_identifiers: tuple[str, ...] = _TEMPORAL
    cross_attention_block_identifiers: tuple[str, ...] = _CROSS
    current_timestep_callback: Callable[[], Any] | None = None

    _kinds = (("temporal", _TEMPORAL), ("cross", _CROSS), ("spatial", _SPATIAL))

    def validate(self) -> None:
        for kind, _ in self._kinds:
            self._whole(1, f"{kind}_attention_block_skip_range", optional=True)
            self._ranges(f"{kind}_attention_timestep_skip_range")
            self._identifiers(f"{kind}_attention_block_identifiers")
        self._callables("current_timestep_callback")

    def recipe(self) -> Recipe:
        self.validate()
        rules = []
        chosen = {
            kind: getattr(self, f"{kind}_attention_block_skip_range") for kind, _ in self._kinds
        }
        if all(n is None for n in chosen.values()):
            chosen["spatial"] = 2  # documented: with no range given, spatial attention takes 2
        for kind, usual in self._kinds:
            if chosen[kind] is None:
                continue
            when = TimestepRange(
                chosen[kind], getattr(self, f"{kind}_attention_timestep_skip_range"), **BARE
            )
            names = tuple(getattr(self, f"{kind}_attention_block_identifiers"))
            label = f"{kind}_attention_block_identifiers"
            where = Modules(
                names, "search", kind, fallback="attention" if names == usual else None, label=label
            )
            rules.append(Rule(when, Reuse(), where))
        return Recipe.of(rules, self._name())

    @property
    def warning(self) -> str | None:
        """What the user should know about the defaults taken."""
        if any(
            getattr(self, f"{kind}_attention_block_skip_range") is not None
            for kind, _ in self._kinds
        ):
            return None
        return (
            "PyramidAttentionBroadcastConfig: spatial_, temporal_ and cross_attention_block_skip_range are all "
            "None; using spatial_attention_block_skip_range=2"
        )


@dataclass
class FasterCacheConfig(Config):
    """Extrapolate attention outputs, and predict the unconditional half of a batched guidance call.

    The guidance half is rebuilt from the conditional output and the low and high frequency parts of the
    last full difference, weighted by the callbacks, or by alpha inside the update ranges and 1 outside.
    tensor_format: layout of the model's output, "BCFHW", "BFCHW" or "BCHW".
    Source: FasterCache (arXiv 2410.19355), diffusers 0.42.1.
    """

    spatial_attention_block_skip_range: int = 2
    temporal_attention_block_skip_range: int | None = None
    spatial_attention_timestep_skip_range: tuple[int, int] = (-1, 681)
    temporal_attention_timestep_skip_range: tuple[int, int] = (-1, 681)
    low_frequency_weight_update_timestep_range: tuple[int, int] = (99, 901)
    high_frequency_weight_update_timestep_range: tuple[int, int] = (-1, 301)
    alpha_low_frequency: float = 1.1
    alpha_high_frequency: float = 1.1
    unconditional_batch_skip_range: int = 5
    unconditional_batch_timestep_skip_range: tuple[int, int] = (-1, 641)
    spatial_attention_block_identifiers: tuple[str, ...] = _SPATIAL_ATTENTION
    temporal_attention_block_identifiers: tuple[str, ...] = _TEMPORAL_ATTENTION
    attention_weight_callback: Callable[[torch.nn.Module], float] | None = None
    low_frequency_weight_callback: Callable[[torch.nn.Module], float] | None = None
    high_frequency_weight_callback: Callable[[torch.nn.Module], float] | None = None
    tensor_format: str = "BCFHW"
    is_guidance_distilled: bool = False
    current_timestep_callback: Callable[[], Any] | None = None
    # a tuple at run time, as upstream's
    _unconditional_conditional_input_kwargs_identifiers: Sequence[str] = _GUIDANCE_INPUTS

    def validate(self) -> None:
        name = self._name()
        self._whole(1, "spatial_attention_block_skip_range", "unconditional_batch_skip_range")
        self._whole(1, "temporal_attention_block_skip_range", optional=True)
        self._ranges(*(f.name for f in fields(self) if f.name.endswith("timestep_skip_range")))
        self._ranges(*(f.name for f in fields(self) if f.name.endswith("update_timestep_range")))
        for key in ("alpha_low_frequency", "alpha_high_frequency"):
            real(name, key, getattr(self, key))
        self._identifiers(
            "spatial_attention_block_identifiers",
            "temporal_attention_block_identifiers",
            "_unconditional_conditional_input_kwargs_identifiers",
        )
        self._callables(*(f.name for f in fields(self) if f.name.endswith("callback")))
        if self.tensor_format not in TENSOR_FORMATS:
            raise ValueError(
                f"{name}: tensor_format is {self.tensor_format!r}, must be one of {TENSOR_FORMATS}"
            )
        flag(name, "is_guidance_distilled", self.is_guidance_distilled)

    def recipe(self) -> Recipe:
        self.validate()
        distilled, rules = self.is_guidance_distilled, []
        if not distilled:
            when = TimestepRange(
                self.unconditional_batch_skip_range,
                self.unconditional_batch_timestep_skip_range,
                **BARE,
            )
            listed = tuple(self._unconditional_conditional_input_kwargs_identifiers)
            where = Guidance(
                label="_unconditional_conditional_input_kwargs_identifiers",
                inputs=None
                if listed == _GUIDANCE_INPUTS
                else listed,  # the default means every batched input
                tensor_format=self.tensor_format,
                low=self._band("low"),
                high=self._band("high"),
            )
            rules.append(Rule(when, Reuse(), where))
        weight = (
            self.attention_weight_callback if self.attention_weight_callback is not None else 0.5
        )
        for kind, usual in (("temporal", _TEMPORAL_ATTENTION), ("spatial", _SPATIAL_ATTENTION)):
            n = getattr(self, f"{kind}_attention_block_skip_range")
            if n is None:
                continue
            names = tuple(getattr(self, f"{kind}_attention_block_identifiers"))
            when = TimestepRange(
                n,
                getattr(self, f"{kind}_attention_timestep_skip_range"),
                conditional_only=not distilled,
                **BARE,
            )
            label = f"{kind}_attention_block_identifiers"
            where_ = Modules(
                names,
                "search",
                "self",
                fallback="attention" if names == usual else None,
                label=label,
            )
            rules.append(Rule(when, Extrapolate(weight), where_))
        return Recipe.of(rules, self._name())

    def _band(self, band: str) -> Callable[[torch.nn.Module, float | None], float]:
        """(module, timestep) -> weight of one frequency band."""
        callback = getattr(self, f"{band}_frequency_weight_callback")
        if callback is not None:
            return lambda module, timestep: float(callback(module))
        lo, hi = getattr(self, f"{band}_frequency_weight_update_timestep_range")
        alpha = float(getattr(self, f"alpha_{band}_frequency"))
        return lambda module, timestep: (
            alpha if timestep is not None and lo < timestep < hi else 1.0
        )


CONFIGS: dict[str, type[Config]] = {
    c.__name__: c
    for c in (
        FirstBlockCacheConfig,
        MagCacheConfig,
        TaylorSeerCacheConfig,
        PyramidAttentionBroadcastConfig,
        FasterCacheConfig,
    )
}

# Magnitude ratios of FLUX.1-dev at 28 steps as published by MagCache; source: diffusers 0.42.1.
FLUX_MAG_RATIOS = (
    1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047,
    1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484,
    0.95703, 0.93359, 0.89062,
)  # fmt: skip


def resolve(config: object) -> tuple[Recipe, Config | None]:
    """Our recipe, and our copy of the config, for a Recipe, one of our configs or diffusers' own object.

    The object that came is never written to. Raises TypeError that names `config` for anything else.
    """
    if isinstance(config, Recipe):
        return config, None
    kind = CONFIGS.get(type(config).__name__)
    if kind is None or isinstance(config, type):
        raise TypeError(
            f"config is {config!r}, must be one of {', '.join(CONFIGS)} (fastcache's or diffusers' own) or a "
            "fastcache.Recipe"
        )
    values = {
        f.name: getattr(config, f.name)
        for f in fields(kind)  # type: ignore[arg-type]
        if hasattr(config, f.name)
    }
    copy = kind(**values)
    return copy.recipe(), copy
