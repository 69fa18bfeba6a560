# SPDX-License-Identifier: Apache-2.0
"""One schedule for all that is compared step by step, and how a contender runs on it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastcache.ops import dispatch

from . import common, systems
from .models import Subject
from .systems import Attached

STEPS, WARMUP, EVERY = 28, 4, 3
STACK_METHODS = ("MagCache", "FirstBlock", "Taylor on the stack")
METHODS = (*STACK_METHODS, "Guided", "TaylorSeer", "PAB", "FasterCache")
FLOORS = {
    0: "no blocks",
    1: "first block only",
}  # what a reused step must still run, by blocks kept
PASSES = "passes alone"
OUR_KEPT = {"MagCache": 0, "FirstBlock": 1, "Taylor on the stack": 0, "Guided": 1}


def schedule(steps: int) -> list[bool]:
    """True for computed steps."""
    return [i < WARMUP or (i - WARMUP + 1) % EVERY == 0 for i in range(steps)]


def idle() -> None:
    """Nothing to wait for on a CPU."""


def own_plan(method: str, steps: int) -> list[bool]:
    """The schedule that a method keeps: the common one, or for modules the nearest they can express."""
    if method == "TaylorSeer":
        return [i < WARMUP or (i - WARMUP - 1) % EVERY == 0 for i in range(steps)]
    if method in ("PAB", "FasterCache"):
        return [i % EVERY == 0 or timestep(i, steps) >= 900 for i in range(steps)]
    return schedule(steps)


def timestep(step: int, steps: int) -> float:
    return 1000.0 * (1 - step / steps)


class Inside:
    """Counts the seconds that blocks of one class take, while it is entered."""

    seconds = 0.0

    @contextmanager
    def __call__(self, kind: Any) -> Iterator[None]:
        forward, now = kind.forward, common.clock()

        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return forward(*args, **kwargs)
            finally:
                self.seconds += now() - start

        kind.forward = timed
        try:
            yield
        finally:
            kind.forward = forward


INSIDE = Inside()


class Passes(nn.Module):
    """In the place of FLUX's blocks: what must be done with a hidden state on a reused step, and no more.

    block: a first block that is run and looked at, or None.
    """

    def __init__(self, block: nn.Module | None) -> None:
        super().__init__()
        self.block = block
        self.residual: Any = None

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **inputs: Any) -> Any:
        x = hidden_states
        if self.residual is None:
            self.residual = torch.zeros_like(x)
            self.look = dispatch.resolve("residual_l1", [x, x, self.residual])[0]
        if self.block is None:
            return encoder_hidden_states, x + self.residual
        text, y = self.block(x, encoder_hidden_states, **inputs)
        change, size = self.look(y, x, self.residual).tolist()
        self.change = change / (size or 1.0)
        return text, y + self.residual

    __call__ = forward  # without what modules do around it


# --- contenders -----------------------------------------------------------------------------------------


@dataclass
class Contender:
    """One way to make a run. force: told before every step whether it must compute."""

    system: str
    method: str
    compiled: str
    call: Callable[..., Any]
    attached: Attached | None = None
    force: Callable[[bool], object] | None = None
    kept: int | None = None  # blocks that a reused step still runs; None: has no floor
    part: nn.Module | None = None  # what a floor runs on reused steps
    times: list[list[float]] = field(default_factory=list)
    around: list[float] = field(default_factory=list)  # of the last run: steps less their blocks
    pairs: list[tuple] = field(default_factory=list)  # the same of each round, and of the floor's
    peak: int | None = None  # most bytes alive in a run from nothing, eager

    def above(self, floor: Contender, subject: Subject, sync: Callable[[], object]) -> None:
        """A run of the floor, then one of this, on the same schedule."""
        floor.run(subject, sync)
        floor.times.pop()
        below = floor.around
        self.run(subject, sync)
        self.pairs.append((self.around, below))

    def own(self) -> list[float]:
        """Seconds that each reused step takes above the floor's: other load on the machine only ever adds to a
        time, so each side is its 20th percentile over the rounds."""
        mine, below = (zip(*rounds, strict=True) for rounds in zip(*self.pairs, strict=True))
        quiet = [[common.quantiles(times)["p20"] for times in side] for side in (mine, below)]
        plan = schedule(len(quiet[0]))
        return [a - b for computed, a, b in zip(plan, *quiet, strict=True) if not computed]

    def run(self, subject: Subject, sync: Callable[[], object]) -> None:
        """One whole run, timed step by step."""
        steps, plan, times = len(subject.calls), schedule(len(subject.calls)), []
        now = time.perf_counter if sync is not idle else common.clock()
        self.around = []
        for i in range(steps):
            self.announce(i, plan)
            sync()
            INSIDE.seconds = 0.0
            start = now()
            self.step(subject, i)
            sync()
            times.append(now() - start)
            self.around.append(times[-1] - INSIDE.seconds)
        self.reset()
        self.times.append(times)

    def announce(self, step: int, plan: list[bool]) -> None:
        """What is said before a step, and not timed."""
        systems.CLOCK["t"] = timestep(step, len(plan))
        if self.force is not None:
            self.force(plan[step])

    def step(self, subject: Subject, step: int) -> Any:
        with self._context(step, len(subject.calls)):
            return self.call(**subject.calls[step])

    def reset(self) -> None:
        """The end of a run."""
        if self.attached is not None:
            self.attached.reset()

    def _context(self, step: int, steps: int) -> AbstractContextManager[Any]:
        if self.attached is None:
            return nullcontext()
        return self.attached.context("cond", step, steps, timestep(step, steps))
