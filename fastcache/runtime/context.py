# SPDX-License-Identifier: Apache-2.0
"""What a context says about the denoiser call inside it, and which one is open."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from .. import sync
from ..checks import flag, real, whole
from .compiling import eager
from .frames import OWN, Frame, close

LONGEST = 600.0  # seconds that a thread waits for another one's compiled call


class Context(Frame):
    """An open context of one cache, around one denoiser call: what it says about that call. Contexts nest.

    What a context prepares for a compiled call must not be another thread's: where there are such calls, it
    holds the cache's lock while it is open, so it should hold its call and no waiting for other threads.
    """

    __slots__ = (
        "_eager",
        "_locked",
        "calls",
        "compute",
        "first",
        "name",
        "num_inference_steps",
        "sigma",
        "step_index",
        "timestep",
    )
    one_call: ClassVar[bool] = True

    def __init__(
        self,
        cache: Any,
        name: Any = "default",
        request: Any = OWN,
        step_index: Any = None,
        num_inference_steps: Any = None,
        timestep: Any = None,
        sigma: Any = None,
        compute: Any = False,
    ) -> None:
        """Raises TypeError or ValueError that names the argument."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"context: name is {name!r}, must be a non-empty string such as 'cond'")
        if request is not OWN:
            if request is None:
                raise ValueError(
                    "context: request is None, which stands for all requests in cache.reset; name one, or "
                    "leave it out"
                )
            check_request("context", request)
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
        if compute is not False:
            flag("context", "compute", compute)
        self.cache, self.name, self.compute = cache, name, compute
        self.request = self.asked = request
        self.step_index, self.num_inference_steps = step_index, total
        self.timestep: float | None = timestep
        self.sigma: float | None = sigma
        self._token = None
        # calls of denoisers since it was opened, and what the first of them was given
        self.calls = 0
        self.first: tuple[Any, tuple, dict] | None = None

    def __enter__(self) -> None:
        if self._token is not None:
            raise ValueError(
                f"context: {self.name!r} of request {self.request!r} is open already; a context is around one "
                "call, so make another with cache.context(...)"
            )
        self.push()
        self._eager = self._locked = False
        if self.calls:
            self.calls, self.first = 0, None
        try:
            if not self.cache.prepare(self):
                eager.__enter__()
                self._eager = True
        except BaseException as error:
            self.__exit__(type(error))
            raise

    def __exit__(self, kind: Any, *_: object) -> None:
        token, self._token = self._token, None
        close(token)
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


def check_request(label: str, request: Any) -> None:
    """Raise TypeError unless a request can be told from others."""
    try:
        hash(request)
    except TypeError as error:
        raise TypeError(
            f"{label}: request is {type(request).__name__}, must be hashable"
        ) from error


def _time(label: str, value: Any) -> float:
    """`value` as a finite float."""
    return real("context", label, sync.scalar(value) if isinstance(value, Tensor) else value)
