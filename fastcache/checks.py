# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: each returns the value in its own type, or raises an error that names the field."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence


def whole(owner: str, name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]; a TypeError or ValueError that names the field otherwise."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{owner}: {name} is {value!r}, must be a whole number")
    try:
        number = operator.index(value)
    except (TypeError, RuntimeError) as error:  # arrays and tensors of another dtype or size
        raise TypeError(f"{owner}: {name} is {value!r}, must be a whole number") from error
    if number < low or (high is not None and number > high):
        bound = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{owner}: {name} is {number}, must be {bound}")
    return number


def real(owner: str, name: str, value: object, low: float = -math.inf) -> float:
    """`value` as a finite float >= low; a TypeError or ValueError that names the field otherwise."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise TypeError(f"{owner}: {name} is {value!r}, must be a number")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{owner}: {name} is {type(value).__name__}, must be a number") from error
    except OverflowError as error:
        raise ValueError(f"{owner}: {name} is too large for a float") from error
    if not math.isfinite(number) or number < low:
        raise ValueError(
            f"{owner}: {name} is {number}, must be finite"
            + (f" and >= {low:g}" if low > -math.inf else "")
        )
    return number


def distance(owner: str, name: str, value: object) -> float:
    """`value` as a distance in steps, a finite number >= 1; whole ones as an int."""
    number = real(owner, name, value, 1.0)
    return int(number) if number.is_integer() else number


def limit(owner: str, name: str, value: object) -> float:
    """`value` as a threshold: a float >= 0, infinity included, which sets no limit."""
    if isinstance(value, float) and value == math.inf:
        return value
    return real(owner, name, value, 0.0)


def marks_of(owner: str, name: str, value: object) -> tuple[bool, ...]:
    """`value` as marks, one per step: True (1) or False (0)."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise TypeError(f"{owner}: {name} is {value!r}, must be a sequence of True and False")
    marks = tuple(value)
    if not marks:
        raise ValueError(f"{owner}: {name} is empty, must hold one entry per step")
    values = [float(m) if isinstance(m, bool) else real(owner, name, m) for m in marks]
    if any(v not in (0.0, 1.0) for v in values):
        raise ValueError(f"{owner}: {name} holds {marks!r}, must hold nothing but 0 and 1")
    return tuple(v == 1.0 for v in values)


def flag(owner: str, name: str, value: object) -> bool:
    """`value` if it is a bool; a TypeError that names the field otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} is {value!r}, must be True or False")
    return value


def text(owner: str, name: str, value: object) -> str:
    """`value` if it is a string; a TypeError that names the field otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"{owner}: {name} is {value!r}, must be a string")
    return value


def interval_of(owner: str, name: str, value: object) -> tuple[float, float]:
    """`value` as (lo, hi) with lo < hi; a TypeError or ValueError that names the field otherwise."""
    if isinstance(value, str) or not hasattr(value, "__len__") or not hasattr(value, "__iter__"):
        raise TypeError(f"{owner}: {name} is {value!r}, must be two numbers (lo, hi)")
    if len(value) != 2:
        raise ValueError(f"{owner}: {name} has {len(value)} entries, must be two numbers (lo, hi)")
    lo, hi = (real(owner, name, v) for v in value)
    if not lo < hi:
        raise ValueError(f"{owner}: {name} is ({lo:g}, {hi:g}), must have lo < hi")
    return lo, hi


def names_of(owner: str, name: str, value: object) -> tuple[str, ...]:
    """`value` as a tuple of names; a TypeError that names the field otherwise."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{owner}: {name} is {value!r}, must be a sequence of names")
    for entry in value:
        if not isinstance(entry, str) or not entry:
            raise TypeError(f"{owner}: {name} holds {entry!r}, must hold names")
    return tuple(value)


def identifiers(owner: str, name: str, value: object) -> tuple[str, ...]:
    """`value` as a tuple of valid regular expressions; a TypeError or ValueError that names the field."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{owner}: {name} is {value!r}, must be a sequence of regular expressions")
    for pattern in value:
        if not isinstance(pattern, str):
            raise TypeError(f"{owner}: {name} holds {pattern!r}, must hold strings")
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{owner}: {name} holds {pattern!r}, not a regular expression: {error}"
            ) from error
    return tuple(value)
