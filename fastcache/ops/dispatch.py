# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op runs, and on which views of its tensors: the only place that knows layouts.

The table of backends (`backends/table.py`), one override, and one rule for layouts that every op goes through.
Backends are imported on first use, so importing fastcache touches no device and builds nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .backends.table import BACKENDS, REFERENCE

AUTO = "auto"


_forced: ContextVar[str] = ContextVar(
    "fastcache_backend",
    default=os.environ.get("FASTCACHE_BACKEND", AUTO),  # noqa: B039 - a string
)


forced = _forced.get  # the backend that is in force, or "auto"


def status(name: str) -> bool | str:
    """True, or the reason why backend `name` cannot run here."""
    return BACKENDS[name].status


def backends() -> dict[str, bool | str]:
    """Every backend by name, best first: True where it works, else the reason why not, a str."""
    return {name: row.status for name, row in BACKENDS.items()}


def check_backend(name: str) -> None:
    """Raise a ValueError unless `name` is "auto" or a backend that works here."""
    if name == AUTO:
        return
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend is {name!r}, must be one of {[AUTO, *BACKENDS]}")
    reason = status(name)
    if reason is not True:
        raise ValueError(f"backend {name!r} does not work here: {reason}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for the ops called inside.

    A mix of dtypes that the forced kernel does not take, or a layout that it cannot write to, still runs on
    the reference.

    Args:
        name: a key of `backends()`, "reference", "cpp", "triton" or "cuda", or "auto".
    Returns:
        A context manager, for this thread.
    Raises:
        ValueError: there is no such backend, or it does not work here.
    """
    check_backend(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def _preferred(device: str) -> str:
    chosen = (n for n, row in BACKENDS.items() if device in row.chosen_on and row.status is True)
    return next(chosen, REFERENCE)


def active(device: str = "cpu") -> str:
    """The backend that runs ops on `device` now."""
    forced = _forced.get()
    if forced == AUTO:
        return _preferred(device)
    if not BACKENDS[forced].reads(device):
        raise ValueError(f"backend {forced!r} cannot run on {device} tensors; use backend('auto')")
    check_backend(forced)
    return forced


@cache
def function(backend_name: str, op: str) -> Callable:
    """An op of a backend; ops that a backend does not have run on the reference."""
    found = BACKENDS[backend_name].kernel(op) or BACKENDS[REFERENCE].kernel(op)
    if found is None:
        raise AttributeError(f"op {op!r} has no reference")
    return found


def dense_rows(t: Tensor) -> bool:
    """Contiguous, or a token range of a contiguous [B, T, C]: what every kernel takes."""
    if t.is_contiguous():
        return True
    return t.dim() == 3 and t.stride(2) == 1 and t.stride(1) == t.shape[2]


def rows_apart(t: Tensor) -> bool:
    """Contiguous, or [B, T, C] with dense rows at any distance: also every k-th token."""
    return t.is_contiguous() or (t.dim() == 3 and t.stride(2) == 1)


# What else than `dense_rows` the kernels of an op take.
_LAYOUTS = {"guided_sums": rows_apart}


# Ops whose rows along the last dimension mean something, and ops whose kernels know no order of dimensions
# but the usual one. All others treat every element alike, and take the elements in the order they lie in.
_ROWS = ("residual_magnitude",)


_USUAL = ("modulated_l1", "guidance_combine", "quantize_store", "quantized_combine")


@lru_cache(maxsize=4096)
def outermost_first(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """The dimensions from the largest stride to the smallest; None where elements share memory.

    A dimension of size 1 follows the one before it, so a contiguous tensor gives 0, 1, 2, ...
    """
    apart: list[float] = []
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            apart.append(apart[-1] if apart else math.inf)
        elif stride == 0:
            return None
        else:
            apart.append(stride)
    return tuple(sorted(range(len(shape)), key=lambda d: -apart[d]))


def _laid_out(
    op: str, tensors: list[Tensor], outputs: int, per_sample: bool
) -> list[Tensor] | None:
    """The tensors as the kernels of an op take them; None where one that is written cannot be.

    All in one order of dimensions: that of what is written, else that of most. In that order a dense
    tensor is contiguous, whatever the order is. What is read and lies in another one is copied: two
    passes over it, where the reference takes three to make it float32.
    """
    orders = [outermost_first(t.shape, t.stride()) for t in tensors]
    order = orders[-1] if outputs else max(orders, key=orders.count)
    usual = tuple(range(tensors[0].dim()))
    if (
        order is None
        or op in _USUAL
        or (op in _ROWS and order[-1] != usual[-1])
        or (per_sample and order[0] != 0)
    ):
        order = usual
    takes, read = _LAYOUTS.get(op, dense_rows), len(tensors) - outputs
    found: list[Tensor] = []
    for i, t in enumerate(tensors):
        view = t if order == usual else t.permute(order)
        if not takes(view):
            if i >= read:
                return None
            view = view.contiguous()
        found.append(view)
    return found


def resolve(
    op: str, tensors: list[Tensor], outputs: int = 0, per_sample: bool = False
) -> tuple[Callable, list[Tensor]]:
    """The implementation of `op`, and the tensors in the layout in which it takes them.

    tensors: of one shape, the last `outputs` of them written to. Kernels get views of these, or copies of
    those that are only read; the reference gets them as they are. Raises ValueError on mismatched shapes,
    before a kernel reads them.
    """
    first = tensors[0]
    name = active("cpu" if first.is_cpu else first.device.type)  # asked for, its type takes long
    if name == REFERENCE:
        if first.is_cuda and _forced.get() == AUTO:
            _report(op, tensors, "no kernels work on this device")
        return function(REFERENCE, op), tensors
    shape, dtype, dense = first.shape, first.dtype, first.is_contiguous()
    uniform = dtype is not torch.float64  # which no kernel takes
    for t in tensors[1:]:
        if t.shape != shape:
            raise ValueError(f"{op}: shapes {tuple(shape)} and {tuple(t.shape)} differ")
        if not t.is_contiguous():
            dense = False
        if t.dtype != dtype:
            uniform = False
    run = _kernel(name, op)
    if dense and uniform and run is not None:
        return run, tensors
    if run is None:
        lack = "has no kernel for it"
    elif not (uniform or _takes_dtypes(name, op, tensors)):
        lack = "has no kernel for this mix of dtypes"
    else:
        views = tensors if dense else _laid_out(op, tensors, outputs, per_sample)
        if views is not None:
            return run, views
        lack = "has no kernel that writes to this layout"
    if BACKENDS[name].on_gpu:
        _report(op, tensors, f"backend {name!r} {lack}")
    return function(REFERENCE, op), tensors


@cache
def _kernel(name: str, op: str) -> Callable | None:
    """The kernel that a backend has for an op, if it has one."""
    run = function(name, op)
    return None if run is function(REFERENCE, op) else run


@cache
def at_once(op: str, dtype: torch.dtype) -> tuple[Callable[..., Any], int] | None:
    """What may be called at once with contiguous tensors of one shape and dtype on CPUs, which are not empty, and the
    number of the dtype there: it takes addresses and checks nothing. None where the backend there has none.
    """
    return BACKENDS[_preferred("cpu")].at_once(op, dtype)


def _takes_dtypes(name: str, op: str, tensors: list[Tensor]) -> bool:
    """Whether a kernel takes this mix of dtypes."""
    dtypes = [t.dtype for t in tensors]
    return torch.float64 not in dtypes and BACKENDS[name].takes(op, dtypes)


class Watcher(Protocol):
    """Who wants to know where the reference ran in place of a kernel."""

    def fell_back(self, op: str, why: str) -> None: ...


LARGE = 2**20  # bytes of a tensor from which on the passes of the reference are worth a word


watchers: weakref.WeakSet[Watcher] = weakref.WeakSet()


def _report(op: str, tensors: list[Tensor], why: str) -> None:
    """Tell the watchers of a large tensor for which the reference runs where kernels were to run."""
    first = tensors[0]
    if first.numel() * first.element_size() > LARGE:
        found = dict.fromkeys(f"{t.dtype} with strides {t.stride()}" for t in tensors)
        told = f"{why}: {tuple(first.shape)}, {'; '.join(found)}"
        for watcher in tuple(watchers):
            watcher.fell_back(op, told)
