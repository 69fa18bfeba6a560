# SPDX-License-Identifier: Apache-2.0
"""Cached tensors and the host facts about them, one State per (request, context).

Storage is allocated once per shape, written in place and never rebound, so that compiled and captured
code may hold its addresses. Whether it holds anything valid is a host fact kept beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.alike import Alike, never
from ..policies import Run
from .allocate import device_of, static
from .group import Keeps
from .history import Timeline
from .unit import Unit

# Why a step does without storage that others have taken after the last step that read it.
SPENT = "nothing reads what it would store"

JUDGED = 1000  # records of a run that its end is judged by, the latest ones


class EndedRun(NamedTuple):
    """A run that is over."""

    key: tuple[Any, str]  # request, context
    records: Sequence[Any]  # of its latest steps
    measured: list[Tensor]  # of a calibration
    computed: int  # values that the first rule has stored
    total: int | None = None  # steps, where their number was known


class State:
    """All that is remembered for one (request, context)."""

    __slots__ = (
        "__weakref__",
        "armed_step",
        "away",
        "ends",
        "evaluation",
        "evicted",
        "held",
        "index",
        "indexed",
        "key",
        "known",
        "leapt",
        "mark",
        "measured",
        "next",
        "passed",
        "place",
        "records",
        "rising",
        "runs",
        "serial",
        "signature",
        "slots",
        "start",
        "step_timestep",
        "steps_until_full_batch",
        "stream",
        "timelines",
        "timestep",
        "total",
        "trip",
        "turns",
        "uncached_step",
        "unclear",
        "units",
        "used",
        "without",
    )

    def __init__(self, key: tuple[Any, str], rules: int) -> None:
        self.key = key
        self.fit(None)
        self.units: list[dict[Any, Unit]] = [{} for _ in range(rules)]
        self.timelines: list[Timeline] = []
        self.slots: list[Any] = []  # per rule a SlotGroup: what else it keeps
        self.away = 0  # bytes that lie in host memory for the time being
        self.held = 0  # bytes after the last call, and
        self.used = 0  # number of that call: both kept where there is a budget
        self.next: Any = (
            None  # weakly, the state whose call came after its last one: kept there too
        )
        self.stream: Any = None  # the CUDA stream that used the storage last
        self.trip: Any = None  # what its branches have in common, kept alive by them
        self.leapt = False  # time went the other way than it does, where no run of that way begins
        self.begin_run()

    def fit(self, signature: tuple | None) -> None:
        """Its storage is for calls of this signature from now on; None: for none yet."""
        self.signature: Any = signature
        self.known: Alike = never  # tells at once that a call has it, once one was seen

    def restart(self) -> None:
        """Begin a run: nothing of an earlier one can be read any more, buffers included."""
        self.begin_run()
        self.empty()

    def begin_run(self) -> None:
        """The facts of a run that has not begun. Storage must be empty."""
        self.index = 0  # of the next step
        self.indexed = False  # the last call was told which step it was
        self.uncached_step = False  # the running step does without a cache
        self.evicted = False  # its storage went to other runs
        self.without = ""  # why the rest of the run does without storage, if it does
        self.total: int | None = None  # steps in the run, where known
        self.ends: int | None = None  # steps after which nothing reads its storage, where known
        self.timestep: float | None = None  # of the last step, as the run's clock reads it
        self.step_timestep: float | None = None  # of the running step, as the rules read it
        self.armed_step = 0  # index of the running step
        self.start = (
            0  # step index that the run began at, where another denoiser had the steps before
        )
        self.mark: Any = None  # what told the step of the last call from others
        self.evaluation: int | None = None  # of the solver, in the last call
        self.serial = 0  # of the announced loop that the run belongs to
        self.turns, self.rising = (
            0,
            False,
        )  # steps against the direction of time, and which way they go
        self.unclear = False  # the last call may have been another branch's
        self.passed, self.place = 0, 0.0  # of the last call among those of its request
        # computed steps until a stack's history holds both halves of a guidance batch again
        self.steps_until_full_batch = 0
        self.runs: list[Run] = []  # what each policy remembers
        self.measured: list[Tensor] = []  # magnitude ratios of a calibration, on the device
        self.records: deque[Any] = deque(maxlen=JUDGED)  # of its steps, oldest first

    def doubt(self) -> None:
        """Forget what this run has computed: it may be of others. The run itself goes on."""
        self.runs, self.steps_until_full_batch = [], 0
        self.empty()

    def empty(self) -> None:
        """Forget what storage holds, and overwrite it with zeros."""
        for timeline in self.timelines:
            timeline.clear()
        for units in self.units:
            for unit in units.values():
                unit.forget()
        for group in self.slots:
            group.forget()
        for t in self.tensors():
            t.zero_()

    def make_static(self) -> None:
        """Tell compiled code of storage that was allocated before anything was compiled."""
        for timeline in self.timelines:
            if timeline.staged is not None:
                for name in ("order", "row", "scale", "weights"):
                    static(getattr(timeline.staged, name))
        for keeper in self._keepers():
            keeper.make_static()

    @property
    def device(self) -> torch.device:
        """That of its calls: an accelerator, where any of their tensors lies on one."""
        return device_of(self.signature or ())

    @property
    def spent(self) -> bool:
        """Whether nothing reads its storage any more: the run is complete, or computes all steps that are left."""
        return self.complete or (self.ends is not None and self.index >= self.ends)

    @property
    def complete(self) -> bool:
        """Whether all steps of the run are done, where their number is known."""
        return self.total is not None and self.index >= self.total

    def nbytes(self) -> int:
        """Bytes of cached tensors; those in host memory for the time being are not counted."""
        return 0 if self.away else sum(t.numel() * t.element_size() for t in self.tensors())

    def tensors(self) -> list[Tensor]:
        """All cached tensors."""
        return [t for keeper in self._keepers() for t in keeper.tensors()]

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep all cached tensors in other storage from now on; compiled code must not know the old one."""
        for keeper in self._keepers():
            keeper.move(to)

    def _keepers(self) -> Iterator[Keeps]:
        """What keeps cached tensors."""
        for units in self.units:
            for unit in units.values():
                yield from unit.streams
        yield from self.slots
