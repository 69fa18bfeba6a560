# SPDX-License-Identifier: Apache-2.0
"""Memory for cached tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.dispatch import outermost_first

FP8 = torch.float8_e4m3fn


class NoRoom(RuntimeError):
    """There was no memory for a cached tensor."""


class Unfit(RuntimeError):
    """What is held was learnt of other calls than this one, which is computed instead."""


def allocate(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A zeroed tensor that may be written in place in any mode and whose address compiled code may keep.

    strides: None for a contiguous one. Raises NoRoom where the memory for it is not there.
    """
    try:
        with torch.inference_mode(False):
            if strides is None:
                return static(torch.zeros(shape, dtype=dtype, device=device))
            made = torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device=device)
            return static(made.zero_())
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            raise NoRoom(f"no memory for a cached tensor of {tuple(shape)}: {error}") from error
        raise


def on_host(t: Tensor) -> Tensor:
    """A copy in host memory, pinned where t lies on a GPU and not waited for. Raises NoRoom where there is none."""
    try:
        host = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, pin_memory=t.is_cuda)
    except (MemoryError, RuntimeError) as error:
        raise NoRoom(f"no host memory for a cached tensor of {tuple(t.shape)}: {error}") from error
    return host.copy_(t, non_blocking=True)


def strides_of(value: Tensor) -> tuple[int, ...] | None:
    """Strides without gaps, in the order in which the elements of `value` lie: of what is kept of it.

    None for the usual order. Kernels then see the value and what is kept as one flat run of elements. Samples
    stay one after the other, so that the half of a guidance batch is such a run too.
    """
    order = outermost_first(value.shape, value.stride())
    if not order or order[0] != 0 or order == tuple(range(value.dim())):
        return None
    strides, step = [1] * value.dim(), 1
    for d in reversed(order):
        strides[d] = step
        step *= value.shape[d]
    return tuple(strides)


def stacked(value: Tensor, depth: int, dtype: torch.dtype) -> Tensor:
    """Storage for `depth` values such as this one, each in its layout; in float8 with dense rows, which have
    a scale each."""
    strides = None if dtype == FP8 else strides_of(value)
    if strides is not None:
        strides = (value.numel(), *strides)
    return allocate((depth, *value.shape), dtype, value.device, strides)


def static(t: Tensor) -> Tensor:
    """The same tensor; compiled code is told, where there may be any, that its address does not change."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.mark_static_address(t, guard=False)
    return t


def put(slot: Tensor, value: Tensor) -> None:
    """Write a value into a slot [1, ...], in compiled code as part of the kernel that makes the value.

    Traced, a write into a whole tensor moves to the end of the graph, where Inductor fuses it with nothing that
    is more than 64 nodes away; a write into what is selected of a tensor stays in its place.
    """
    slot[0].copy_(value)


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on the device, without waiting for it: the only way that host numbers go there."""
    if device.type == "cuda":  # not run on a GPU yet
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def device_of(signature: tuple) -> torch.device:
    """The device that calls of this signature run on: an accelerator, where any of their tensors lies on one.

    A timestep may come from the host, and may come first.
    """
    devices = [entry[2] for entry in signature if isinstance(entry, tuple)]
    host = torch.device("cpu")
    return next((device for device in devices if device.type != "cpu"), host)
