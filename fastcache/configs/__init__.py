# SPDX-License-Identifier: Apache-2.0
"""Configs: methods by the names and with the fields that their users know."""

from .base import Config
from .db_cache import DBCacheConfig
from .easy_cache import EasyCacheConfig
from .faster_cache import FasterCacheConfig
from .first_block import FirstBlockCacheConfig
from .mag_cache import FLUX_MAG_RATIOS, MagCacheConfig
from .pyramid_attention import PyramidAttentionBroadcastConfig
from .resolve import CONFIGS
from .sea_cache import SeaCacheConfig
from .sen_cache import SenCacheConfig
from .taylorseer import LITE_ACTIVE, LITE_INACTIVE, TaylorSeerCacheConfig
from .tea_cache import TeaCacheConfig

__all__ = [
    "CONFIGS",
    "FLUX_MAG_RATIOS",
    "LITE_ACTIVE",
    "LITE_INACTIVE",
    "Config",
    "DBCacheConfig",
    "EasyCacheConfig",
    "FasterCacheConfig",
    "FirstBlockCacheConfig",
    "MagCacheConfig",
    "PyramidAttentionBroadcastConfig",
    "SeaCacheConfig",
    "SenCacheConfig",
    "TaylorSeerCacheConfig",
    "TeaCacheConfig",
]
