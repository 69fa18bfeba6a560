# SPDX-License-Identifier: Apache-2.0
"""MagCache's rule: reuse while calibrated magnitude ratios promise little accumulated error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from typing import Literal

import numpy as np

from ..checks import limit, real, whole
from .base import COMPUTE, REUSE, Decision, Policy, Run, Step


@lru_cache(maxsize=64)
def resample(ratios: tuple[float, ...], count: int) -> tuple[float, ...]:
    """`ratios` at `count` steps by nearest index, as diffusers 0.42.1 rounds it; count 1 takes the last."""
    if len(ratios) == count:
        return ratios
    if count == 1:
        return ratios[-1:]
    scale = (len(ratios) - 1) / (count - 1)
    return tuple(ratios[int(np.rint(np.float32(i) * np.float32(scale)))] for i in range(count))


Precision = Literal["float32", "float64"]

# Packing rounds a Python number: a sum or product of two float32 numbers, so rounded, has float32's bits.
FORMS: dict[str, Struct] = {"float32": Struct("f"), "float64": Struct("d")}


@lru_cache(maxsize=64)
def rounded(ratios: tuple[float, ...], precision: Precision) -> tuple[float, ...]:
    """The ratios in a precision; infinity where one is too large for it."""
    return tuple(float(getattr(np, precision)(ratio)) for ratio in ratios)


def checked_ratios(owner: str, values: object) -> tuple[float, ...]:
    """`mag_ratios` as floats > 0; a TypeError or ValueError that names the field otherwise."""
    if isinstance(values, str | bytes | dict) or not (
        hasattr(values, "__len__") and hasattr(values, "__getitem__")
    ):
        raise TypeError(
            f"{owner}: mag_ratios is {type(values).__name__}, must be a sequence of numbers"
        )
    try:
        ratios = tuple(real(owner, "mag_ratios", v) for v in values)  # type: ignore[attr-defined]
    except (
        TypeError
    ) as error:  # an array without dimensions has `__len__`, and raises when it is called
        if "mag_ratios" in str(error):
            raise
        raise TypeError(f"{owner}: mag_ratios is {values!r}, must be a sequence") from error
    if not ratios:
        raise ValueError(f"{owner}: mag_ratios is empty, must hold one ratio per step")
    if any(r <= 0 for r in ratios):
        raise ValueError(f"{owner}: mag_ratios holds {min(ratios)}, must be positive")
    return ratios


@dataclass(frozen=True)
class Magnitude(Policy):
    """Reuse while sum |1 - prod ratio| <= threshold, at most `max_skip_steps` in a row.

    Sum and product run over the steps since the last computed one.

    Args:
        threshold: accumulated error, unitless, >= 0.
        max_skip_steps: longest row of reused steps, a count; 0 computes every step.
        retention_ratio: share of the run that is computed at its start, 0 to 1.
        num_inference_steps: denoiser calls of a run whose context does not tell its length, a count.
        mag_ratios: mean over tokens of |r_t| / |r_(t-1)|, r the residual of all blocks; one unitless
            number > 0 per step, from `fastcache.calibrate`. A run of another length resamples them.
        precision: dtype that diffusers would accumulate in; its rounding is followed bit by bit.
        warmup, max_skips, last: guards of every `Policy`.
    Raises:
        TypeError: a field is of another type; the message names it.
        ValueError: a field is out of its range, or `mag_ratios` is empty; the message names it.
    Source: MagCache (arXiv 2506.09045), defaults and rounding of diffusers 0.42.1.
    """

    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    num_inference_steps: int = 28
    mag_ratios: tuple[float, ...] = ()
    precision: Precision = "float32"
    weighs = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = "Magnitude"
        checked = {
            "threshold": limit(owner, "threshold", self.threshold),
            "max_skip_steps": whole(owner, "max_skip_steps", self.max_skip_steps, 0),
            "retention_ratio": real(owner, "retention_ratio", self.retention_ratio, 0.0),
            "num_inference_steps": whole(owner, "num_inference_steps", self.num_inference_steps, 1),
            "mag_ratios": checked_ratios(owner, self.mag_ratios),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.retention_ratio > 1:
            raise ValueError(f"{owner}: retention_ratio is {self.retention_ratio}, must be in 0..1")
        if self.precision not in tuple(FORMS):
            raise ValueError(
                f"{owner}: precision is {self.precision!r}, must be 'float32' or 'float64'"
            )

    @property
    def oldest(self) -> float:
        return min(self.max_skip_steps, self.max_skips or self.max_skip_steps)

    @property
    def never_reuses(self) -> bool:
        return self.threshold == 0 or self.max_skip_steps == 0

    def begin(self, total: int | None = None) -> Run:
        steps = total or self.num_inference_steps
        ratios = rounded(resample(self.mag_ratios, steps), self.precision)
        retained = int(self.retention_ratio * steps + 0.5)
        (threshold,) = rounded((self.threshold,), self.precision)
        return Run(memory=_Account(ratios, retained, threshold, FORMS[self.precision]))

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        account: _Account = run.memory
        index = step.index
        if index < account.retained:
            return Decision(COMPUTE, None, self.threshold, guard or "retention")
        calibrated, next_one = index < len(account.ratios), run.computed_at + 1 + account.steps
        if index > next_one:  # steps were left out
            for left_out in range(next_one, index):
                account.add(
                    account.ratios[left_out] if left_out < len(account.ratios) else math.nan
                )
        error = account.add(account.ratios[index] if calibrated else math.nan)
        within = (
            error <= account.threshold
        )  # False where the ratio is missing: the error is NaN then
        if within and not guard and account.steps <= self.max_skip_steps and math.isfinite(error):
            # as Decision(...) does it, without a call into Python
            return tuple.__new__(Decision, (REUSE, error, self.threshold, "error within threshold"))
        if not calibrated:
            reason = "past the calibrated steps"
        elif within:
            reason = guard or "max_skip_steps"
        else:
            reason = guard or "error above threshold"
        account.clear()
        return Decision(COMPUTE, error, self.threshold, reason)

    def computed(self, run: Run, step: Step) -> None:
        super().computed(run, step)
        run.memory.clear()


@lru_cache(maxsize=4096)
def _added(product: float, error: float, ratio: float, form: Struct) -> tuple[float, float]:
    """Product and error once another ratio is skipped. Every run of a schedule asks for the same ones."""
    pack, unpack = form.pack, form.unpack
    try:
        (product,) = unpack(pack(product * ratio))
        (away,) = unpack(pack(1.0 - product))
        (error,) = unpack(pack(error + abs(away)))
    except OverflowError:
        return math.inf, math.inf
    return product, error


class _Account:
    """Ratio and error accumulated since the last computed step, rounded as diffusers rounds them."""

    __slots__ = ("error", "form", "ratio", "ratios", "retained", "steps", "threshold")

    def __init__(
        self, ratios: tuple[float, ...], retained: int, threshold: float, form: Struct
    ) -> None:
        self.ratios, self.retained, self.threshold, self.form = ratios, retained, threshold, form
        self.clear()

    def clear(self) -> None:
        self.ratio, self.error, self.steps = 1.0, 0.0, 0

    def add(self, ratio: float) -> float:
        """The accumulated error once another step is skipped."""
        self.steps += 1
        self.ratio, self.error = _added(self.ratio, self.error, ratio, self.form)
        return self.error

    def __copy__(self) -> _Account:
        # copy.copy without this method takes ten times as long, once per compiled step
        copy = _Account(self.ratios, self.retained, self.threshold, self.form)
        copy.ratio, copy.error, copy.steps = self.ratio, self.error, self.steps
        return copy


@dataclass(frozen=True)
class Calibrate(Policy):
    """Compute every step and measure the magnitude ratio of each: what `Magnitude` needs."""

    calibrates = True

    @property
    def never_reuses(self) -> bool:
        return True

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        return Decision(COMPUTE, reason="calibration")
