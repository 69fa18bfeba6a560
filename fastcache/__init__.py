# SPDX-License-Identifier: Apache-2.0
"""fastcache: a kernel-accelerated cache runtime for diffusion transformers.

import fastcache
cache = fastcache.enable(pipe, fastcache.FirstBlockCacheConfig(threshold=0.12))
"""

from . import ops  # registers the ops; everything else uses them
from .cache import Cache, enable
from .calibration.calibration import Calibration
from .calibration.errors import CalibrationError
from .configs import (
    FLUX_MAG_RATIOS,
    DBCacheConfig,
    EasyCacheConfig,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    SenCacheConfig,
    TaylorSeerCacheConfig,
    TeaCacheConfig,
)
from .configs.presets import preset, presets
from .graphs.compiled import compile
from .graphs.export import export_variants
from .models.adapter import Block, BlockAdapter
from .models.registry import register_adapter
from .ops.dispatch import backend, backends
from .parts import register_part
from .plan import Plan
from .policies import (
    Broadcast,
    Decision,
    DualBlock,
    FirstBlock,
    Growing,
    InputChange,
    Interval,
    Magnitude,
    Mask,
    Misfit,
    OutputSlope,
    Policy,
    Sensitivity,
    Spread,
    Step,
    TimestepRange,
    Widening,
    steps_mask,
)
from .predictors import (
    DMD,
    Chebyshev,
    Extrapolate,
    Fitted,
    Guided,
    Hermite,
    Predictor,
    Reuse,
    Taylor,
    TaylorTable,
    Zeros,
)
from .recipe import Recipe, Rule
from .reporting.progress import progress
from .runtime.notices import FastcacheWarning
from .runtime.stats import Record, Stats
from .targets.base import BoundTarget
from .targets.bind import register_target
from .targets.spec import Guidance, Modules, Output, Stack, Target
from .tools.batching import mixed_batch, split_batch
from .tools.inspect import inspect_model as inspect
from .tools.measure import calibrate
from .tuning.result import Tuning
from .tuning.tune import tune

__version__ = "0.2.0"

__all__ = [
    "DMD",
    "FLUX_MAG_RATIOS",
    "Block",
    "BlockAdapter",
    "BoundTarget",
    "Broadcast",
    "Cache",
    "Calibration",
    "CalibrationError",
    "Chebyshev",
    "DBCacheConfig",
    "Decision",
    "DualBlock",
    "EasyCacheConfig",
    "Extrapolate",
    "FastcacheWarning",
    "FasterCacheConfig",
    "FirstBlock",
    "FirstBlockCacheConfig",
    "Fitted",
    "Growing",
    "Guidance",
    "Guided",
    "Hermite",
    "InputChange",
    "Interval",
    "MagCacheConfig",
    "Magnitude",
    "Mask",
    "Misfit",
    "Modules",
    "Output",
    "OutputSlope",
    "Plan",
    "Policy",
    "Predictor",
    "PyramidAttentionBroadcastConfig",
    "Recipe",
    "Record",
    "Reuse",
    "Rule",
    "SeaCacheConfig",
    "SenCacheConfig",
    "Sensitivity",
    "Spread",
    "Stack",
    "Stats",
    "Step",
    "Target",
    "Taylor",
    "TaylorSeerCacheConfig",
    "TaylorTable",
    "TeaCacheConfig",
    "TimestepRange",
    "Tuning",
    "Widening",
    "Zeros",
    "backend",
    "backends",
    "calibrate",
    "compile",
    "enable",
    "export_variants",
    "inspect",
    "mixed_batch",
    "ops",
    "preset",
    "presets",
    "progress",
    "register_adapter",
    "register_part",
    "register_target",
    "split_batch",
    "steps_mask",
    "tune",
]
