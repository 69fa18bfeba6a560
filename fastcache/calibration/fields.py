# SPDX-License-Identifier: Apache-2.0
"""The fields of a calibration file, each checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..files import FileKind, is_text
from .errors import CalibrationError, CalibrationNotFound

FORMAT, VERSION = "fastcache-calibration", 1


FILE = FileKind(
    "calibration",
    "fastcache.calibrate(...).save(path)",
    depth=6,
    error=CalibrationError,
    missing=CalibrationNotFound,
)


MAX_STEPS = 10_000
MAX_GRAM = 256  # steps of a run whose values are compared with each other
MAX_PAIRS = 10 * MAX_STEPS  # of all runs together


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def ratio_list(name: str, values: object) -> tuple[float, ...]:
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__iter__"):
        raise CalibrationError(f"calibration: {name} must be a list of numbers")
    ratios = tuple(values.tolist() if isinstance(values, Tensor) else values)
    if not 1 <= len(ratios) <= MAX_STEPS:
        raise CalibrationError(f"calibration: {name} must hold 1 to {MAX_STEPS} ratios")
    if not all(_number(r) and r > 0 for r in ratios):
        raise CalibrationError(f"calibration: {name} must hold finite positive numbers only")
    return tuple(map(float, ratios))


def matrix_rows(rows: object) -> tuple[tuple[float, ...], ...]:
    if not isinstance(rows, list | tuple) or not 1 <= len(rows) <= MAX_STEPS:
        raise CalibrationError("calibration: first_block must hold one list per step")
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple) or len(row) > i:
            raise CalibrationError(
                "calibration: first_block must hold, per step, changes against earlier steps"
            )
        if not all(_number(c) and c >= 0 for c in row):
            raise CalibrationError("calibration: first_block must hold finite numbers >= 0 only")
    return tuple(tuple(map(float, row)) for row in rows)


def pair_rows(rows: object) -> tuple[tuple[float, float], ...]:
    if not isinstance(rows, list | tuple) or not 1 <= len(rows) <= MAX_PAIRS:
        raise CalibrationError("calibration: input_changes must hold lists of pairs")
    for pair in rows:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise CalibrationError("calibration: input_changes must hold lists of pairs")
        if not all(_number(c) and c >= 0 for c in pair):
            raise CalibrationError("calibration: input_changes must hold finite numbers >= 0 only")
    return tuple((float(x), float(y)) for x, y in rows)


def gram_rows(rows: object) -> tuple[tuple[float, ...], ...]:
    if not isinstance(rows, list | tuple) or not 1 <= len(rows) <= MAX_GRAM:
        raise CalibrationError(f"calibration: grams must hold 1 to {MAX_GRAM} rows")
    for i, row in enumerate(rows):
        if not isinstance(row, list | tuple) or len(row) != i + 1 or not all(map(_number, row)):
            raise CalibrationError(
                "calibration: grams must hold, per step, finite numbers for it and all steps before"
            )
    return tuple(tuple(map(float, row)) for row in rows)


def named_rows(name: str, table: object) -> Iterator[tuple[str, Any]]:
    if not isinstance(table, Mapping) or not all(map(is_text, table)):
        raise CalibrationError(f"calibration: {name} must be an object keyed by context")
    return iter(table.items())
