"""cache-dit on fastcache: its decisions with our kernels (`accelerate`)."""

from __future__ import annotations

from .accelerate import accelerate, uninstall

__all__ = ["accelerate", "uninstall"]
