"""What a context says about the denoiser call inside it, and which one is open."""

from __future__ import annotations

import math
import sys
from contextvars import ContextVar
from typing import Any, Protocol

from torch import Tensor

from .. import sync
from ..checks import real, whole
from .compiling import eager

LONGEST = 600.0  # seconds that a thread waits for another one's compiled call


class Owner(Protocol):
    """Whom a context belongs to: a Cache."""

    lock: Any  # a re-entrant lock

    def prepare(self, frame: Context) -> bool:
        """Get ready for the call inside; False where it must run eagerly."""

    def commit_prepared(self, frame: Context, failed: bool) -> None:
        """Account for what happened inside."""


class Context:
    """An open context of one cache, around one denoiser call: what it says about that call. Contexts nest.

    What a context prepares for a compiled call must not be another thread's: where there are such calls, it
    holds the cache's lock while it is open, so it should hold its call and no waiting for other threads.
    """

    __slots__ = (
        "_eager",
        "_locked",
        "_token",
        "cache",
        "name",
        "num_inference_steps",
        "outer",
        "request",
        "sigma",
        "step_index",
        "timestep",
    )

    def __init__(
        self,
        cache: Any,
        name: Any = "default",
        request: Any = 0,
        step_index: Any = None,
        num_inference_steps: Any = None,
        timestep: Any = None,
        sigma: Any = None,
    ) -> None:
        """Raises TypeError or ValueError that names the argument."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"context: name is {name!r}, must be a non-empty string such as 'cond'")
        if request is None:
            raise ValueError(
                "context: request is None, which stands for all requests in cache.reset; name one, or leave "
                "it out"
            )
        try:
            hash(request)
        except TypeError as error:
            raise TypeError(
                f"context: request is {type(request).__name__}, must be hashable"
            ) from error
        # what is usual is looked at here: every function called costs an eager step its own time
        if step_index is not None and (type(step_index) is not int or step_index < 0):
            step_index = whole("context", "step_index", step_index, 0)
        total = num_inference_steps
        if total is not None:
            if type(total) is not int or total < 1:
                total = whole("context", "num_inference_steps", total, 1)
            if step_index is not None and step_index >= total:
                raise ValueError(
                    f"context: step_index is {step_index}, must be below num_inference_steps = {total}"
                )
        if timestep is not None and not (type(timestep) is float and math.isfinite(timestep)):
            timestep = _time("timestep", timestep)
        if sigma is not None:
            sigma = _time("sigma", sigma)
        self.cache, self.name, self.request = cache, name, request
        self.step_index, self.num_inference_steps = step_index, total
        self.timestep: float | None = timestep
        self.sigma: float | None = sigma
        self._token: Any = None  # of contextvars, while this context is open

    def __enter__(self) -> None:
        if self._token is not None:
            raise ValueError(
                f"context: {self.name!r} of request {self.request!r} is open already; a context is around one "
                "call, so make another with cache.context(...)"
            )
        self.outer = _open.get()
        self._token = _open.set(self)
        self._eager = self._locked = False
        if "torch._dynamo" not in sys.modules:
            return
        try:
            if not self.cache.prepare(self):
                eager.__enter__()
                self._eager = True
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def __exit__(self, kind: Any, *_: object) -> None:
        _open.reset(self._token)
        self._token = None
        try:
            if self._eager:
                eager.__exit__()
            self.cache.commit_prepared(self, kind is not None)
        finally:
            if self._locked:
                self.cache.lock.release()

    def lock(self, seconds: float = LONGEST) -> bool:
        """Keep other threads out until this context closes. Raises RuntimeError where they stay too long."""
        if not self._locked:
            self._locked = self.cache.lock.acquire(timeout=seconds)
            if seconds and not self._locked:
                raise RuntimeError(
                    f"context: another thread has held a context of this cache open for {seconds:.0f} s; put "
                    "nothing but the model's call inside a context"
                )
        return self._locked

    def within(self, other: Context) -> bool:
        """Whether this one was opened inside `other`."""
        outer = self.outer
        while outer is not None and outer is not other:
            outer = outer.outer
        return outer is other


_open: ContextVar[Context | None] = ContextVar("fastcache_context", default=None)


def innermost(cache: Owner) -> Context | None:
    """The open context of a cache, as this thread or task sees it."""
    context = _open.get()
    while context is not None and context.cache is not cache:
        context = context.outer
    return context


def request_of(cache: Owner) -> Any:
    """The request that calls belong to which name none."""
    return (innermost(cache) or IMPLICIT).request


def _time(label: str, value: Any) -> float:
    """`value` as a finite float."""
    return real("context", label, sync.scalar(value) if isinstance(value, Tensor) else value)


# What calls without a context have in its place.
IMPLICIT = Context(None)
