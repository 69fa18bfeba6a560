# SPDX-License-Identifier: Apache-2.0
"""What a signal is: a number measured on the device in the running step, before the decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..checks import real, whole

At = Literal["model_input", "block_input", "first_block"]
Against = Literal["last_computed", "previous"]
Measure = Literal["change", "misfit", "filtered", "slope", "distance"]

# How many numbers the device gives per decision.
NUMBERS: dict[Measure, int] = {"change": 2, "misfit": 1, "filtered": 2, "slope": 4, "distance": 1}


@dataclass(frozen=True)
class Signal:
    """Where a policy's number comes from, and what it is compared with.

    Args:
        at: where the value is taken. "model_input": the latents, before the forward begins.
            "block_input": the timestep-modulated input of the first block, after the embedders.
            "first_block": the residual of the first block, which then runs on every step.
        against: the earlier value: that of the "last_computed" step, or of the "previous" step,
            computed or not.
        measure: how the two become a number. "change": relative L1, sum|v - v'| / sum|v'|, unitless.
            "misfit": relative norm of what the value's own history leaves unexplained, unitless.
            "filtered": the same change, of values of which the frequencies are kept that are no noise at the
            step's sigma. "slope": relative L1 change that is to be expected of the model's output, by how much
            it has changed with its input at the last computed step. "distance": L2 norm of v - v'.
        power: of "filtered", the exponent of the spectrum that the values are taken to have, > 0.
        latents: of "filtered", (model, args, kwargs) of a call -> its latents, each [C, T, H, W], or None
            where it has none; None: the latents that the model is called with.
        stride: of "slope", every how many-th token is looked at, a count >= 1.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is none of the words above or out of its range; the message names it.
    """

    at: At
    against: Against = "last_computed"
    measure: Measure = "change"
    power: float = 3.0
    latents: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        for name, words in (("at", At), ("against", Against), ("measure", Measure)):
            if getattr(self, name) not in get_args(words):
                raise ValueError(
                    f"Signal: {name} is {getattr(self, name)!r}, must be one of {get_args(words)}"
                )
        if not real("Signal", "power", self.power) > 0:
            raise ValueError(f"Signal: power is {self.power}, must be > 0")
        whole("Signal", "stride", self.stride, 1)
        if self.latents is not None and not callable(self.latents):
            raise TypeError(f"Signal: latents is {self.latents!r}, must be callable or None")

    @property
    def inside(self) -> bool:
        """Whether the value is there only once the model's forward runs."""
        return self.at != "model_input"

    @property
    def numbers(self) -> int:
        """How many numbers the device gives per decision, such as both sums of a change."""
        return NUMBERS[self.measure]
