"""What the storage of a call must fit, and what is learnt of a model by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def call_signature(args: tuple, kwargs: dict) -> tuple:
    """Shapes, dtypes and devices of the tensors of a call, and whole numbers that come in lists or sets.

    Such numbers choose layers, or say how long each sample is; a number that comes alone may be the time.
    """
    found: list[Any] = []
    _note(found, (*args, *kwargs.values()), False)
    return tuple(found)


def _note(found: list[Any], values: Iterable[Any], listed: bool) -> None:
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.shape, value.dtype, value.device))
        elif isinstance(value, (list, tuple)):
            _note(found, value, True)
        elif isinstance(value, dict):
            _note(found, value.values(), False)
        elif listed and isinstance(value, int):
            found.append(value)
        elif isinstance(value, (set, frozenset)):
            found.append(frozenset(value))
