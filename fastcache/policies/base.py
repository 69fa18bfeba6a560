# SPDX-License-Identifier: Apache-2.0
"""What a policy is: host numbers in, COMPUTE or REUSE out. No torch.

A policy is a frozen description. What it must remember during a run (accumulated error, steps in a row)
lives in the small mutable object that `begin` returns, one per request and context.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeVar

from ..checks import whole
from ..signals import Measure, Signal

Action = Literal["compute", "reuse"]
COMPUTE: Final = "compute"
REUSE: Final = "reuse"

Self = TypeVar("Self", bound="Policy")  # typing.Self is of Python 3.11


class Step(NamedTuple):
    """One denoiser call, as the host knows it before it runs.

    Args:
        index: number of the call within its run and context, from 0.
        total: denoiser calls of the run, None where not known.
        timestep: of this call, in the model's own scale (usually 1000 down to 0), None where not known.
        sigma: noise level of this call, unitless, None where not known.
        guidance_skipped: whether the call sees only the conditional half of a guidance batch.
        compute: whether the call has to run in full, for a reason that is not the policy's.
        again: whether the step was decided before: a solver's further evaluation.
    """

    index: int  # type: ignore[assignment]
    total: int | None = None
    timestep: float | None = None
    sigma: float | None = None
    guidance_skipped: bool = False
    compute: bool = False
    again: bool = False


class Decision(NamedTuple):
    """What to do with a step, and why.

    Args:
        action: "compute" or "reuse".
        signal: the number that was weighed: a change, an accumulated error, a misfit or a timestep.
        threshold: what `signal` was held against, in the same unit; None where nothing was.
        reason: a few words for `cache.summary()`.
    """

    action: Action
    signal: float | None = None
    threshold: float | None = None
    reason: str = ""


@dataclass(slots=True)
class Run:
    """What a policy remembers during one run.

    Args:
        in_a_row: consecutive reused steps so far.
        computed_at: index of the latest computed step.
        decision: the latest one.
        memory: the policy's own, copied by `copy.copy`.
    """

    in_a_row: int = 0
    memory: Any = None
    computed_at: int = 0
    decision: Decision | None = None

    def copy(self) -> Run:
        """A copy that later decisions do not change."""
        return Run(self.in_a_row, copy.copy(self.memory), self.computed_at, self.decision)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When to reuse. A subclass writes `_judge` and says in class attributes what it needs.

    Class attributes: `signal` is what it measures in the model, None for nothing; `needs_timestep`
    whether it decides on timesteps; `weighs` names what its decisions hold against `threshold`;
    `calibrates` whether the magnitude ratio of every residual is measured too; `threshold_alone` whether
    it reuses wherever no guard applies and its change is within `threshold`, so that the device can decide.

    Args:
        warmup: steps that are computed at the start, a count.
        max_skips: longest row of reused steps, a count; 0 sets no limit.
        last: whether the last step is computed, in runs whose length is known.
            All three: None lets the recipe choose (see `Recipe`).
    Raises:
        TypeError: a guard is of another type; the message names it.
        ValueError: a guard is negative; the message names it.
    Source: guards as in TaylorSeer (`disable_cache_before_step`) and MagCache (`max_skip_steps`).
    """

    warmup: int | None = None
    max_skips: int | None = None
    last: bool | None = None

    signal: ClassVar[Signal | None] = None
    needs_signal: ClassVar[bool] = False  # follows from `signal`
    needs_timestep: ClassVar[bool] = False
    weighs: ClassVar[Literal["", "change", "error", "misfit"]] = ""
    threshold = math.inf
    calibrates: ClassVar[bool] = False
    threshold_alone: ClassVar[bool] = False
    per_sample = False  # every sample of a batch is judged by itself
    conditional_only = False  # reuses only in calls that see the conditional half alone

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.needs_signal = cls.signal is not None

    def __post_init__(self) -> None:
        for name in ("warmup", "max_skips"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole(type(self).__name__, name, value, 0))
        if self.last is not None and not isinstance(self.last, bool):
            raise TypeError(
                f"{type(self).__name__}: last is {self.last!r}, must be True, False or None"
            )

    @property
    def decides_inside(self) -> bool:
        """Whether the decision falls inside the model's forward, where its signal is seen."""
        return self.signal is not None and self.signal.inside

    @property
    def runs_first_block(self) -> bool:
        """Whether the first block runs on every step, for its residual to be seen."""
        return self.signal is not None and self.signal.at == "first_block"

    @property
    def measures(self) -> Measure:
        """How the signal becomes a number: "change" or "misfit"."""
        return self.signal.measure if self.signal is not None else "change"

    @property
    def num_inference_steps(self) -> int | None:
        """The length of run that the policy is made for, a count of denoiser calls; None: any."""
        return None

    @property
    def oldest(self) -> float:
        """How many steps ago a value that is reused may have been computed, a count; `max_skips` where set.

        Left as it is, a policy that measures sets no limit, and any other one has to be asked at every step.
        """
        return self.max_skips or (math.inf if self.needs_signal else 0)

    @property
    def reuses_within(self) -> tuple[float, float] | None:
        """The open range of timesteps, in the model's scale, outside of which it computes; None: no range."""
        return None

    @property
    def never_reuses(self) -> bool:
        """Whether the settings ask for every step to be computed."""
        return False

    def on_model(self: Self, classes: Sequence[str]) -> Policy:
        """The policy for one model, what it leaves to the model filled in.

        Args:
            classes: names of the model's class and of those that it derives from, nearest first.
        Returns:
            Itself, unless something is left to the model.
        Raises:
            ValueError: nothing is known for the model; the message names the field.
        """
        return self

    def sums(self, residuals: Any) -> tuple[int, ...]:
        """Shape of what the device measures for one decision, float32.

        Args:
            residuals: what the signal is taken of, [B, ...]; only its shape is read.
        Returns:
            (numbers,), or (B, numbers) where every sample is judged by itself.
        """
        numbers = self.signal.numbers if self.signal is not None else 1
        return (residuals.shape[0], numbers) if self.per_sample else (numbers,)

    def guarded(self: Self, **defaults: Any) -> Self:
        """A copy in which guards left at None take other values.

        Args:
            defaults: values by the names of guards.
        Returns:
            A policy of the same class.
        """
        return replace(self, **{k: v for k, v in defaults.items() if getattr(self, k) is None})

    def begin(self, total: int | None = None) -> Run:
        """Fresh memory for a run.

        Args:
            total: denoiser calls of the run, None where not known.
        Returns:
            What `decide` updates, one per request and context.
        """
        return Run()

    def must_compute(self, run: Run, step: Step) -> str:
        """Whether a guard computes this step.

        Args:
            run: memory of the run, read only.
            step: the call to decide.
        Returns:
            The reason, or "" where no guard applies.
        """
        index = step.index
        if index == 0:
            return "first step"
        if step.compute:
            return "asked for"
        if index < (self.warmup or 0):
            return "warm-up"
        if self.last and step.total is not None and index == step.total - 1:
            return "last step"
        if self.max_skips and run.in_a_row >= self.max_skips:
            return "max_skips"
        return ""

    def decide(self, run: Run, step: Step, signal: float | None = None) -> Decision:
        """The decision for a step. Called once per step, in order.

        Args:
            run: memory of the run, updated.
            step: the call to decide.
            signal: the number measured on the device, None where there is none yet.
        Returns:
            What to do, and why.
        """
        reason = self.must_compute(run, step)
        decision = run.decision = self._judge(run, step, signal, reason)
        if decision.action == REUSE:
            run.in_a_row += 1
        else:
            run.in_a_row, run.computed_at = 0, step.index
        return decision

    def _judge(self, run: Run, step: Step, signal: float | None, guard: str) -> Decision:
        """The method's own rule; `guard` is the reason why it must compute, or ""."""
        raise NotImplementedError

    def computed(self, run: Run, step: Step) -> None:
        """Note that a step was computed although `decide` wanted to reuse: nothing valid was there.

        Args:
            run: memory of the run, updated.
            step: the call that was computed.
        """
        run.in_a_row, run.computed_at = 0, step.index
