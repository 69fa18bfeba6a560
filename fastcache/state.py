"""Cached tensors and the host facts about them, one State per (request, context).

Storage is allocated once per shape, written in place and never rebound, so that compiled and captured
code may hold its addresses. Whether it holds anything valid is a host fact kept beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import direct
from .policies import Run
from .predictors import Predictor

_store = direct("residual_store_")
_apply = direct("residual_apply_")
_combine = direct("linear_combine_")
_combine_device = direct("linear_combine_device_")
_update = direct("taylor_update_")
_quantize = direct("_quantize_store_")
_dequantize = direct("_quantized_combine_")
FP8 = torch.float8_e4m3fn
KERNEL_TERMS = 5


class NoRoom(RuntimeError):
    """There was no memory for a cached tensor."""


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed tensor that may be written in place in any mode and whose address compiled code may keep.

    Raises NoRoom where the memory for it is not there.
    """
    try:
        with torch.inference_mode(False):
            return static(torch.zeros(shape, dtype=dtype, device=device))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            raise NoRoom(f"no memory for a cached tensor of {tuple(shape)}: {error}") from error
        raise


def static(t: Tensor) -> Tensor:
    """The same tensor; compiled code is told, where there may be any, that its address does not change."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.mark_static_address(t, guard=False)
    return t


class Timeline:
    """Which steps a history holds, newest first; shared by all tensors that one rule caches."""

    __slots__ = ("depth", "pushes", "rows", "staged", "steps")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.staged: Any = None  # a Staged, once compiled code asks for it
        self.clear()

    def clear(self) -> None:
        self.steps: tuple[int, ...] = ()
        self.rows: tuple[int, ...] = ()
        self.pushes = 0

    def push(self, step: int) -> None:
        """Record that every unit has stored its value for `step` in `next_row`."""
        if self.depth:
            self.rows = (self.next_row, *self.rows)[: self.depth]
            self.steps = (step, *self.steps)[: self.depth]
        self.pushes += 1

    @property
    def next_row(self) -> int:
        return self.pushes % self.depth if self.depth else 0

    def gap(self, step: int) -> int:
        """Steps since the newest value; 1 where there is none or time stood still."""
        return max(step - self.steps[0], 1) if self.steps else 1


class Staged:
    """The same facts as small device tensors, for compiled code: filled by the host before a step."""

    __slots__ = ("filled", "order", "row", "scale", "weights")

    def __init__(self, depth: int, device: torch.device) -> None:
        depth = max(depth, 1)
        self.weights = allocate((depth,), torch.float32, device)  # newest first
        self.order = allocate((depth,), torch.int64, device)  # ring rows, newest first
        self.row = allocate((1,), torch.int64, device)  # where the next value goes
        self.scale = allocate(
            (depth,), torch.float32, device
        )  # per order: 1 / gap, or 0 where invalid
        self.filled: dict[str, Sequence[float]] = {}  # what each tensor holds

    def fill(self, name: str, values: Sequence[float]) -> None:
        """Copy to the device what is not there yet."""
        if self.filled.get(name) != values:
            t = getattr(self, name)
            t.copy_(torch.tensor(values, dtype=t.dtype))
            self.filled[name] = values


def stage(timeline: Timeline, weights: Sequence[float], step: int, device: torch.device) -> None:
    """Copy what compiled code needs for this step to the device; small, asynchronous, no wait."""
    s = timeline.staged
    if s is None:
        s = timeline.staged = Staged(timeline.depth, device)
    depth = len(s.weights)
    s.fill("order", (*timeline.rows, *(r for r in range(depth) if r not in timeline.rows)))
    s.fill("row", (timeline.next_row,))
    s.fill("weights", (*weights, *[0.0] * (depth - len(weights))))
    held, scale = len(timeline.steps), 1.0 / timeline.gap(step)
    s.fill("scale", tuple(scale if j < held else 0.0 for j in range(depth)))


def tail(row: Tensor, like: Tensor | None) -> Tensor:
    """The row, or the end of its batch where only that is asked for: a conditional half comes last."""
    if like is None or row.dim() != like.dim() or row.shape[0] == like.shape[0]:
        return row
    return row[row.shape[0] - like.shape[0] :]


def part(rows: Tensor, like: Tensor | None) -> Tensor:
    """Stacked rows, or of each the end of its batch, as `tail` has it."""
    if like is None or like.shape[0] == rows.shape[1]:
        return rows
    return rows[:, rows.shape[1] - like.shape[0] :]


class Ring:
    """The last `depth` raw values of one tensor, stacked in one buffer."""

    __slots__ = ("buffer", "copies", "dtype", "timeline", "version", "views")

    def __init__(self, value: Tensor, timeline: Timeline, kept: torch.dtype | None = None) -> None:
        self.timeline, self.dtype = timeline, value.dtype
        self.copies = False  # a consumer has written into what it was handed: hand out copies
        self.version = 0
        self.buffer = allocate((timeline.depth, *value.shape), kept or value.dtype, value.device)
        self.views = [static(view) for view in self.buffer.unbind(0)]

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        """Keep y, or y - x, in the oldest row. A conditional half goes to the second half of the row."""
        if torch.compiler.is_compiling():
            value = y if x is None else y.float() - x.float()
            value = value.to(self.buffer.dtype)
            self._write(part(self.buffer, value), value)
            return
        view = tail(self.views[self.timeline.next_row], y)
        if x is None:
            view.copy_(y)
        else:
            _store(view, y, x)
        self.mark()

    def exchanged(self, y: Tensor) -> Tensor:
        """The row that y was just copied to, in its place, so that not both stay alive; y where they differ."""
        row = self.views[self.timeline.next_row]
        alike = type(y) is Tensor and (y.dtype, y.shape) == (row.dtype, row.shape)
        if self.copies or y.requires_grad or not alike or y.stride() != row.stride():
            return y
        return row.detach()

    def predict(self, base: Tensor | None, weights: Sequence[float] | Tensor) -> Tensor:
        """base + sum of weights * rows, newest first; a plain reuse without a base is the row itself."""
        if isinstance(weights, Tensor):
            return self.predict_weighted(base, weights)
        if weights == (1.0,):  # never while compiling
            row = self.views[self.timeline.rows[0]]
            if base is None:
                return self._handed_out(row)
            if row.shape == base.shape and row.dtype == base.dtype:
                return base + row  # the kernel's bits and passes, with a sixth of its call overhead
        if torch.compiler.is_compiling():
            return self._predict_compiled(base)
        rows = [tail(self.views[r], base) for r in self.timeline.rows[: len(weights)]]
        return weighted(rows, weights, base, self.dtype)

    def _handed_out(self, row: Tensor) -> Tensor:
        """A row in the place of a value: itself, where what is written into it is noticed."""
        if self.timeline.depth > 1 or self.copies or row.dtype != self.dtype:
            return row.to(self.dtype, copy=True)
        return row.detach()

    def advance(self, weights: Sequence[float]) -> Tensor:
        """The sum of weights * rows, which becomes the newest row: in place, unless that would round it."""
        row, rows = self.views[self.timeline.next_row], self.timeline.rows[: len(weights)]
        if row.dtype != self.dtype:
            predicted = self.predict(None, weights)
            self.store(predicted, None, 0)
            return predicted
        weighted([self.views[r] for r in rows], weights, None, self.dtype, row)
        self.mark()
        return row.clone() if self.copies else row.detach()

    def _write(self, held: Tensor, value: Tensor) -> None:
        """Put a value into the row that is next, in compiled code."""
        if self.timeline.depth == 1:
            held.copy_(value[None])
        else:
            held.index_copy_(0, self.timeline.staged.row, value[None])

    def _read(self, held: Tensor) -> list[Tensor]:
        """All rows, newest first, in compiled code."""
        if self.timeline.depth == 1:
            return [held[0]]
        order = self.timeline.staged.order
        return [held.index_select(0, order[i : i + 1])[0] for i in range(self.timeline.depth)]

    def newest_first(self, like: Tensor | None) -> list[Tensor]:
        """All rows of a full history, newest first, for the batch of `like`."""
        if torch.compiler.is_compiling():
            return self._read(part(self.buffer, like))
        return [tail(self.views[r], like) for r in self.timeline.rows]

    def predict_weighted(self, base: Tensor | None, weights: Tensor) -> Tensor:
        """weights[0] * base + weights[1:] * rows, newest first, weights on the device."""
        rows = self.newest_first(base)
        if torch.compiler.is_compiling():
            terms = rows if base is None else [base, *rows]
            first = 1 if base is None else 0
            total = terms[0].float() * weights[first]
            for i, term in enumerate(terms[1:], first + 1):
                total = total + term.float() * weights[i]
            return total.to(self.dtype if base is None else base.dtype)
        like, dtype = (rows[0], self.dtype) if base is None else (base, base.dtype)
        out = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        if base is None:
            _combine_device(out, rows, weights[1:].contiguous())
        else:
            _combine_device(out, [base, *rows], weights)
        return out

    def mark(self) -> None:
        """Note the state of the buffer after a store."""
        self.version = self.buffer._version

    def intact(self) -> bool:
        """Whether nobody has written into the buffer since: rows themselves are handed out."""
        if self.buffer._version == self.version:
            return True
        self.copies = True
        return False

    def _predict_compiled(self, base: Tensor | None) -> Tensor:
        rows = self.newest_first(base)
        if len(rows) == 1:
            row = rows[0]
            if base is None:
                return row.to(self.dtype, copy=True)
            return (base.float() + row.float()).to(base.dtype)
        total: Any = None if base is None else base.float()
        for i, row in enumerate(rows):
            term = row.float() * self.timeline.staged.weights[i]
            total = term if total is None else total + term
        return total.to(self.dtype if base is None else base.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.buffer]

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep everything in other storage from now on."""
        intact = self.intact()
        self.buffer = to(self.buffer)
        self.views = [static(view) for view in self.buffer.unbind(0)]
        self.version = self.buffer._version if intact else -1  # -1: never intact again


