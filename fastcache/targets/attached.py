"""What all modules have in common while a cache is attached to them."""

from __future__ import annotations

from typing import Any


def refuse_copy(module: object, protocol: Any) -> Any:
    """In place of `__reduce_ex__`: a copy would share its cache with the original, or lose it half way."""
    raise TypeError(
        f"fastcache: {type(module).__name__} has a cache attached and cannot be copied or pickled; call "
        "cache.disable() first (state_dict() and save_pretrained() work as ever)"
    )
