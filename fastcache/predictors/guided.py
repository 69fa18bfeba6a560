# SPDX-License-Identifier: Apache-2.0
"""Forecasts that take their weights from how the first block has moved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from ..checks import real, whole
from .base import GuideName, Predictor


@dataclass(frozen=True)
class Guided(Predictor):
    """Weights that would have predicted this step's guide from the guide's own history.

    The guide is a cheap value of every step. Its least-squares weights, computed on the device and never
    read by the host, are applied to the skipped value.

    Args:
        order: differences used, 1 or 2; order + 1 values are kept and needed.
        guide: "residual" of the first block, which then runs on every step; "modulated", the
            normalised and timestep-modulated input of the first block; "input", what enters it.
            Each is [B, tokens, width]. "auto": "modulated" where the model's first block is known to have
            that, else "residual".
        ridge: pull toward the weights of Taylor order 1, unitless, relative to the mean square
            of the guide's differences.
        tokens: every how many-th token the guide keeps, a count >= 1.
        max_misfit: relative norm of the unexplained part of the guide, unitless, above which the
            step after a reused one is computed; reads one number of the step before. None: no limit.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range or no known guide; the message names it.
    Source: ours. Related: DiCache (one direction of a probe residual), TeaCache (the modulated input as
    a signal), dynamic mode decomposition.
    """

    order: int = 2
    guide: GuideName = "residual"
    ridge: float = 0.003
    tokens: int = 4
    max_misfit: float | None = None
    forecasts = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", whole("Guided", "order", self.order, 1, 2))
        if self.guide not in get_args(GuideName):
            raise ValueError(
                f"Guided: guide is {self.guide!r}, must be 'residual', 'modulated', 'input' or 'auto'"
            )
        object.__setattr__(self, "ridge", real("Guided", "ridge", self.ridge, 0.0))
        object.__setattr__(self, "tokens", whole("Guided", "tokens", self.tokens, 1))
        if self.max_misfit is not None:
            object.__setattr__(
                self, "max_misfit", real("Guided", "max_misfit", self.max_misfit, 0.0)
            )

    @property
    def depth(self) -> int:  # type: ignore[override]
        """Values kept and needed."""
        return self.order + 1

    def on_block(self, modulated: bool) -> Predictor:
        if self.guide != "auto":
            return self
        return replace(self, guide="modulated" if modulated else "residual")

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        """The prior that the ridge pulls toward: Taylor's weights of the differences, order 1.

        Args:
            steps: step indices of the kept values, newest first.
            step: index of the step to predict.
        Returns:
            `order` unitless weights, of the first difference and further ones.
        """
        gap = steps[0] - steps[1] if len(steps) > 1 else 1
        return ((step - steps[0]) / gap, *(0.0,) * (self.order - 1))
