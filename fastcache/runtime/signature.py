"""What the storage of a call must fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def call_signature(args: tuple, kwargs: dict) -> tuple:
    """Shapes, dtypes and devices of the tensors of a call: what storage must fit."""
    found: list[tuple] = []
    _note(found, (*args, *kwargs.values()))
    return tuple(found)


def _note(found: list[tuple], values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.shape, value.dtype, value.device))
        elif isinstance(value, (list, tuple)):
            _note(found, value)
        elif isinstance(value, dict):
            _note(found, value.values())
