# SPDX-License-Identifier: Apache-2.0
"""What engines let their users say about a cache, as a config: a preset, a recipe file, or DBCache's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..configs import DBCacheConfig
from ..policies.masks import steps_mask
from ..predictors import DMD, Predictor, Taylor

# what one is told where nothing is said
USUAL = "balanced"
# defaults of vLLM-Omni and SGLang, which differ from cache-dit's
DEFAULTS = {
    "Fn_compute_blocks": 1,
    "max_warmup_steps": 4,
    "residual_diff_threshold": 0.24,
    "max_continuous_cached_steps": 3,
}
NAMED = ("preset", "recipe")
DUAL = frozenset(f.name for f in dataclasses.fields(DBCacheConfig))
FORECAST = frozenset(
    ("enable_taylorseer", "taylorseer_order", "enable_dmd", "dmd_history", "dmd_ridge")
)
MASKS = frozenset(("scm_steps_mask_policy", "scm_steps_policy"))
IGNORED = frozenset(("enabled", "dmd_rank", "dmd_svd_precision"))


def config_of(fields: Mapping[str, Any], steps: int | None = None) -> Any:
    """A config or recipe, as `fastcache.enable` takes it.

    Args:
        fields: one of `preset` and `recipe` (the path of a file), or fields of cache-dit's DBCache, with
            `enable_taylorseer` and `taylorseer_order`, `enable_dmd`, `dmd_history` and `dmd_ridge`, and
            `scm_steps_mask_policy` and `scm_steps_policy`; nothing at all is the preset "balanced".
        steps: of the generation, a count; masks by name ask for it.
    Returns:
        What `fastcache.enable` takes.
    Raises:
        ValueError, TypeError: that names the field.
    Source: vLLM-Omni 0.30 and SGLang 0.5.23, names and defaults.
    """
    said = {k: v for k, v in fields.items() if v is not None and k not in IGNORED}
    unknown = set(said) - DUAL - FORECAST - MASKS - set(NAMED)
    if unknown:
        raise ValueError(
            f"cache_config: {sorted(unknown)[0]!r} is not known; say preset, recipe, or fields of DBCache: "
            f"{', '.join(sorted(DUAL))}"
        )
    named = [name for name in NAMED if name in said]
    if len(said) > 1 and named:
        raise ValueError(f"cache_config: {named[0]} stands for all of it; leave the others out")
    if named:
        return said[named[0]]
    if not said:
        return USUAL
    dual = {**DEFAULTS, **{k: v for k, v in said.items() if k in DUAL}}
    if (policy := said.get("scm_steps_mask_policy")) and steps is not None:
        dual["steps_computation_mask"] = steps_mask(policy, steps)
        dual["steps_computation_policy"] = said.get("scm_steps_policy", "dynamic")
    return DBCacheConfig(**dual).recipe(forecast_of(said))


def needs_steps(fields: Mapping[str, Any]) -> bool:
    """Whether a config follows from the number of steps."""
    return bool(fields.get("scm_steps_mask_policy"))


def forecast_of(said: Mapping[str, Any]) -> Predictor | None:
    """The predictor that an engine's calibrator stands for; None for plain reuse."""
    if said.get("enable_dmd"):
        history = said.get("dmd_history", DMD.keep)
        return DMD(keep=history, ridge=said.get("dmd_ridge", DMD.ridge))
    if said.get("enable_taylorseer"):
        return Taylor(order=said.get("taylorseer_order", 1))
    return None
