# SPDX-License-Identifier: Apache-2.0
"""The latest value again, or zeros."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Predictor


@dataclass(frozen=True)
class Reuse(Predictor):
    """The newest value, unchanged.

    Source: plain reuse, as in FirstBlockCache, MagCache and Pyramid Attention Broadcast of diffusers 0.42.1.
    """

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        return (1.0,)


@dataclass(frozen=True)
class Zeros(Predictor):
    """Zeros in place of the value: what TaylorSeer's lite mode returns from inactive modules.

    Source: TaylorSeer of diffusers 0.42.1 (`skip_predict_identifiers`, `use_lite_mode`).
    """

    depth = 0

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        return ()
