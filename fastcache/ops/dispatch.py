"""Which implementation of an op runs: a table from device to backends, and one override.

Backends are modules that export the functions of `reference.py` under the same names. They are imported
on first use, so importing fastcache touches no device and builds nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

AUTO = "auto"


REFERENCE = "reference"


MODULES = {
    REFERENCE: "fastcache.ops.reference",
    "cpp": "fastcache.ops.backends.cpp",
    "triton": "fastcache.triton_kernels",
    "cuda": "fastcache.ops.backends.cuda",
}


# What "auto" tries on a device, best first. CUDA C++ stays behind Triton until a GPU run shows it ahead.
PREFERENCE = {"cpu": ("cpp", REFERENCE), "cuda": ("triton", "cuda", REFERENCE)}


_forced: ContextVar[str] = ContextVar(
    "fastcache_backend",
    default=os.environ.get("FASTCACHE_BACKEND", AUTO),  # noqa: B039 - a string
)


def _triton_status() -> bool | str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return True
    return "no GPU is visible (set TRITON_INTERPRET=1 before the start to run the kernels in the interpreter)"


def _native_status() -> bool | str:
    return importlib.import_module(MODULES["cpp"]).available()


def _cuda_status() -> bool | str:
    return importlib.import_module(MODULES["cuda"]).available()


_STATUS: dict[str, Callable[[], bool | str]] = {
    REFERENCE: lambda: True,
    "cpp": _native_status,
    "triton": _triton_status,
    "cuda": _cuda_status,
}


# Devices whose tensors a backend can read. Triton's interpreter reads CPU tensors.
_DEVICES = {
    "cpp": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cpu", "cuda") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",),
}


@cache
def status(name: str) -> bool | str:
    """True, or the reason why backend `name` cannot run here."""
    return _STATUS[name]()


def backends() -> dict[str, bool | str]:
    """Every backend by name: True where it works, else the reason why not."""
    return {name: status(name) for name in MODULES}


def check_backend(name: str) -> None:
    """Raise a ValueError unless `name` is "auto" or a backend that works here."""
    if name == AUTO:
        return
    if not isinstance(name, str) or name not in MODULES:
        raise ValueError(f"backend is {name!r}, must be one of {[AUTO, *MODULES]}")
    reason = status(name)
    if reason is not True:
        raise ValueError(f"backend {name!r} does not work here: {reason}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for the ops called inside: "reference", "cpp", "triton", "cuda" or "auto".

    Raises ValueError where that backend does not work here. A layout or a mix of dtypes that the forced
    kernel does not take still runs on the reference.
    """
    check_backend(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def _preferred(device: str) -> str:
    return next(n for n in PREFERENCE.get(device, (REFERENCE,)) if status(n) is True)


def active(device: str = "cpu") -> str:
    """The backend that runs ops on `device` now."""
    forced = _forced.get()
    if forced == AUTO:
        return _preferred(device)
    if forced != REFERENCE and device not in _DEVICES[forced]:
        raise ValueError(f"backend {forced!r} cannot run on {device} tensors; use backend('auto')")
    check_backend(forced)
    return forced


@cache
def function(backend_name: str, op: str) -> Callable:
    """An op of a backend; ops that a backend does not have run on the reference."""
    module = importlib.import_module(MODULES[backend_name])
    return getattr(module, op, None) or getattr(importlib.import_module(MODULES[REFERENCE]), op)


def dense_rows(t: Tensor) -> bool:
    """Contiguous, or a token range of a contiguous [B, T, C]: what every kernel takes."""
    if t.is_contiguous():
        return True
    return t.dim() == 3 and t.stride(2) == 1 and t.stride(1) == t.shape[2]


def rows_apart(t: Tensor) -> bool:
    """Contiguous, or [B, T, C] with dense rows at any distance: also every k-th token."""
    return t.is_contiguous() or (t.dim() == 3 and t.stride(2) == 1)


# The layouts of ops whose kernels take more than `dense_rows`.
_LAYOUTS = {"guided_sums": rows_apart}


def kernel(op: str, tensors: list[Tensor]) -> Callable:
    """The implementation of `op` for these tensors. Mismatched shapes are refused before a kernel reads them."""
    first = tensors[0]
    name = active(first.device.type)
    if name != REFERENCE:
        shape, dtype, plain = first.shape, first.dtype, op not in _LAYOUTS
        for t in tensors:
            if t.shape != shape:
                raise ValueError(f"{op}: shapes {tuple(shape)} and {tuple(t.shape)} differ")
            if t.dtype != dtype or not t.is_contiguous():
                plain = False
        if not plain and not _takes(name, op, tensors):
            name = REFERENCE
    return function(name, op)


def _takes(name: str, op: str, tensors: list[Tensor]) -> bool:
    """Whether a kernel takes these layouts and this mix of dtypes."""
    if not all(map(_LAYOUTS.get(op, dense_rows), tensors)):
        return False
    mixed = getattr(importlib.import_module(MODULES[name]), "takes_dtypes", None)
    return mixed is None or mixed(op, [t.dtype for t in tensors])
