# SPDX-License-Identifier: Apache-2.0
"""cache-dit on fastcache: its decisions with our kernels (`accelerate`), or its calls on our runtime (`install`)."""

from __future__ import annotations

from .accelerate import accelerate
from .install import install, uninstall

__all__ = ["accelerate", "install", "uninstall"]
