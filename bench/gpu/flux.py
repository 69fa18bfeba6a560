# SPDX-License-Identifier: Apache-2.0
"""FLUX.1 at full size with random weights, and one whole run of a contender as a row."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .. import common
from ..common import Row
from ..contenders import STEPS, Contender, schedule
from ..models import MODELS, Subject
from .session import Session

TOKENS = 4096  # 1024 x 1024 pixels; a prompt adds 512
TINY = {"num_attention_heads": 1, "num_layers": 2, "num_single_layers": 2}


def build(session: Session, name: str = "flux", tokens: int = TOKENS) -> Subject:
    """The model and the inputs of a run; in a dry run one that takes no time."""
    make: Any = MODELS[name]
    if session.dry:
        make = dataclasses.replace(make, fields={**make.fields, **TINY})
        return make(1, 10, 16, "cpu")
    start = time.perf_counter()
    subject = make(1, STEPS, tokens, session.device)
    torch.cuda.synchronize()
    parameters = sum(p.numel() for p in subject.model.parameters())
    seconds = time.perf_counter() - start
    session.row("model", model=subject.name, parameters=parameters, seconds=seconds)
    return subject


class Clock:
    """Marks in the device's own time, which cost the host nothing to wait for; on a CPU the host's."""

    def __init__(self, device: str) -> None:
        self.device, self.marks = device, []  # type: ignore[var-annotated]

    def mark(self) -> None:
        if self.device == "cpu":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def between(self) -> list[float]:
        """Seconds from each mark to the next."""
        if self.device == "cpu":
            return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)]
        torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def whole_run(
    contender: Contender, subject: Subject, device: str
) -> tuple[float, list[float], Any]:
    """Seconds of a run by the host's clock, of each step by the device's, and the last output.

    Nothing waits between steps, so that a step that the host is late for shows as a longer one.
    """
    plan = schedule(len(subject.calls))
    clock, output = Clock(device), None
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    clock.mark()
    for i in range(len(plan)):
        contender.announce(i, plan)
        output = contender.step(subject, i)
        clock.mark()
    steps = clock.between()
    seconds = time.perf_counter() - start
    contender.reset()
    return seconds, steps, output


def measure(
    session: Session,
    subject: Subject,
    make: Callable[[], Contender],
    label: tuple[str, str, str],
    warm: int = 1,
) -> None:
    """One contender: runs that warm up, a timed one, one row.

    label: system, method and what compiles it, for the case that it cannot even be made.
    """
    columns = dict(zip(("system", "method", "compiled"), label, strict=True))
    with session.attempt("run", **columns):
        before = memory(session.device)
        contender = make()
        first = [whole_run(contender, subject, session.device)[0] for _ in range(warm)]
        seconds, steps, output = whole_run(contender, subject, session.device)
        session.row(
            "run",
            **columns,
            model=subject.name,
            run_s=seconds,
            warm_s=first,
            **by_kind(contender, steps),
            finite=bool(output[0].isfinite().all()),
            peak_bytes=peak(session.device) - before,
            cache_bytes=contender.attached.nbytes() if contender.attached else None,
        )


def by_kind(contender: Contender, steps: list[float]) -> Row:
    """Milliseconds of computed and of reused steps, and how many there were of each."""
    plan = schedule(len(steps))
    skips = contender.attached is not None or contender.force is not None
    kinds: dict[str, list[float]] = {"computed": [], "reused": []}
    for computes, took in zip(plan, steps, strict=True):
        kinds["computed" if computes or not skips else "reused"].append(took)
    row: Row = {"steps": len(plan), "computed": len(kinds["computed"])}
    for kind, found in kinds.items():
        if found:
            row |= {f"{kind}_ms_{p}": v * 1e3 for p, v in common.quantiles(found).items()}
    if contender.attached is not None and contender.attached.cache is not None:
        stats = contender.attached.cache.stats
        row["decided"] = {"computed": stats.computed, "reused": stats.reused}
    return row


def memory(device: str) -> int:
    """Bytes allocated now, without what is only waiting to be collected; the peak is counted from here."""
    gc.collect()
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.max_memory_allocated()


def measure_all(
    session: Session,
    subject: Subject,
    found: dict[tuple[str, str, str], Callable[[], Contender]],
    wanted: Iterable[tuple[str, str, str]],
    warm: int = 1,
) -> None:
    """A row at once after each; one that is not there has a row that says so."""
    for label in wanted:
        if label in found:
            measure(session, subject, found[label], label, warm)
        else:
            columns = dict(zip(("system", "method", "compiled"), label, strict=True))
            session.row("run", **columns, skipped="not installed here")