class Quantized(Ring):
    """A ring whose rows lie in float8 e4m3, with one scale per token: a quarter of the bytes of float32."""

    __slots__ = ("scales",)

    def __init__(self, value: Tensor, timeline: Timeline) -> None:
        super().__init__(value, timeline, FP8)
        self.scales = allocate(self.buffer.shape[:-1], torch.float32, value.device)

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        if not torch.compiler.is_compiling():
            row = self.timeline.next_row
            _quantize(tail(self.views[row], y), tail(self.scales[row], y[..., 0]), y, x)
            self.mark()
            return
        r = y.float() if x is None else y.float() - x.float()
        largest = r.abs().amax(dim=-1)
        scale = torch.where(
            largest < 2.0**-117, 1.0, largest / 448
        )  # as in reference.quantize_store
        q = (r * (1 / scale)[..., None]).to(FP8)
        # moved as bytes: not every backend indexes float8
        self._write(part(self.buffer, y).view(torch.uint8), q.view(torch.uint8))
        self._write(part(self.scales, y), scale)

    def predict(self, base: Tensor | None, weights: Sequence[float] | Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._predict_compiled(base)
        first = None if base is None else base[..., 0]
        held = self.timeline.rows[: len(weights)]
        out = torch.empty_like(
            tail(self.views[0], base) if base is None else base,
            dtype=self.dtype if base is None else base.dtype,
            memory_format=torch.contiguous_format,
        )
        rows = [tail(self.views[r], base) for r in held]
        scales = [tail(self.scales[r], first) for r in held]
        _dequantize(out, base, rows, scales, list(weights))
        return out

    def newest_first(self, like: Tensor | None) -> list[Tensor]:
        """All rows as values, newest first, in compiled code."""
        rows = self._read(part(self.buffer, like).view(torch.uint8))
        scales = self._read(part(self.scales, like))
        return [q.view(FP8).float() * s[..., None] for q, s in zip(rows, scales, strict=True)]

    def tensors(self) -> list[Tensor]:
        return [self.buffer, self.scales]

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        super().move(to)
        self.scales = to(self.scales)


class Table:
    """A difference table of one tensor, refreshed in place: TaylorSeer's factors."""

    __slots__ = ("buffer", "dtype", "timeline", "views")

    def __init__(self, value: Tensor, timeline: Timeline, dtype: torch.dtype | None) -> None:
        self.timeline, self.dtype = timeline, value.dtype
        self.buffer = allocate((timeline.depth, *value.shape), dtype or value.dtype, value.device)
        self.views = [static(view) for view in self.buffer.unbind(0)]

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        value = y if x is None else y - x
        if torch.compiler.is_compiling():
            for factor, scale in zip(self.views, self.timeline.staged.scale.unbind(0), strict=True):
                following = (value.float() - factor.float()) * scale
                factor.copy_(value)
                value = following
            return
        _update(self.views, value, 1.0 / self.timeline.gap(step), len(self.timeline.steps))

    def predict(self, base: Tensor | None, weights: Sequence[float]) -> Tensor:
        if torch.compiler.is_compiling():
            total: Any = None if base is None else base.float()
            for factor, weight in zip(
                self.views, self.timeline.staged.weights.unbind(0), strict=True
            ):
                term = factor.to(self.dtype).float() * weight
                total = term if total is None else total + term
            return total.to(self.dtype if base is None else base.dtype)
        return weighted(self.views[: len(weights)], weights, base, self.dtype)

    def exchanged(self, y: Tensor) -> Tensor:
        return y

    def mark(self) -> None:
        """Nothing to note: a table is never handed out."""

    def intact(self) -> bool:
        return True

    def tensors(self) -> list[Tensor]:
        return [self.buffer]

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        self.buffer = to(self.buffer)
        self.views = [static(view) for view in self.buffer.unbind(0)]


class Blank:
    """No history: a skipped tensor becomes zeros of the same shape."""

    __slots__ = ("device", "dtype", "shape")

    def __init__(self, value: Tensor) -> None:
        self.shape, self.dtype, self.device = value.shape, value.dtype, value.device

    def store(self, y: Tensor, x: Tensor | None, step: int) -> None:
        """Nothing is kept."""

    def predict(self, base: Tensor | None, weights: Sequence[float]) -> Tensor:
        return (
            torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            if base is None
            else base.clone()
        )

    def exchanged(self, y: Tensor) -> Tensor:
        return y

    def mark(self) -> None:
        """Nothing to note."""

    def intact(self) -> bool:
        return True

    def tensors(self) -> list[Tensor]:
        return []

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Nothing is held."""


def make_store(
    predictor: Predictor, value: Tensor, timeline: Timeline, dtype: torch.dtype | None = None
) -> Ring | Table | Blank:
    """The storage that a predictor needs for one tensor. dtype: what floating values are kept in."""
    if not predictor.depth:
        return Blank(value)
    if predictor.table:
        return Table(value, timeline, getattr(predictor, "dtype", None))
    if dtype is None or not value.is_floating_point():
        return Ring(value, timeline)
    return Quantized(value, timeline) if dtype == FP8 else Ring(value, timeline, dtype)


def weighted(
    rows: list[Tensor],
    weights: Sequence[float],
    base: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """base + sum weights * rows in one launch (two beyond five terms); without a base the sum alone, also
    into `out`, which may be one of the rows."""
    if base is not None:
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
        if len(rows) == 1 and weights[0] == 1.0:
            _apply(out, base, rows[0])
            return out
        terms, factors = [base, *rows], [1.0, *weights]
    else:
        if out is None:
            out = torch.empty_like(rows[0], dtype=dtype, memory_format=torch.contiguous_format)
        terms, factors = list(rows), list(weights)
    if 0.0 in factors:
        used = [i for i, w in enumerate(factors) if w != 0.0] or [0]
        terms, factors = [terms[i] for i in used], [factors[i] for i in used]
    _combine(out, terms[:KERNEL_TERMS], factors[:KERNEL_TERMS])
    if len(terms) > KERNEL_TERMS:
        _combine(out, [out, *terms[KERNEL_TERMS:]], [1.0, *factors[KERNEL_TERMS:]])
    return out


class Unit:
    """One skippable value: a tensor, or the tensors of a tuple, and how to give it back.

    first, last: number of the first and the latest uninterrupted store, to be held against the timeline.
    """

    __slots__ = ("extra", "first", "last", "shared", "streams", "template", "touched")

    def __init__(self) -> None:
        self.streams: list[Ring | Table | Blank] = []
        self.template: Any = None
        self.extra: Any = None
        self.shared = False  # its module runs twice in a step: no single value, never reused
        self.forget()

    def forget(self) -> None:
        self.first, self.last = 0, -1
        self.touched = False  # written to in the running step

    def stored(self, pushes: int, traced: bool) -> None:
        """Note that the running step has stored a value, as push number `pushes`; perhaps in traced code."""
        self.touched = False
        if self.last != pushes - 1:
            self.first = pushes
        self.last = pushes
        if traced:  # which could not mark it
            for stream in self.streams:
                stream.mark()

    def ready(self, timeline: Timeline) -> bool:
        """Whether every step that the timeline still holds is held here too."""
        if (
            self.shared
            or self.last != timeline.pushes - 1
            or self.first > timeline.pushes - len(timeline.steps)
        ):
            return False
        for stream in self.streams:  # once per step: a generator takes three times as long
            if not stream.intact():
                return False
        return True


class State:
    """All that is remembered for one (request, context)."""

    __slots__ = (
        "armed_step",
        "away",
        "bare",
        "blocked",
        "evicted",
        "halved",
        "head",
        "held",
        "index",
        "key",
        "measured",
        "runs",
        "signature",
        "step_timestep",
        "timelines",
        "timestep",
        "total",
        "units",
        "used",
    )

    def __init__(self, key: tuple[Any, str], rules: int) -> None:
        self.key = key
        self.signature: Any = None
        self.units: list[dict[Any, Unit]] = [{} for _ in range(rules)]
        self.timelines: list[Timeline] = []
        self.head: dict[str, Any] = {}
        self.away = 0  # bytes that lie in host memory for the time being
        self.held = 0  # bytes after the last call, and
        self.used = 0  # number of that call: both kept where there is a budget
        self.restart()

    def restart(self) -> None:
        """Begin a run: nothing of an earlier one can be read any more, buffers included."""
        self.index = 0  # of the next step
        self.bare = False  # the running step does without a cache
        self.evicted = False  # its storage went to other runs
        self.blocked = False  # memory ran out: the rest of the run does without
        self.total: int | None = None  # steps in the run, where known
        self.timestep: float | None = None  # of the last step, as the run's clock reads it
        self.step_timestep: float | None = None  # of the running step, as the rules read it
        self.armed_step = 0  # index of the running step
        self.halved = (
            0  # computed steps until a stack's history holds both halves of a guidance batch again
        )
        self.runs: list[Run] = []  # what each policy remembers
        self.measured: list[Tensor] = []  # magnitude ratios of a calibration, on the device
        self.head.pop("kept", None)
        self.head.pop("guided", None)
        for t in self._head_tensors():
            t.zero_()
        for timeline in self.timelines:
            timeline.clear()
        for units in self.units:
            for unit in units.values():
                unit.forget()
                for stream in unit.streams:
                    for t in stream.tensors():
                        t.zero_()

    def make_static(self) -> None:
        """Tell compiled code of storage that was allocated before anything was compiled."""
        for timeline in self.timelines:
            if timeline.staged is not None:
                for name in ("order", "row", "scale", "weights"):
                    static(getattr(timeline.staged, name))
        streams = [s for units in self.units for unit in units.values() for s in unit.streams]
        for held in (*streams, *self.head.values()):
            if isinstance(held, Ring | Table):
                for t in (*held.tensors(), *held.views):
                    static(t)
            elif isinstance(held, Tensor):
                static(held)

    @property
    def complete(self) -> bool:
        """Whether all steps of the run are done, where their number is known."""
        return self.total is not None and self.index >= self.total

    def nbytes(self) -> int:
        """Bytes of cached tensors; those in host memory for the time being are not counted."""
        if self.away:
            return 0
        return sum(
            t.numel() * t.element_size()
            for units in self.units
            for unit in units.values()
            for stream in unit.streams
            for t in stream.tensors()
        ) + sum(t.numel() * t.element_size() for t in self._head_tensors())

    def move(self, to: Callable[[Tensor], Tensor]) -> None:
        """Keep all cached tensors in other storage from now on; compiled code must not know the old one."""
        for units in self.units:
            for unit in units.values():
                for stream in unit.streams:
                    stream.move(to)
        for name, held in self.head.items():
            if isinstance(held, Ring):
                held.move(to)
            elif isinstance(held, Tensor):
                self.head[name] = to(held)

    def _head_tensors(self) -> list[Tensor]:
        held = (v.buffer if isinstance(v, Ring) else v for v in self.head.values())
        return [v for v in held if isinstance(v, Tensor)]
