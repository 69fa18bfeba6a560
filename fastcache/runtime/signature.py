"""What the storage of a call must fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

PLAIN = (type(None), bool, int, float, complex, str)


def call_signature(args: tuple, kwargs: dict) -> tuple:
    """Shapes, dtypes and devices of the tensors of a call, and which containers and objects come with them.

    Numbers, words and what is left out are no part of it: a run goes on where they change.
    """
    found: list[Any] = []
    _note(found, (*args, *kwargs.values()))
    return tuple(found)


def _note(found: list[Any], values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.shape, value.dtype, value.device))
        elif isinstance(value, (list, tuple)):
            found.append("[")
            _note(found, value)
        elif isinstance(value, dict):
            found.append("{")
            _note(found, value.values())
        elif not isinstance(value, PLAIN):
            found.append(type(value))
