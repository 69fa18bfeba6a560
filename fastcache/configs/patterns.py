# SPDX-License-Identifier: Apache-2.0
"""Names of attention modules, as diffusers' two attention caches find them."""

from __future__ import annotations

SPATIAL = (
    "blocks",
    "transformer_blocks",
    "single_transformer_blocks",
    "layers",
    "visual_transformer_blocks",
)


TEMPORAL = ("temporal_transformer_blocks",)


CROSS = ("blocks", "transformer_blocks", "layers")


SPATIAL_ATTENTION = (
    "^blocks.*attn",
    "^transformer_blocks.*attn",
    "^single_transformer_blocks.*attn",
)


TEMPORAL_ATTENTION = ("^temporal_transformer_blocks.*attn",)
