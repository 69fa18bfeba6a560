"""Forecasts that take their weights from how the first block has moved."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import real, whole
from .base import Predictor


@dataclass(frozen=True)
class Guided(Predictor):
    """Weights that would have predicted the guide of this very step from its own history.

    order: differences used, 1 or 2; order + 1 values are kept and needed. guide: what is looked at on every
    step: "residual" of the first block (which then always runs), "modulated", its normalised and
    timestep-modulated input, or "input", what enters it. ridge: pull toward Taylor order 1. tokens: every
    how many-th token the guide keeps. max_misfit: compute the step after one whose guide was explained
    worse than this (None: never; reads one number of the step before).
    Weights stay on the device from end to end. Related: DiCache (one direction of a probe residual),
    TeaCache (the modulated input as a signal), dynamic mode decomposition.
    """

    order: int = 2
    guide: str = "residual"
    ridge: float = 0.003
    tokens: int = 4
    max_misfit: float | None = None
    forecasts = True

    def __post_init__(self) -> None:
        whole("Guided", "order", self.order, 1, 2)
        if self.guide not in ("residual", "modulated", "input"):
            raise ValueError(
                f"Guided: guide is {self.guide!r}, must be 'residual', 'modulated' or 'input'"
            )
        object.__setattr__(self, "ridge", real("Guided", "ridge", self.ridge, 0.0))
        whole("Guided", "tokens", self.tokens, 1)
        if self.max_misfit is not None:
            object.__setattr__(
                self, "max_misfit", real("Guided", "max_misfit", self.max_misfit, 0.0)
            )

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.order + 1

    def weights(self, steps: tuple[int, ...], step: int) -> tuple[float, ...]:
        """The prior: Taylor's weights of the differences, order 1."""
        gap = steps[0] - steps[1] if len(steps) > 1 else 1
        return ((step - steps[0]) / gap, *(0.0,) * (self.order - 1))
