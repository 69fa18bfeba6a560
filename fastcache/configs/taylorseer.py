# SPDX-License-Identifier: Apache-2.0
"""TaylorSeer's documented config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checks import flag
from ..policies import Interval
from ..predictors import MAX_ORDER, TaylorTable, Zeros
from ..recipe import Recipe, Rule
from ..targets.spec import Fallback, Modules
from .base import Config
from .patterns import SPATIAL_ATTENTION, TEMPORAL_ATTENTION

FACTOR_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


LITE_ACTIVE, LITE_INACTIVE = ("^proj_out$",), (r"^[^.]*block[^.]*\.[^.]+$",)


@dataclass
class TaylorSeerCacheConfig(Config):
    """Forecast module outputs by Taylor series from the last computed steps.

    Computed are: step < disable_cache_before_step, then every `cache_interval`-th step counted from
    disable_cache_before_step + 1, and every step from disable_cache_after_step on.

    Args:
        cache_interval: distance of computed steps, a count >= 1.
        disable_cache_before_step: steps computed at the start, a count >= 1.
        disable_cache_after_step: index of the step from which all are computed; None: never.
        max_order: order of the forecast, 0 to 4.
        taylor_factors_dtype: torch dtype that the factors are kept in; None: that of the model.
        skip_predict_identifiers: regular expressions, full matches of dotted names of modules that
            return zeros on forecast steps; None: no module does.
        cache_identifiers: regular expressions, full matches of dotted names of the modules to
            forecast; None: the attention modules.
        use_lite_mode: whether to forecast the output projection alone, with zeros from the blocks; the
            identifiers do not count then.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range or no regular expression; the message names it.
    Source: TaylorSeer (arXiv 2503.06923), fields and defaults of diffusers 0.42.1.
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
                tuple(given) if given else (*SPATIAL_ATTENTION, *TEMPORAL_ATTENTION),
                "full",
                "any",
                fallback=None if given else "attention",
                label="cache_identifiers",
            )
        rules = []
        if inactive:  # first, since inactive beats active where both match
            fallback: Fallback | None = "blocks" if self.use_lite_mode else None
            label = "skip_predict_identifiers"
            off = Modules(tuple(inactive), "full", "any", fallback=fallback, label=label)
            rules.append(Rule(when, Zeros(), off))
        rules.append(Rule(when, what, active))
        return Recipe.of(rules, self._name())
