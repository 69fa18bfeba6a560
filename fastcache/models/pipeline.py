# SPDX-License-Identifier: Apache-2.0
"""The denoisers of a pipeline, and what it says about the loop that drives them."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

from torch import Tensor, nn

from .. import sync

DENOISERS = ("transformer", "transformer_2", "transformer_3", "unconditional_transformer")
EXPERTS = DENOISERS[:2]  # those that may share a run between them


def denoisers_of(target: Any) -> list[tuple[str, nn.Module]]:
    """The models to hook, each once, with their names; what torch.compile wrapped is unwrapped."""
    if isinstance(target, nn.Module):
        model = getattr(target, "_orig_mod", target)
        return [(type(model).__name__, model)]
    found: list[tuple[str, nn.Module]] = []
    for name in DENOISERS:
        model = getattr(target, name, None)
        model = getattr(model, "_orig_mod", model)
        if isinstance(model, nn.Module) and all(model is not m for _, m in found):
            found.append((name, model))
    if not found:
        raise TypeError(
            f"target is {type(target).__name__}, must be an nn.Module or a pipeline with a denoiser named one of "
            f"{DENOISERS}"
        )
    return found


class Schedule:
    """What a pipeline says about the loop over timesteps that it runs: its length, and where it is.

    Names are those of diffusers 0.36 to 0.42. Tensors on a device are read at most once per loop, and only for
    solvers of second order and pipelines with two experts.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.forget()

    def forget(self) -> None:
        """Another loop begins."""
        self.steps: int | None = None  # as announced
        self._times: list[float] | None = None
        self._evaluations = 0
        self._timesteps: Any = None  # the scheduler's, as the loop began, and
        self._index = -1  # of its latest step

    def now(self) -> Any:
        """An object or a number that is another one in the next evaluation; None where nothing tells."""
        facts = vars(self.pipeline)
        if (now := facts.get("_current_timestep")) is not None:
            return now
        scheduler = vars(self._scheduler)
        if "_step_index" not in scheduler:
            return None
        index = scheduler["_step_index"]
        return "the first" if index is None else index

    def anew(self) -> bool:
        """Whether the scheduler was set for another loop, or was put back to its first step."""
        scheduler = self._scheduler
        timesteps, index = getattr(scheduler, "timesteps", None), vars(scheduler).get("_step_index")
        before, last = self._timesteps, self._index
        self._timesteps, self._index = timesteps, index if isinstance(index, int) else -1
        return before is not None and (timesteps is not before or self._index < last)

    @property
    def _scheduler(self) -> Any:
        return getattr(self.pipeline, "scheduler", None) or _NOTHING

    @property
    def calls(self) -> int | None:
        """Evaluations of the loop."""
        counted = vars(self.pipeline).get("_num_timesteps")
        return counted if isinstance(counted, int) else self.steps

    @property
    def evaluations(self) -> int:
        """How often a branch is called at the same timestep."""
        if not self._evaluations:
            order = self._scheduler.order if hasattr(self._scheduler, "order") else 1
            same = groupby(self.times()) if isinstance(order, int) and order > 1 else ()
            self._evaluations = max((len(list(group)) for _, group in same), default=1)
        return self._evaluations

    def times(self) -> list[float]:
        """The timesteps of the loop, one per evaluation; empty where they are not known."""
        if self._times is None:
            held, calls = getattr(self._scheduler, "timesteps", None), self.calls
            known = sync.numbers([held]) if isinstance(held, Tensor) and held.dim() == 1 else []
            self._times = known if calls is None else known[-calls:] if calls else []
        return self._times

    def step_of(self, evaluation: int) -> int:
        """The step that an evaluation belongs to."""
        times = self.times()[: evaluation + 1]
        return sum(a != b for a, b in pairwise(times)) + max(evaluation + 1 - len(times), 0)

    def total(self, name: str) -> int | None:
        """Steps of the loop that the denoiser of this name takes."""
        stretches = self._stretches()
        if stretches is not None:
            return stretches.get(name)
        if self.evaluations == 1:
            return self.calls
        return len(list(groupby(self.times())))

    def _stretches(self) -> dict[str, int] | None:
        """Steps per expert, where two share a run and the timestep at which they change is known."""
        ratio = getattr(getattr(self.pipeline, "config", None), "boundary_ratio", None)
        if ratio is None or any(getattr(self.pipeline, n, None) is None for n in EXPERTS):
            return None
        whole = getattr(getattr(self._scheduler, "config", None), "num_train_timesteps", 1000)
        high = [t >= ratio * whole for t, _ in groupby(self.times())]
        return dict(zip(EXPERTS, (sum(high), len(high) - sum(high)), strict=True)) if high else None


class _Nothing:
    """In place of a scheduler, where a pipeline has none."""


_NOTHING = _Nothing()
