"""MagCache's rule: reuse while calibrated magnitude ratios promise little accumulated error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct

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


# Packing rounds a Python number. A sum or product of two float32 numbers so rounded is what float32 gives.
FORMS = {"float32": Struct("f"), "float64": Struct("d")}


@lru_cache(maxsize=64)
def rounded(ratios: tuple[float, ...], precision: str) -> tuple[float, ...]:
    """The ratios in a precision; infinity where one is too large for it."""
    return tuple(float(getattr(np, precision)(ratio)) for ratio in ratios)


def checked_ratios(owner: str, values: object) -> tuple[float, ...]:
    """`mag_ratios` as floats; a TypeError or ValueError that names the field otherwise."""
    if isinstance(values, str | bytes | dict) or not (
        hasattr(values, "__len__") and hasattr(values, "__getitem__")
    ):
        raise TypeError(
            f"{owner}: mag_ratios is {type(values).__name__}, must be a sequence of numbers"
        )
    try:
        ratios = tuple(real(owner, "mag_ratios", v) for v in values)  # type: ignore[attr-defined]
    except TypeError as error:  # an array without dimensions has a length and refuses to give it
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

    mag_ratios: mean over tokens of |r_t| / |r_(t-1)|, one per step, from `fastcache.calibrate`; resampled
    when the run has another length. retention_ratio: share of steps computed at the start.
    precision: "float32" or "float64", the dtype diffusers would accumulate in.
    Source: MagCache (arXiv 2506.09045), rounding of diffusers 0.42.1.
    """

    threshold: float = 0.06
    max_skip_steps: int = 3
    retention_ratio: float = 0.2
    num_inference_steps: int = 28
    mag_ratios: tuple[float, ...] = ()
    precision: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("threshold", limit("Magnitude", "threshold", self.threshold))
        put("max_skip_steps", whole("Magnitude", "max_skip_steps", self.max_skip_steps, 0))
        put("retention_ratio", real("Magnitude", "retention_ratio", self.retention_ratio, 0.0))
        if self.retention_ratio > 1:
            raise ValueError(
                f"Magnitude: retention_ratio is {self.retention_ratio}, must be in 0..1"
            )
        put(
            "num_inference_steps",
            whole("Magnitude", "num_inference_steps", self.num_inference_steps, 1),
        )
        put("mag_ratios", checked_ratios("Magnitude", self.mag_ratios))
        if self.precision not in FORMS:
            raise ValueError(
                f"Magnitude: precision is {self.precision!r}, must be 'float32' or 'float64'"
            )

    def begin(self, total: int | None = None) -> Run:
        steps = total or self.num_inference_steps
        ratios = rounded(resample(self.mag_ratios, steps), self.precision)
        retained = int(self.retention_ratio * steps + 0.5)
        (threshold,) = rounded((self.threshold,), self.precision)
        return Run(memory=_Account(ratios, retained, threshold, FORMS[self.precision]))

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        account: _Account = run.memory
        if step.index < account.retained:
            return Decision(COMPUTE, None, self.threshold, guard or "retention")
        calibrated = step.index < len(account.ratios)
        error = account.add(account.ratios[step.index] if calibrated else math.nan)
        within = error <= account.threshold  # never with a ratio that is missing
        if within and not guard and account.steps <= self.max_skip_steps and math.isfinite(error):
            return Decision(REUSE, error, self.threshold, "error within threshold")
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


class _Account:
    """Accumulated ratio and error since the last computed step, in the numbers that diffusers rounds to."""

    __slots__ = ("error", "form", "ratio", "ratios", "retained", "steps", "threshold")

    def __init__(self, ratios: tuple, retained: int, threshold: float, form: Struct) -> None:
        self.ratios, self.retained, self.threshold, self.form = ratios, retained, threshold, form
        self.clear()

    def clear(self) -> None:
        self.ratio, self.error, self.steps = 1.0, 0.0, 0

    def add(self, ratio: float) -> float:
        """The accumulated error once another step is skipped."""
        pack, unpack = self.form.pack, self.form.unpack
        self.steps += 1
        try:
            (self.ratio,) = unpack(pack(self.ratio * ratio))
            (away,) = unpack(pack(1.0 - self.ratio))
            (self.error,) = unpack(pack(self.error + abs(away)))
        except OverflowError:
            self.ratio = self.error = math.inf
        return self.error

    def __copy__(self) -> _Account:  # a tenth of what the generic one takes, once per step
        copy = _Account(self.ratios, self.retained, self.threshold, self.form)
        copy.ratio, copy.error, copy.steps = self.ratio, self.error, self.steps
        return copy


@dataclass(frozen=True)
class Calibrate(Policy):
    """Compute every step and measure the magnitude ratio of each: what `Magnitude` needs."""

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        return Decision(COMPUTE, reason="calibration")
