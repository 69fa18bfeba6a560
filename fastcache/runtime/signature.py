# SPDX-License-Identifier: Apache-2.0
"""What the storage of a call must fit, and what is learnt of a model by it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..ops.alike import Alike, alike, never

PLAIN = (type(None), bool, int, float, complex, str)


def call_signature(args: tuple, kwargs: dict) -> tuple:
    """Shapes, dtypes and devices of the tensors of a call, which containers and objects come with them, and whole
    numbers that come in lists or sets.

    Such numbers choose layers, or say how long each sample is. Other numbers and words are no part of it: one that
    comes alone may be the time.
    """
    found: list[Any] = []
    for value in (*args, *kwargs.values()) if args else kwargs.values():
        if isinstance(value, Tensor):
            found.append((value.shape, value.dtype, value.device))
        else:
            _note(found, (value,), False)
    return tuple(found)


def _note(found: list[Any], values: Iterable[Any], listed: bool) -> None:
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.shape, value.dtype, value.device))
        elif isinstance(value, (list, tuple)):
            found.append("[")
            _note(found, value, True)
        elif isinstance(value, dict):
            found.append("{")
            _note(found, value.values(), False)
        elif isinstance(value, PLAIN):
            if listed and isinstance(value, int):
                found.append(value)
        elif isinstance(value, (set, frozenset)):
            found.append(frozenset(value))
        else:
            found.append(type(value))


def known_by(args: tuple, kwargs: dict) -> Alike:
    """What tells at once of the arguments of another call that they surely have the signature of these; False says
    nothing. It keeps none of them."""
    tensors = [value for value in (*args, *kwargs.values()) if type(value) is Tensor]
    count, check = len(tensors), alike(*tensors)

    def known(args: tuple, kwargs: dict) -> bool:
        found = []
        for value in (*args, *kwargs.values()) if args else kwargs.values():
            if type(value) is Tensor:
                found.append(value)
            elif value is not None and type(value) not in PLAIN:
                return False  # something else that is part of it
        return len(found) == count and check(*found)

    return known if known(args, kwargs) else never
