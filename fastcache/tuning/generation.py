# SPDX-License-Identifier: Apache-2.0
"""A user's generation, called with what it declares, and what one run of it gives."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from .. import sync
from ..cache import enable
from ..models.pipeline import denoisers_of
from ..policies import COMPUTE
from ..recipe import Recipe
from ..runtime.notices import quietly
from ..runtime.patch import refuse_enabled
from ..runtime.stats import Record, Stats
from .pictures import Picture, pictures_in

OFFERED = ("cache", "num_inference_steps", "seed")


class NoCache:
    """What a generation that declares `cache` is given for a run without one: its contexts do nothing."""

    enabled = False

    def __init__(self) -> None:
        self.stats = Stats()

    def context(self, *args: Any, **kwargs: Any) -> nullcontext[None]:
        """As `Cache.context`."""
        return nullcontext()

    run = context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """As `Cache.reset`."""


class Shares(NamedTuple):
    """What parts of one run took, in computed calls of that run, so that it counts alike on a busy machine."""

    reuse: float | None  # a call that reuses; None: there was none
    rest: float  # all besides calls, before the first, and after the last


@dataclass(frozen=True)
class Outcome:
    """What one run gave: pictures, seconds, and under a cache how many of its calls were computed."""

    pictures: list[Picture]
    seconds: float
    steps: int = 0  # as the denoisers count them
    calls: int = 0  # of the denoisers
    computed: int = 0  # of those, in which every rule computed
    marks: tuple[bool, ...] = ()  # computed steps of every branch alike; () where branches differ
    shares: Shares | None = None  # None: not known


class Generation:
    """The function that tune was given, on the target that it was given.

    Raises:
        TypeError, ValueError: that names `generate` or `target`.
    """

    def __init__(self, generate: Callable[..., Any], target: Any) -> None:
        self.function, self.target = generate, target
        self.takes = declared(generate)
        self.models = denoisers_of(target)
        refuse_enabled(self.models)
        tensor = next((p for _, m in self.models for p in m.parameters()), None)
        self.device = torch.device("cpu") if tensor is None else tensor.device
        self.dtype = "" if tensor is None else str(tensor.dtype).removeprefix("torch.")
        # on one thread the time of that thread: waiting for other processes is no cost of a run
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if alone else time.perf_counter

    @property
    def model_name(self) -> str:
        """Classes of the denoisers, as words."""
        return ", ".join(dict.fromkeys(type(model).__name__ for _, model in self.models))

    @property
    def default_steps(self) -> int | None:
        """The number of steps that the function takes where it is told none; None where it does not say."""
        if "num_inference_steps" not in self.takes:
            return None
        default = inspect.signature(self.function).parameters["num_inference_steps"].default
        return default if isinstance(default, int) else None

    def run(self, recipe: Recipe | None, steps: int, seed: int) -> Outcome:
        """One generation; the target is as before, also after an error."""
        with quietly():  # what there is to say of recipes is said of the best
            if recipe is None:
                pictures, seconds = self._timed(NoCache(), steps, seed)
                return Outcome(pictures, seconds)
            moments: list[Any] = []

            def note(record: Record | None) -> None:
                moments.append(sync.moment(self.device, self.clock))

            with enable(self.target, recipe) as cache:
                cache.stats.watch = note
                pictures, seconds = self._timed(cache, steps, seed, note)
                records = tuple(cache.stats)
        computed = sum(r.action == COMPUTE for r in records)
        last: dict[str, int] = {}
        for r in records:
            last[r.model] = max(last.get(r.model, 0), r.step + 1)
        counts = sum(last.values()), len(records), computed
        return Outcome(pictures, seconds, *counts, marks_of(records), shares_of(records, moments))

    def _timed(
        self, cache: Any, steps: int, seed: int, note: Callable[[None], None] = lambda record: None
    ) -> tuple[list[Picture], float]:
        """note: told when the run begins and when it ends."""
        with torch.no_grad():
            sync.wait(self.device)
            start = self.clock()
            note(None)
            made = self.call(cache, steps, seed)
            note(None)
            sync.wait(self.device)
            seconds = self.clock() - start
        return pictures_in(made), seconds

    def call(self, cache: Any, steps: int, seed: int) -> Any:
        """The function itself, with those of what is offered that it declares."""
        offered = {"cache": cache, "num_inference_steps": steps, "seed": seed}
        return self.function(**{name: offered[name] for name in self.takes})


def declared(generate: Any) -> tuple[str, ...]:
    """Those of `cache`, `num_inference_steps` and `seed` that a function declares by name."""
    if not callable(generate):
        raise TypeError(
            f"tune: generate is {type(generate).__name__}, must be a function that performs one generation and "
            f"declares those of {', '.join(OFFERED)} that it takes"
        )
    try:
        parameters = inspect.signature(generate).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    for name, p in parameters.items():
        named = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        needed = p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        if needed and (name not in OFFERED or not named):
            raise ValueError(
                f"tune: generate needs the argument {name!r}, which tune does not know; it passes "
                f"{', '.join(OFFERED)} by name, so give other arguments defaults"
            )
    return tuple(n for n in OFFERED if n in parameters)


def marks_of(records: tuple[Record, ...]) -> tuple[bool, ...]:
    """Which steps were computed, where all branches of one model did alike; else ()."""
    branches: dict[tuple[str, Any, str], list[tuple[int, bool]]] = {}
    for r in records:
        steps = branches.setdefault((r.model, r.request, r.context), [])
        steps.append((r.step, r.action == COMPUTE))
    found = list(branches.values())
    if (
        not found
        or any(steps != found[0] for steps in found)
        or len({r.model for r in records}) > 1
    ):
        return ()
    if [step for step, _ in found[0]] != list(range(len(found[0]))):
        return ()
    return tuple(mark for _, mark in found[0])


def shares_of(records: tuple[Record, ...], moments: list[Any]) -> Shares | None:
    """moments: the start of a run, one per record, and the end. A call is noted when it is over."""
    if not records or len(records) + 2 != len(moments):
        return None
    before, *spans, after = [sync.between(start, end) for start, end in pairwise(moments)]
    taken: dict[bool, list[float]] = {True: [], False: []}
    for record, span in zip(records[1:], spans, strict=True):
        taken[record.action == COMPUTE].append(span)
    computed, reused = taken.values()
    if not computed:
        return None
    call = max(statistics.median(computed), 1e-9)
    # the first call computes, and is not told from what comes before it
    rest = max(before + after - call, 0.0) / call
    return Shares(statistics.fmean(reused) / call if reused else None, rest)
