"""fastcache: a kernel-accelerated cache runtime for diffusion transformers.

import fastcache
cache = fastcache.enable(pipe, fastcache.FirstBlockCacheConfig(threshold=0.12))
"""

from . import ops  # registers the ops; everything else uses them
from .cache import Cache, enable
from .calibration.calibration import Calibration
from .configs import (
    FLUX_MAG_RATIOS,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from .configs.presets import preset
from .graphs.compiled import compile
from .graphs.export import export_variants
from .models.adapter import Block, BlockAdapter
from .models.registry import register_adapter
from .ops.dispatch import backend, backends
from .plan import Plan
from .policies import Broadcast, FirstBlock, Interval, Magnitude, Mask, Misfit, TimestepRange
from .predictors import Extrapolate, Guided, Reuse, Taylor, TaylorTable, Zeros
from .recipe import Recipe
from .reporting.progress import progress
from .targets.spec import Guidance, Modules, Stack
from .tools.batching import split_batch
from .tools.measure import calibrate

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
