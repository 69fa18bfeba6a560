# SPDX-License-Identifier: Apache-2.0
"""The classes that are assigned to block lists and modules while a cache is attached."""

from __future__ import annotations

from typing import Any


def refuse_copy(module: object, protocol: Any) -> Any:
    """In place of `__reduce_ex__`: a copy would share its cache with the original, or lose it half way."""
    raise TypeError(
        f"fastcache: {type(module).__name__} has a cache attached and cannot be copied or pickled; call "
        "cache.disable() first (state_dict() and save_pretrained() work as ever)"
    )


def put_back(module: Any, mixin: type) -> None:
    """Give a module the class back that `hooked_class` was made of, if it still has that one."""
    if isinstance(module, mixin):
        module.__class__ = type(module).__mro__[2]


_MADE: dict[tuple[type, type], type] = {}


def hooked_class(base: type, mixin: type) -> type:
    """A subclass of `base` with `mixin` in front, under the name of `base`; one per pair."""
    if (base, mixin) not in _MADE:
        _MADE[base, mixin] = type(
            base.__name__,
            (mixin, base),
            {"__module__": base.__module__, "__qualname__": base.__qualname__},
        )
    return _MADE[base, mixin]
