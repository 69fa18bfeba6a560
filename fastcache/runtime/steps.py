# SPDX-License-Identifier: Apache-2.0
"""Which step a call is and where a run begins: told by who knows, else read off the model's own timestep."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

from torch import Tensor, nn

from .. import sync
from ..models.registry import time_rises
from ..models.signatures import TIMESTEP_NAMES, parameter_names, timed_forward
from ..storage.state import State
from .context import Context
from .generation import Generation

TURNS = 3  # steps in a row, from the first one of a run on, against the direction of time: it is the other one


class Moment(NamedTuple):
    """When a call is, as far as can be told without a needless wait.

    time: the timestep, that of the noisiest part where parts have their own. mark: equal in two calls of the
    same step; None where nothing tells. evaluation: of the solver, where it takes several per step. clock: what
    falls or rises during a run: of parts with timesteps of their own the mean, since some may stand still. place:
    where the step lies among the others of its run.
    """

    time: float | None = None
    mark: Any = None
    evaluation: int | None = None
    clock: float | None = None
    place: float | None = None


def moment_of(time: float | None, mark: Any, evaluation: int | None = None) -> Moment:
    """A moment by what tells it."""
    if type(mark) is tuple:
        return Moment(time, mark, evaluation, mark[2], mark[2])
    if time is None:
        return Moment(None, mark, evaluation, None, mark if isinstance(mark, int | float) else None)
    return Moment(time, mark, evaluation, time, time)


NEVER = Moment()

# How a call follows the one before in its state: the next step; the first of a run; another evaluation of the
# same step, by a solver that is known to need it; a step of a run whose direction in time is not known yet; the
# next step of a run that may have begun with it; a call at the same step which may be anybody's.
How = Literal["next", "begins", "evaluation", "turning", "doubtful", "unclear"]
NEXT: Final = "next"
BEGINS: Final = "begins"
EVALUATION: Final = "evaluation"
TURNING: Final = "turning"
DOUBTFUL: Final = "doubtful"
UNCLEAR: Final = "unclear"


class StepTracker:
    """The sense of time of one denoiser."""

    def __init__(self, model: nn.Module) -> None:
        self.names = parameter_names(timed_forward(model))
        self.name = next((n for n in TIMESTEP_NAMES if n in self.names), None)
        self.place = self.names.index(self.name) if self.name else -1
        named = "hidden_states" in self.names or not self.names
        self.first = "hidden_states" if named else self.names[0]  # the latents
        self._rises = time_rises(model)
        self.ascending = self._rises  # the timesteps grow during a run
        # all timesteps of a run on a device, once they were looked at
        self._of: weakref.ref[Tensor] | None = None
        self._version, self._times = 0, list[float]()

    def clear(self) -> None:
        self.ascending = self._rises

    # --- what time it is ------------------------------------------------------------------------------------

    def argument(self, args: tuple, kwargs: dict) -> Any:
        """The model's timestep among its arguments; None without one."""
        if self.name is None:  # a signature that names nothing
            return (
                next((kwargs[n] for n in TIMESTEP_NAMES if n in kwargs), None) if kwargs else None
            )
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.place] if len(args) > self.place else None

    def told(self, call: Context | None, callback: Callable[[], Any] | None) -> float | None:
        """The timestep that was told: by the config's callback, read once per step, or by the context."""
        if callback is None or (value := callback()) is None:
            return None if call is None else call.timestep
        try:
            number = sync.scalar(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"current_timestep_callback returned {value!r}, must return a number or a tensor of one"
            ) from error
        return number if math.isfinite(number) else None  # not a number: no rule may reuse

    def moment(self, told: float | None, generation: Generation | None, value: Any) -> Moment:
        """When a call is. told: the timestep that was told. value: the model's own argument.

        A tensor on an accelerator is looked at where no pipeline tells which step runs.
        """
        tick = None if generation is None else generation.tick()
        time, mark = None, told
        if isinstance(value, Tensor):
            if value.device.type == "cpu":
                if value.numel():
                    time, mark = sync.extreme(value, self.ascending)
            elif tick is None and told is None:
                time, mark = self.look(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            time = mark = float(value)
        if time is not None and not math.isfinite(time):
            time, mark = None, told
        told = time if told is None else told
        if generation is None or tick is None or (mark is not None and generation.evaluations == 1):
            return moment_of(told, mark)
        return moment_of(told, generation.step_of(tick) if mark is None else mark, tick)

    def look(self, value: Tensor) -> tuple[float | None, Any]:
        """The timestep in a tensor on a device, and what calls of the same step have in common; nothing of an empty
        one. It is waited for, once for all steps where it is a view of all timesteps.
        """
        if not value.numel():
            return None, None
        base = value._base
        if (
            base is None
            or base.dim() != 1
            or any(s and n > 1 for s, n in zip(value.stride(), value.shape, strict=True))
        ):
            return sync.extreme(value, self.ascending)
        if self._of is None or self._of() is not base or self._version != base._version:
            self._of, self._version = weakref.ref(base), base._version
            self._times = sync.numbers([base])
        time = self._times[(value.storage_offset() - base.storage_offset()) // base.stride(0)]
        return time, time

    # --- which step it is -----------------------------------------------------------------------------------

    def index(
        self, state: State, call: Context, generation: Generation | None, moment: Moment
    ) -> tuple[int, How]:
        """The index of this step, and how it follows the call before.

        Raises ValueError where the same explicit step_index comes twice.
        """
        index, known = state.index, call.step_index
        if generation is not None and state.serial != generation.serial:
            return known or 0, BEGINS
        if known is None:
            if not index:
                return 0, NEXT
            if state.indexed:  # by somebody else, who does not say which step it is
                return 0, BEGINS
            mark, total = moment.mark, call.num_inference_steps or state.total
            if mark is not None and mark == state.mark:
                if generation is None and total == 1:
                    return 0, BEGINS
                again = moment.evaluation not in (None, state.evaluation)
                return index - 1, EVALUATION if again else UNCLEAR
            now, before = moment.clock, state.timestep
            if now is not None and before is not None and now != before:
                how = self.moved(state, generation, before, now)
                return (0 if how == BEGINS else index), how
            if total is not None and index >= total and generation is None:
                return 0, BEGINS
            return index, NEXT
        if index and known == index - 1 and (len(state.records) > 1 or call.calls):
            raise ValueError(
                f"step_index {known} came twice for request {call.request!r}, context {call.name!r}: a second "
                "call at the same step is another branch, give it a name of its own, as in "
                "cache.context('uncond', step_index=...)"
            )
        return known, BEGINS if known < index else NEXT

    def turned(self, state: State, call: Context, moment: Moment) -> bool:
        """Whether a call lies before the one before in its state, so that a run has begun."""
        if call.step_index is not None:
            return call.step_index < state.index
        now, before = moment.clock, state.timestep
        return now is not None and before is not None and self.backwards(before, now)

    def moved(self, state: State, generation: Generation | None, before: float, now: float) -> How:
        """How a call without a step index follows the one before in its state, time having moved."""
        if generation is None:
            return self._turned(state, before, now)
        if generation.loops or state.index == 1:
            state.rising = now > before  # nothing else has begun since
            return NEXT
        return NEXT if (now > before) == state.rising else BEGINS

    def _turned(self, state: State, before: float, now: float) -> How:
        """Whether time has turned back, where nobody has announced a run."""
        rising = now > before
        if rising == self.ascending:
            if state.turns and state.rising != rising:
                return BEGINS
            # two runs, the first of one step; or one that goes the other way, and then another
            if state.index > 1 or not state.leapt:
                return NEXT
            state.turns, state.rising = 1, rising
            return DOUBTFUL
        if state.index > 1 + state.turns or not _may_turn(before, now):
            # a run that begins high may as well be one that goes on upwards
            alone = state.index == 1 + state.turns
            state.leapt = alone and (state.leapt or now < 0.9 * _scale(before, now))
            return BEGINS
        # a run of one step and another one, or a run that goes the other way: computed until that is known
        return TURNING

    def learn(self, state: State, time: float) -> How:
        """Count a step against the direction of time; after some, it is the other one.

        At once where it was known beforehand and not seen: such a run would not have begun where this one has.
        """
        assert state.timestep is not None
        state.turns, state.rising = state.turns + 1, time > state.timestep
        if state.turns < TURNS and not self._rises:
            return TURNING
        self.ascending, state.turns = state.rising, 0
        return NEXT

    def backwards(self, before: float, now: float) -> bool:
        """Whether `now` lies earlier in a run than `before`."""
        return now < before if self.ascending else now > before


def _scale(before: float, now: float) -> float:
    """Where time begins that falls."""
    return 1.0 if max(before, now) <= 1 else 1000.0


def _may_turn(before: float, now: float) -> bool:
    """Whether these may be the first timesteps of a run that goes their way: it begins at its own end of the scale,
    and goes on by less than a leap to where runs begin that go the other way."""
    scale = _scale(before, now)
    if now < before:
        before, now = scale - before, scale - now
    return before < 0.5 * scale and now < 0.9 * scale
