# SPDX-License-Identifier: Apache-2.0
"""Weights of a forecast by exponentials, found on the device in the history of the values themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .registry import define, same_shapes

WINDOW = 4  # values from whose differences two exponentials follow


def _exponential_weights(rows: Sequence[Tensor], reach: Tensor, ridge: float) -> Tensor:
    run, held = dispatch.resolve("guided_sums", list(rows), 0, False)
    windows = [held[i : i + WINDOW] for i in range(len(held) - WINDOW + 1)]
    solve = dispatch.function(dispatch.active(rows[0].device.type), "exponential_solve")
    return solve([run(newest, older, False) for newest, *older in windows], reach, ridge)


def _fake_exponential_weights(rows: Sequence[Tensor], reach: Tensor, ridge: float) -> Tensor:
    same_shapes("_exponential_weights", *rows)
    return rows[0].new_empty((WINDOW,), dtype=torch.float32)


# rows: four evenly spaced values or more, newest first; reach: float32 [1], gaps from the newest one.
define(
    "_exponential_weights(Tensor[] rows, Tensor reach, float ridge) -> Tensor",
    _exponential_weights,
    _fake_exponential_weights,
)
