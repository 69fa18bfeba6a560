# SPDX-License-Identifier: Apache-2.0
"""Having a pipeline say where its generations begin and end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..models.pipeline import Schedule
from .generation import Generation

TOLD = "_fastcache_generations"  # what a pipeline keeps: whom it tells
_MADE: dict[type, type] = {}


class Announcer:
    """The class of one pipeline, in place of its own while a cache is attached to it.

    Each call of the pipeline is then one generation of the cache, and each of its progress bars one loop over
    timesteps: pipelines that work in chunks or clips have several.
    """

    def __init__(self, pipeline: Any, cache: Any) -> None:
        self.pipeline, self.cache = pipeline, cache
        self.kind = type(pipeline)

    def put_on(self) -> None:
        made = _announcing(self.kind)
        try:
            self.pipeline.__class__ = made
        except (
            TypeError
        ):  # an object whose class cannot be exchanged: its runs are told apart by their steps
            return
        self.pipeline.__dict__[TOLD] = self

    def take_off(self) -> None:
        if self.pipeline.__dict__.get(TOLD) is self:  # not another cache's, which came later
            del self.pipeline.__dict__[TOLD]
            self.pipeline.__class__ = self.kind

    def generation(self) -> Generation:
        return Generation(self.cache, schedule=Schedule(self.pipeline))


def _announcing(base: type) -> type:
    """A subclass under the same name, whose calls are generations."""
    if base not in _MADE:
        wraps = {"__call__": _call, "progress_bar": _progress_bar}
        own: dict[str, Any] = {
            name: wrap(getattr(base, name))
            for name, wrap in wraps.items()
            if any(
                name in vars(kind) for kind in base.__mro__
            )  # not the class's own, by its metaclass
        }
        named = {"__module__": base.__module__, "__qualname__": base.__qualname__}
        _MADE[base] = type(base.__name__, (base,), {**named, **own})
    return _MADE[base]


def _call(original: Callable) -> Callable:
    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.__dict__[TOLD].generation():
            return original(self, *args, **kwargs)

    return __call__


def _progress_bar(original: Callable) -> Callable:
    @functools.wraps(original)
    def progress_bar(self: Any, iterable: Any = None, total: Any = None, **more: Any) -> Any:
        self.__dict__[TOLD].cache.loop(len(iterable) if hasattr(iterable, "__len__") else total)
        return original(self, iterable, total, **more)

    return progress_bar
