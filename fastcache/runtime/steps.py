"""Which step a call is and where a run begins: told by contexts, else read off the model's own timestep."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import sync
from ..models.block_io import parameter_names
from ..storage.state import State
from .context import Context

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time")


RISES = 3  # runs of a single step in a row, each at a later timestep: time runs the other way


class StepTracker:
    """The sense of time of one denoiser.

    pipeline_ends_runs: a pipeline announces the end of its runs, so a timestep on an accelerator is not read.
    """

    def __init__(self, forward: Callable, pipeline_ends_runs: bool) -> None:
        names = parameter_names(forward)
        self.name = next((n for n in TIMESTEP_NAMES if n in names), None)
        self.place = names.index(self.name) if self.name else -1
        self.pipeline_ends_runs = pipeline_ends_runs
        self.clear()

    def clear(self) -> None:
        self.ascending = False  # the model's timesteps grow during a run
        # per state: runs of one step, each later than the one before
        self.rises: dict[Any, int] = {}

    def argument(self, args: tuple, kwargs: dict) -> Any:
        """The model's timestep among its arguments; None without one."""
        if self.name is None:
            return None
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.place] if len(args) > self.place else None

    def told(self, call: Context, callback: Callable[[], Any] | None) -> float | None:
        """The timestep that was told: by the config's callback, read once per step, or by the context."""
        if callback is None or (value := callback()) is None:
            return call.timestep
        try:
            number = sync.scalar(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"current_timestep_callback returned {value!r}, must return a number or a tensor of one"
            ) from error
        return number if math.isfinite(number) else None  # not a number: no rule may reuse

    def read(self, state: State, call: Context, args: tuple, kwargs: dict) -> float | None:
        """The timestep by which runs are told apart, from the model's own argument.

        One on an accelerator is read (one wait) only where nothing else tells runs apart.
        """
        if call.step_index is not None:
            return None
        total = call.num_inference_steps or state.total
        return self.number(self.argument(args, kwargs), total)

    def number(self, value: Any, total: int | None) -> float | None:
        """A timestep argument as a float, where it can be had without a needless wait."""
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
            return None
        if isinstance(value, Tensor) and (
            not value.numel()
            or (value.device.type != "cpu" and (total is not None or self.pipeline_ends_runs))
        ):
            return None
        number = sync.scalar(value)
        return number if math.isfinite(number) else None

    def index(self, state: State, call: Context, timestep: float | None) -> tuple[int, bool]:
        """The index of this step, and whether a new run begins with it.

        Raises ValueError where the same explicit step_index comes twice.
        """
        started = state.index > 0
        if call.step_index is None:
            over = started and self.run_is_over(state, call, timestep)
            return (0 if over else state.index), over
        last = state.index - 1
        if started and call.step_index == last and last > 0:
            raise ValueError(
                f"step_index {last} came twice for request {call.request!r}, context {call.name!r}: a second "
                "call at the same step is another branch, give it a name of its own, as in "
                "cache.context('uncond', step_index=...)"
            )
        return call.step_index, started and call.step_index <= last

    def run_is_over(self, state: State, call: Context, timestep: float | None) -> bool:
        """Whether this call belongs to the next run: all steps are done, or time has turned back."""
        total = call.num_inference_steps or state.total
        if timestep is None or state.timestep is None or timestep == state.timestep:
            return total is not None and state.index >= total
        if not self.backwards(state.timestep, timestep):
            self.rises.pop(state.key, None)
            return False
        rises = self.rises[state.key] = self.rises.get(state.key, 0) + 1 if state.index == 1 else 0
        if rises >= RISES:
            self.ascending = not self.ascending
            self.rises.clear()
            return False
        return True

    def backwards(self, before: float, now: float) -> bool:
        """Whether `now` lies earlier in a run than `before`."""
        return now < before if self.ascending else now > before
