# SPDX-License-Identifier: Apache-2.0
"""The class of a block list while a cache is attached to it: iterating over it asks its hook."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..install import refuse_copy

HOOK = "_fastcache_hook"


class RoutedModuleList:
    """Mixed into the class of a block list while a cache is attached to it."""

    __reduce_ex__ = refuse_copy

    def __iter__(self) -> Iterator:
        hook = self.__dict__.get(HOOK)
        if hook is not None and hook.control.active:
            return hook.route()
        return super().__iter__()  # type: ignore[misc]

    def __getitem__(self, index: Any) -> Any:
        hook = self.__dict__.get(HOOK)
        if hook is not None and hook.control.active:
            return hook.pick(index)
        return super().__getitem__(index)  # type: ignore[misc]
