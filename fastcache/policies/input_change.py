# SPDX-License-Identifier: Apache-2.0
"""The rule of TeaCache and SeaCache: how far has the input moved, step by step, since the last computed one?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from ..checks import flag, limit, real, whole
from ..signals import Signal
from .accumulated import Accumulated, Sum
from .base import Policy, Step
from .coefficients import published_for

At = Literal["block_input", "model_input"]


def checked_coefficients(owner: str, values: object) -> tuple[float, ...]:
    """`coefficients` as floats; a TypeError or ValueError that names the field otherwise."""
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise TypeError(
            f"{owner}: coefficients is {values!r}, must be a sequence of numbers, the highest power first"
        )
    numbers = tuple(real(owner, "coefficients", value) for value in values)
    if not numbers:
        raise ValueError(f"{owner}: coefficients is empty, must hold at least one number")
    return numbers


@dataclass(frozen=True)
class InputChange(Accumulated):
    """Reuse while the sum of p(d) over the skipped steps is < threshold.

    d = sum|m - m'| / sum|m'|, m what the first block attends over, or the model's latents; m' is that of the step
    before, computed or not. Anything not finite computes, and so does a step before which others were left out.

    Args:
        threshold: sum up to which steps are skipped, unitless, >= 0; equality computes, and 0 every step.
        coefficients: of the polynomial p, highest power first, unitless; (1, 0) adds d itself. None takes those
            that were published for the class of the model, an error where there are none.
        at: "block_input", the first block's normalised, timestep-modulated input [B, tokens, width], or
            "model_input", the latents that the model is called with.
        power: None, or the exponent of SeaCache's filter, > 0, which the latents pass first: [B, C, (T,) H, W]
            and the step's sigma are needed then. d is the mean over samples.
        latents: (model, args, kwargs) of a call -> its latents, each [C, T, H, W], or None for a call to compute;
            for `power`, where they are not the first argument of the model.
        num_inference_steps: denoiser calls of a run whose context does not tell its length, a count; None: unknown.
        end_steps: steps that are computed at the end of a run whose length is known, a count.
        per_sample: True takes the largest d of the samples of a batch, False one d of all.
        warmup, max_skips, last: guards of every `Policy`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range, or `power` is given for "block_input"; the message names it.
    Source: TeaCache (arXiv 2411.19108); SeaCache (arXiv 2602.18993, diffusers 0.42.1).
    """

    threshold: float = 0.25
    coefficients: tuple[float, ...] | None = (1.0, 0.0)
    at: At = "block_input"
    power: float | None = None
    latents: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any] | None = None
    num_inference_steps: int | None = None
    end_steps: int = 0
    per_sample: bool = False
    signal = Signal("block_input", "previous")  # of an instance: as `at` and `power` have it

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = "InputChange"
        set_to: dict[str, Any] = {"threshold": limit(owner, "threshold", self.threshold)}
        if self.coefficients is not None:
            set_to["coefficients"] = checked_coefficients(owner, self.coefficients)
        if not isinstance(self.at, str) or self.at not in get_args(At):
            raise ValueError(f"{owner}: at is {self.at!r}, must be one of {get_args(At)}")
        if self.num_inference_steps is not None:
            steps = whole(owner, "num_inference_steps", self.num_inference_steps, 1)
            set_to["num_inference_steps"] = steps
        set_to["end_steps"] = whole(owner, "end_steps", self.end_steps, 0)
        flag(owner, "per_sample", self.per_sample)
        if self.latents is not None and not callable(self.latents):
            raise TypeError(f"{owner}: latents is {self.latents!r}, must be callable or None")
        if self.power is None:
            if self.latents is not None:
                raise ValueError(f"{owner}: latents is given, needs power, whose filter they pass")
            set_to["signal"] = Signal(self.at, "previous")
        else:
            power = set_to["power"] = real(owner, "power", self.power)
            if power <= 0:
                raise ValueError(f"{owner}: power is {power}, must be > 0")
            if self.at != "model_input":
                raise ValueError(f"{owner}: power is given, needs at='model_input'")
            set_to["signal"] = Signal(self.at, "previous", "filtered", power, self.latents)
        for name, value in set_to.items():
            object.__setattr__(self, name, value)

    def on_model(self, classes: Sequence[str]) -> Policy:
        if self.coefficients is not None:
            return self
        return replace(self, coefficients=published_for(classes))

    def _unjudged(self, account: Sum, step: Step) -> str:
        if step.total is not None and step.index >= step.total - self.end_steps:
            return "last step"
        if step.index > account.at + 1:
            return "steps were left out"
        if self.power is not None and (step.sigma is None or not 0 <= step.sigma <= 1):
            return (
                "no sigma: pass it to cache.context(sigma=...)"
                if step.sigma is None
                else "sigma outside of 0..1"
            )
        return ""

    def _added(self, signal: float) -> float:
        value = 0.0
        for coefficient in self.coefficients or ():
            value = value * signal + coefficient
        return value
