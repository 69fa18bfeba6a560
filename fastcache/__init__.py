"""fastcache: a kernel-accelerated cache runtime for diffusion transformers.

import fastcache
cache = fastcache.enable(pipe, fastcache.FirstBlockCacheConfig(threshold=0.12))
"""

from . import ops  # registers the ops; everything else uses them
from .adapters import Block, BlockAdapter, register_adapter
from .batching import split_batch
from .calibrate import Calibration, calibrate
from .compiled import compile
from .configs import (
    FLUX_MAG_RATIOS,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from .dispatch import backend, backends
from .exporting import export_variants
from .policies import Broadcast, FirstBlock, Interval, Magnitude, Mask, Misfit, TimestepRange
from .predictors import Extrapolate, Guided, Reuse, Taylor, TaylorTable, Zeros
from .presets import preset
from .recipe import Plan, Recipe
from .report import progress
from .runtime import Cache, enable
from .targets.spec import Guidance, Modules, Stack

__version__ = "0.1.0"

__all__ = [
    "FLUX_MAG_RATIOS",
    "Block",
    "BlockAdapter",
    "Broadcast",
    "Cache",
    "Calibration",
    "Extrapolate",
    "FasterCacheConfig",
    "FirstBlock",
    "FirstBlockCacheConfig",
    "Guidance",
    "Guided",
    "Interval",
    "MagCacheConfig",
    "Magnitude",
    "Mask",
    "Misfit",
    "Modules",
    "Plan",
    "PyramidAttentionBroadcastConfig",
    "Recipe",
    "Reuse",
    "Stack",
    "Taylor",
    "TaylorSeerCacheConfig",
    "TaylorTable",
    "TimestepRange",
    "Zeros",
    "backend",
    "backends",
    "calibrate",
    "compile",
    "enable",
    "export_variants",
    "ops",
    "preset",
    "progress",
    "register_adapter",
    "split_batch",
]
