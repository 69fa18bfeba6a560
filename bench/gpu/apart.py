# SPDX-License-Identifier: Apache-2.0
"""One reused step of FLUX.1 taken apart: kernels, what the device did between them, the host.

The step is profiled for what it consists of and timed without the profiler, which slows the host.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from .. import catalogue, common
from ..common import Row
from ..contenders import WARMUP, Contender, schedule
from ..models import Subject
from . import flux
from .session import Session

WANTED = (
    ("fastcache", "MagCache", ""),
    ("fastcache", "FirstBlock", ""),
    ("diffusers", "MagCache", ""),
    ("diffusers", "FirstBlock", ""),
    ("uncached", "no blocks", ""),
)
MOST = 12  # kinds of kernels in a row


class Span(NamedTuple):
    """Something that the device did, in microseconds."""

    name: str
    start: float
    end: float


def run(session: Session) -> None:
    subject = flux.build(session)
    found = catalogue.eager(subject)
    for label in (w for w in WANTED if w in found):
        columns = dict(zip(("system", "method"), label, strict=False))
        with session.attempt("step", **columns):
            session.row("step", **columns, **apart(found[label](), subject, session.device))


def apart(contender: Contender, subject: Subject, device: str) -> Row:
    """A run that warms up; then of a second one, one reused step profiled and the others timed."""
    plan = schedule(len(subject.calls))
    profiled = next(i for i in range(WARMUP, len(plan)) if not plan[i])
    flux.whole_run(contender, subject, device)
    enqueued, waited, row = [], [], Row()
    for i in range(len(plan)):
        contender.announce(i, plan)
        if i == profiled:
            row = look(contender, subject, i, device)
            continue
        synchronize(device)
        start = time.perf_counter()
        contender.step(subject, i)
        returned = time.perf_counter()
        synchronize(device)
        if not plan[i]:
            enqueued.append(returned - start)
            waited.append(time.perf_counter() - start)
    contender.reset()
    row["host_us"] = common.quantiles(enqueued)["p50"] * 1e6  # until the call returned
    row["step_us"] = common.quantiles(waited)["p50"] * 1e6  # until the device was done too
    return row


def look(contender: Contender, subject: Subject, step: int, device: str) -> Row:
    """What the profiler saw of one step."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    synchronize(device)
    with profile(activities=kinds) as seen:
        contender.step(subject, step)
        synchronize(device)
    return summary(spans(seen.events() or []))


def spans(events: Sequence[Any]) -> list[Span]:
    """What ran on the device, in order."""
    kind = torch.autograd.DeviceType.CUDA
    ran = [e for e in events if e.device_type == kind]
    found = [Span(e.name, e.time_range.start, e.time_range.end) for e in ran]
    return sorted(found, key=lambda s: s.start)


def summary(ran: Sequence[Span]) -> Row:
    """Counts, busy time and gaps of what the device did in one step.

    read_gap_us: what it stands still between the first copy to the host and what comes next, which is
    where a decision is waited for; None where nothing is read.
    """
    kernels = [s for s in ran if not s.name.startswith(("Memcpy", "Memset"))]
    busy, gaps, end = 0.0, [], None
    read_gap: float | None = None
    last: Span | None = None
    for span in ran:
        if last is not None and end is not None:
            gap = max(0.0, span.start - end)
            gaps.append(gap)
            if last.name.startswith("Memcpy DtoH") and read_gap is None:
                read_gap = gap
        busy += max(0.0, span.end - max(span.start, end or span.start))
        end, last = max(span.end, end or span.end), span
    names = Counter(s.name[:80] for s in kernels)
    took: dict[str, float] = {}
    for s in kernels:
        took[s.name[:80]] = took.get(s.name[:80], 0.0) + s.end - s.start
    longest = sorted(took.items(), key=lambda item: -item[1])[:MOST]
    return {
        "kernels": len(kernels),
        "to_device": sum("HtoD" in s.name for s in ran),
        "to_host": sum("DtoH" in s.name for s in ran),
        "busy_us": busy,
        "span_us": ran[-1].end - ran[0].start if ran else 0.0,
        "largest_gap_us": max(gaps, default=0.0),
        "read_gap_us": read_gap,
        "longest": [[name, names[name], us] for name, us in longest],
    }


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
