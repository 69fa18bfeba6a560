"""The documented configs, with diffusers' fields, types and defaults."""

from .base import Config
from .faster_cache import FasterCacheConfig
from .first_block import FirstBlockCacheConfig
from .mag_cache import FLUX_MAG_RATIOS, MagCacheConfig
from .pyramid_attention import PyramidAttentionBroadcastConfig
from .resolve import CONFIGS
from .taylorseer import LITE_ACTIVE, LITE_INACTIVE, TaylorSeerCacheConfig

__all__ = [
    "CONFIGS",
    "FLUX_MAG_RATIOS",
    "LITE_ACTIVE",
    "LITE_INACTIVE",
    "Config",
    "FasterCacheConfig",
    "FirstBlockCacheConfig",
    "MagCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "TaylorSeerCacheConfig",
]
