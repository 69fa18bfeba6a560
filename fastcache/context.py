"""What a context says about the denoiser call inside it, and which one is open."""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from . import signal
from .branches import MOST
from .policies.base import real, whole

if TYPE_CHECKING:
    from .runtime import Cache


class Call(NamedTuple):
    """What a context says about the denoiser call inside it."""

    name: str = "default"
    request: Any = 0
    step_index: int | None = None
    num_inference_steps: int | None = None
    timestep: float | None = None
    sigma: float | None = None


IMPLICIT = Call()
IMPLICIT_BRANCHES = tuple(Call(f"default#{i + 1}") for i in range(MOST + 1))


class Frame:
    """An open context of one cache; frames nest."""

    __slots__ = ("cache", "call", "outer")

    def __init__(self, cache: Cache, call: Call, outer: Frame | None) -> None:
        self.cache, self.call, self.outer = cache, call, outer


_frames: ContextVar[Frame | None] = ContextVar("fastcache_frames", default=None)


def checked_call(
    name: Any, request: Any, step_index: Any, num_inference_steps: Any, timestep: Any, sigma: Any
) -> Call:
    """The arguments of a context, checked. Raises TypeError or ValueError that names the argument."""
    if not isinstance(name, str) or not name:
        raise TypeError(f"context: name is {name!r}, must be a non-empty string such as 'cond'")
    try:
        hash(request)
    except TypeError as error:
        raise TypeError(
            f"context: request is {type(request).__name__}, must be hashable"
        ) from error
    for label, value, low in (
        ("step_index", step_index, 0),
        ("num_inference_steps", num_inference_steps, 1),
    ):
        if value is not None:
            whole("context", label, value, low)
    step_index = None if step_index is None else step_index.__index__()
    total = None if num_inference_steps is None else num_inference_steps.__index__()
    if step_index is not None and total is not None and step_index >= total:
        raise ValueError(
            f"context: step_index is {step_index}, must be below num_inference_steps = {total}"
        )
    if timestep is None and sigma is None:
        return Call(name, request, step_index, total)
    numbers = {}
    for label, value in (("timestep", timestep), ("sigma", sigma)):
        if isinstance(value, Tensor):
            value = signal.scalar(value)
        numbers[label] = None if value is None else real("context", label, value)
    return Call(name, request, step_index, total, **numbers)


def call_signature(args: tuple, kwargs: dict) -> tuple:
    """Shapes, dtypes and devices of the tensors of a call: what storage must fit."""
    return tuple(_facts((*args, *kwargs.values())))


def _facts(values: Iterable[Any]) -> list[tuple]:
    found: list[tuple] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.shape, value.dtype, value.device))
        elif isinstance(value, list | tuple):
            found.extend(_facts(value))
        elif isinstance(value, dict):
            found.extend(_facts(value.values()))
    return found
