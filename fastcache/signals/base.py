"""What a signal is: a number measured on the device in the running step, before the decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

At = Literal["model_input", "block_input", "first_block"]
Against = Literal["last_computed", "previous"]
Measure = Literal["change", "misfit"]


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
    Raises:
        ValueError: a field is none of the words above.
    """

    at: At
    against: Against = "last_computed"
    measure: Measure = "change"

    def __post_init__(self) -> None:
        for name, words in (("at", At), ("against", Against), ("measure", Measure)):
            if getattr(self, name) not in get_args(words):
                raise ValueError(
                    f"Signal: {name} is {getattr(self, name)!r}, must be one of {get_args(words)}"
                )

    @property
    def inside(self) -> bool:
        """Whether the value is there only once the model's forward runs."""
        return self.at != "model_input"

    @property
    def numbers(self) -> int:
        """How many numbers the device gives per decision: both sums of a change, or one misfit."""
        return 2 if self.measure == "change" else 1
