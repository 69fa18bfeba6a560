# SPDX-License-Identifier: Apache-2.0
"""EasyCache's rule: by how much will the output have changed, as it has changed with the input so far?"""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import flag, limit, real, whole
from ..signals import Signal
from .accumulated import Accumulated, Sum
from .base import Step


@dataclass(frozen=True)
class OutputSlope(Accumulated):
    """Reuse while the sum of k |x - x'| / |v'| over the skipped steps is < threshold.

    x: the model's input latents, v its output, x' and v' those of the last computed step, |.| the mean of
    absolute values. k = |v' - v''| / |x' - x''|, found at every computed step from the one before it, x'' and v''.
    Until it is known, steps are computed; anything not finite computes.

    Args:
        threshold: sum up to which steps are skipped, unitless, >= 0; equality computes, and 0 every step.
        token_stride: every how many-th token (of pictures: pixel) is looked at, a count >= 1.
        start, stop: share of a run's steps after which, and before which, steps may be skipped, 0 to 1. Other
            than 0 and 1 they need a run whose length is known.
        per_sample: True takes the largest number of the samples of a batch, False one of all.
        warmup, max_skips, last: guards of every `Policy`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range, or not start < stop; the message names it.
    Source: EasyCache (arXiv 2507.02860); stride and warm-up as in SGLang, the share as in ComfyUI.
    """

    threshold: float = 0.1
    token_stride: int = 8
    start: float = 0.0
    stop: float = 1.0
    per_sample: bool = False
    signal = Signal("model_input", "last_computed", "slope")  # of an instance: with its stride

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = "OutputSlope"
        stride = whole(owner, "token_stride", self.token_stride, 1)
        start, stop = checked_share(owner, self.start, self.stop)
        flag(owner, "per_sample", self.per_sample)
        set_to = {
            "threshold": limit(owner, "threshold", self.threshold),
            "token_stride": stride,
            "start": start,
            "stop": stop,
            "signal": Signal("model_input", "last_computed", "slope", stride=stride),
        }
        for name, value in set_to.items():
            object.__setattr__(self, name, value)

    def _unjudged(self, account: Sum, step: Step) -> str:
        if self.start == 0 and self.stop == 1:
            return ""
        if step.total is None:
            return "length of the run not known"
        inside = self.start * step.total <= step.index < self.stop * step.total
        return "" if inside else "outside of start to stop"


def checked_share(owner: str, start: object, stop: object) -> tuple[float, float]:
    """`start` and `stop` as floats, 0 <= start < stop <= 1; an error that names the field otherwise."""
    first, last = real(owner, "start", start, 0.0), real(owner, "stop", stop, 0.0)
    if last > 1:
        raise ValueError(f"{owner}: stop is {last}, must be in 0..1")
    if not first < last:
        raise ValueError(f"{owner}: start is {first} and stop {last}, must have start < stop")
    return first, last
