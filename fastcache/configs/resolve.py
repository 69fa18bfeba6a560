# SPDX-License-Identifier: Apache-2.0
"""From whatever `enable` was given to a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from ..recipe import Recipe
from .base import Config
from .db_cache import DBCacheConfig
from .easy_cache import EasyCacheConfig
from .faster_cache import FasterCacheConfig
from .first_block import FirstBlockCacheConfig
from .mag_cache import MagCacheConfig
from .pyramid_attention import PyramidAttentionBroadcastConfig
from .sea_cache import SeaCacheConfig
from .sen_cache import SenCacheConfig
from .taylorseer import TaylorSeerCacheConfig
from .tea_cache import TeaCacheConfig

CONFIGS: dict[str, type[Config]] = {
    c.__name__: c
    for c in (
        FirstBlockCacheConfig,
        MagCacheConfig,
        TaylorSeerCacheConfig,
        PyramidAttentionBroadcastConfig,
        FasterCacheConfig,
        TeaCacheConfig,
        EasyCacheConfig,
        SeaCacheConfig,
        SenCacheConfig,
        DBCacheConfig,
    )
}


def resolve(config: object, label: str = "config") -> tuple[Recipe, Config | None]:
    """Our recipe, and our copy of the config, for a Recipe, one of our configs or diffusers' own object.

    The object that came is never written to. Raises TypeError that names `label` for anything else.
    """
    if isinstance(config, Recipe):
        return config, None
    kind = CONFIGS.get(type(config).__name__)
    if kind is None or isinstance(config, type):
        raise TypeError(
            f"{label} is {config!r}, must be one of {', '.join(CONFIGS)} (fastcache's or diffusers' own) or a "
            "fastcache.Recipe"
        )
    values = {
        f.name: getattr(config, f.name)
        for f in fields(kind)  # type: ignore[arg-type]
        if hasattr(config, f.name)
    }
    copy = kind(**values)
    return copy.recipe(), copy


def callback_of(own: Config | None, target: Any) -> Callable[[], Any] | None:
    """What tells the running timestep: the config's callback, or the pipeline itself where the config wants one."""
    callback = own.timestep_callback if own is not None else None
    if callback is None and own is not None and own.wants_timestep:
        if not hasattr(type(target), "current_timestep"):
            if not hasattr(own, "current_timestep_callback"):
                return None  # the model's own timestep tells
            raise ValueError(
                f"{type(own).__name__}: current_timestep_callback is None; pass a function that returns the "
                "running timestep, such as lambda: pipe.current_timestep"
            )
        return lambda: target.current_timestep
    return callback
