# SPDX-License-Identifier: Apache-2.0
"""A node pack for ComfyUI: one node, which caches what it is given.

# custom_nodes/fastcache_nodes.py
from fastcache.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
"""

from __future__ import annotations

from .node import FastcacheNode

NODE_CLASS_MAPPINGS = {"FastcacheModel": FastcacheNode}
NODE_DISPLAY_NAME_MAPPINGS = {"FastcacheModel": "Cache the model (fastcache)"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
