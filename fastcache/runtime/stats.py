# SPDX-License-Identifier: Apache-2.0
"""What happened: one record per denoiser call, and its summary in words."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from .. import sync
from ..policies import COMPUTE, REUSE

# What is said of contexts that no model was called in.
UNCALLED = (
    "{} contexts were opened and closed without a call of the model inside: what drives its blocks calls them past "
    "the model's forward, so nothing is cached; call the model itself, or enable the module whose forward runs them"
)

IDLE = 3  # contexts without a call, before the first one, until it is said

KEEP = 100_000  # records kept, so that a server that never resets does not grow


class Record(NamedTuple):
    """One denoiser call.

    Args:
        request: whose call it was.
        context: name of the branch, such as "cond".
        step: number of the step in its run, from 0.
        action: "compute", or "reuse" where some rule reused.
        signal: what the rule looked at, a float: relative change, accumulated error, timestep; None where it
            looked at nothing.
        threshold: what the signal was weighed against, in its unit; None where there is none.
        reason: why, in words.
        timestep: of the call, in the model's scale; None where it was not known on the host.
        actions: one per rule, "compute" or "reuse".
        model: name of the denoiser.
    """

    request: Any
    context: str
    step: int
    action: str
    signal: float | None
    threshold: float | None
    reason: str
    timestep: float | None = None
    actions: tuple[str, ...] = ()
    model: str = ""


class Stats:
    """Records in order of calls, the latest 100,000. Iterable, indexable; `computed` and `reused` count.

    `fallbacks` counts, by op, calls on large tensors of a GPU that ran on the reference in place of a kernel.
    """

    def __init__(self) -> None:
        self._all: deque[Record] = deque(maxlen=KEEP)
        self._pending = False  # some signals are still on the device
        # of large tensors on a GPU, the ops that ran on the reference in place of a kernel: calls
        self.fallbacks: Counter[str] = Counter()
        self.idle = 0  # contexts that no call was made in
        self.watch: Callable[[Record], object] | None = None  # told of every record, while set

    def add(self, record: Record) -> None:
        """Append a record.

        Args:
            record: the call. Its signal may be a tensor of [signal] or [signal, whether it reused], which stays
                on its device until somebody looks.
        """
        if type(record.signal) is not float and record.signal is not None:
            self._pending = True
        self._all.append(record)
        if self.watch is not None:
            self.watch(record)

    def uncalled(self) -> str:
        """Count a context that no call was made in; what there is to say about that, once, else ""."""
        self.idle += 1
        return "" if self._all or self.idle != IDLE else f"fastcache: {UNCALLED.format(self.idle)}"

    @property
    def _records(self) -> deque[Record]:
        """The records, late signals read."""
        if self._pending:
            self._all = deque(known(self._all), maxlen=KEEP)
            self._pending = False
        return self._all

    def clear(self) -> None:
        """Forget the records and the counts."""
        self._all.clear()
        self.fallbacks.clear()
        self.idle = 0

    def __iter__(self) -> Iterator[Record]:
        return iter(tuple(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return tuple(self._records)[index] if isinstance(index, slice) else self._records[index]

    def __repr__(self) -> str:
        return f"Stats({self.computed} computed, {self.reused} reused)"

    @property
    def computed(self) -> int:
        """Calls in which every rule computed, a count."""
        return sum(r.action == COMPUTE for r in self._records)

    @property
    def reused(self) -> int:
        """Calls in which some rule reused, a count."""
        return sum(r.action == REUSE for r in self._records)

    def last_run(self, model: str, request: Any, context: str) -> list[Record]:
        """The records of the latest run of one context, in order.

        Args:
            model: name of the denoiser, as `Record.model` has it.
            request: whose run.
            context: name of the branch.
        Returns:
            A list, step 0 first; empty where there is no such run.
        """
        run: list[Record] = []
        for r in reversed(self._records):
            if (r.model, r.request, r.context) != (model, request, context):
                continue
            if run and r.step >= run[-1].step:
                break
            run.append(r)
        return run[::-1]

    def lines(self) -> list[str]:
        """The summary in words, a line each: totals, a strip per context, reasons."""
        total = len(self._records)
        if not total:
            return ["no denoiser call yet", *([UNCALLED.format(self.idle)] if self.idle else [])]
        lines = [
            f"{total} denoiser calls: {self.computed} computed, {self.reused} reused ({self.reused / total:.0%})"
        ]
        rows: dict[tuple, list[Record]] = {}
        for r in self._records:
            rows.setdefault((r.model, r.request, r.context), []).append(r)
        for (model, request, context), records in list(rows.items())[:12]:
            strip = "".join("C" if r.action == COMPUTE else "." for r in records[-60:])
            lines.append(f"  {model} request {request!r}, context {context!r}: {strip}")
        if len(rows) > 12:
            lines.append(f"  ... and {len(rows) - 12} more contexts")
        reasons = Counter((r.action, r.reason) for r in self._records)
        lines += [
            f"  {action:<7} {count:>5} x {reason}"
            for (action, reason), count in reasons.most_common()
        ]
        lines += [f"  without a kernel {n:>5} x {op}" for op, n in self.fallbacks.most_common()]
        return lines


def known(records: Iterable[Record]) -> list[Record]:
    """The records, signals that are still on a device read: once per device."""
    found, late = list(records), dict[Any, list[int]]()
    for i, record in enumerate(found):
        if isinstance(record.signal, Tensor):
            late.setdefault(record.signal.device, []).append(i)
    for places in late.values():
        signals: list[Any] = [found[i].signal for i in places]
        numbers = iter(sync.numbers(signals))
        for i, signal in zip(places, signals, strict=True):
            number, *reused = islice(numbers, signal.numel())
            found[i] = found[i]._replace(signal=number)
            if reused:  # the device has decided
                action = REUSE if reused[0] else COMPUTE
                found[i] = found[i]._replace(action=action, actions=(action,))
    return found
