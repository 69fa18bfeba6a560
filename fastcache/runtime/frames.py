# SPDX-License-Identifier: Apache-2.0
"""What is open around a denoiser call: contexts and generations of a cache, as this thread or task sees them."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar, Protocol


class Owner(Protocol):
    """Whom frames belong to: a Cache."""

    lock: Any  # a re-entrant lock
    # what an engine that counts calls says of the one that comes, given what is open around it; None: nobody counts
    told: Callable[[Any], Any] | None

    def hook(self) -> None:
        """Have the targets of the cache's own recipe stand in the models."""

    def prepare(self, frame: Any) -> bool:
        """Get ready for the call inside; False where it must run eagerly."""

    def commit_prepared(self, frame: Any, failed: bool) -> None:
        """Account for what happened inside."""

    def ended(self, generation: Any, failed: bool) -> None:
        """Forget the runs of a generation that is over."""


class Own(int):
    """In place of a request that nobody has named: that of the generation around, else the thread's own, which is
    0 in the main thread."""


OWN: Any = Own(0)


class Frame:
    """Something open: a context or a generation.

    one_call: whether it is around one denoiser call and says which branch and step that is.
    """

    __slots__ = ("_token", "asked", "cache", "generation", "outer", "request")
    one_call: ClassVar[bool] = False

    def __init__(self, cache: Any, request: Any) -> None:
        self.cache = cache
        self.request = self.asked = request
        self.outer: Frame | None = None
        self.generation: Any = None  # the innermost one of the cache
        self._token: Any = None  # of contextvars, while it is open

    def push(self) -> None:
        """Open it: find out whose request it serves, and in which generation it lies."""
        outer = self.outer = _open.get()
        self._token = _open.set(self)
        if outer is None:
            self.generation = None
            if self.asked is OWN:
                self.request = thread_request()
            return
        while outer is not None and outer.cache is not self.cache:
            outer = outer.outer
        within = self.generation = None if outer is None else outer.generation
        if self.asked is OWN:
            self.request = thread_request() if within is None else within.request

    def pop(self) -> None:
        """Close it; what was open around it is again."""
        token, self._token = self._token, None
        _open.reset(token)

    def within(self, other: Frame) -> bool:
        """Whether this one was opened inside `other`."""
        outer = self.outer
        while outer is not None and outer is not other:
            outer = outer.outer
        return outer is other


_open: ContextVar[Frame | None] = ContextVar("fastcache_frames", default=None)
latest = _open.get  # what was opened last, of whichever cache; None where nothing is open
close = _open.reset  # by the token of what is open


def innermost(cache: Owner) -> Any:
    """What is open of a cache and nothing else of it inside; None without."""
    frame = _open.get()
    while frame is not None and frame.cache is not cache:
        frame = frame.outer
    return frame


def method_of(frame: Frame | None) -> Any:
    """The recipe, bound to the models, of the generation that a frame lies in; None where it is the cache's own."""
    generation = None if frame is None else frame.generation
    return None if generation is None else generation.method


def request_of(cache: Owner) -> Any:
    """The request that calls belong to which name none."""
    frame = innermost(cache)
    return thread_request() if frame is None else frame.request


# --- threads --------------------------------------------------------------------------------------------


class _Thread:
    """What goes when a thread does."""


_threads, _numbers = threading.local(), itertools.count(1)


def thread_request() -> Any:
    """The request of calls that nobody names: 0 in the main thread, one of its own in every other."""
    try:
        return _threads.request
    except AttributeError:
        main = threading.current_thread() is threading.main_thread()
        request = _threads.request = 0 if main else ("thread", next(_numbers))
        _threads.own = _Thread()
        return request


def when_thread_ends(tell: Callable[[Any], object]) -> None:
    """Have `tell` called with the request of this thread once the thread is gone; never for the main one."""
    request = thread_request()
    if request != 0:
        weakref.finalize(_threads.own, tell, request).atexit = False
