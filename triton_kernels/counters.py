# SPDX-License-Identifier: Apache-2.0
"""Counters of the programs that have arrived, for reductions that end in the launch they began in.

A launch finds its counters at zero and leaves them at zero. Two launches may therefore share one if
they never overlap, and only then. Launches of one stream do not overlap: a stream has its own. A
captured launch runs again with its graph, on any stream, beside anything: each takes counters that
are never given out again. (A graph does not overlap itself.)

The memory must be there before a capture and outlive it. Memory of torch's allocator does not: what
is first allocated while cudagraph trees warm up or record comes from the pool of that graph. On
NVIDIA GPUs it is therefore a global variable of a module of its own, which CUDA sets to zero when
the module is loaded. It is loaded outside captures only. Where there is none - in a capture before
the first launch, on AMD, when all are given out, for more samples than a stream has counters - a
launch gets zeros of its own, at the price of a second launch that writes them.

Not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor
from triton.runtime import driver

COUNTERS = 1 << 18
# Counters of one stream: one per result of a launch.
RESULTS = 64
# Counters given out together start on 16 bytes, or Triton would compile another kernel for them.
ALIGNED = 4
MODULE = f"""\
.version 7.0
.target sm_75
.address_size 64
.visible .global .align 16 .u32 fastcache_counters[{COUNTERS}];
.visible .entry fastcache_module() {{ ret; }}
""".encode()


class _Pool:
    """The counters of one device."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.given = 0
        self.of_stream: dict[int, Tensor | None] = {}
        self.lock = threading.Lock()

    def take(self, count: int) -> Tensor | None:
        """Counters that nothing else gets, or None if too few are left."""
        with self.lock:
            start, end = self.given, self.given - count // -ALIGNED * ALIGNED
            if end > len(self.memory):
                return None
            self.given = end
        return self.memory[start:end]

    def of(self, stream: int) -> Tensor | None:
        """The counters of a stream."""
        if stream not in self.of_stream:
            self.of_stream[stream] = self.take(RESULTS)
        return self.of_stream[stream]


_pools: dict[torch.device, _Pool] = {}


def counters(like: Tensor, count: int) -> Tensor:
    """int32 zeros, at least `count`, for one launch on the current stream of the device of `like`."""
    device = like.device
    if not like.is_cuda:
        captured, stream = False, 0
    elif device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return counters(like, count)
    else:
        captured = torch.cuda.is_current_stream_capturing()
        stream = driver.active.get_current_stream(device.index)
    pool = _pools.get(device)
    if pool is None and not captured:
        pool = _pools[device] = _Pool(_memory(device))
    found = None
    if pool is not None and captured:
        found = pool.take(count)
    elif pool is not None and count <= RESULTS:
        found = pool.of(stream)
    return like.new_zeros(count, dtype=torch.int32) if found is None else found


def _memory(device: torch.device) -> Tensor:
    """int32 zeros on the current device; none where CUDA has no module to put them in."""
    if device.type != "cuda":
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    try:
        return torch.as_tensor(_Global(device.index), device=device)
    except (OSError, RuntimeError):
        return torch.empty(0, dtype=torch.int32, device=device)


class _Global:
    """The global variable of a freshly loaded module, as torch reads arrays of other libraries."""

    def __init__(self, device: int) -> None:
        if torch.version.cuda is None:
            raise OSError("modules are loaded from PTX")
        module, *_ = driver.active.utils.load_binary("fastcache_module", MODULE, 0, device)
        address, size = ctypes.c_uint64(), ctypes.c_size_t()
        status = ctypes.CDLL("libcuda.so.1").cuModuleGetGlobal_v2(
            ctypes.byref(address),
            ctypes.byref(size),
            ctypes.c_void_p(module),
            b"fastcache_counters",
        )
        if status or size.value != 4 * COUNTERS:
            raise RuntimeError(f"cuModuleGetGlobal: error {status}, {size.value} bytes")
        self.__cuda_array_interface__ = {
            "shape": (COUNTERS,),
            "typestr": "<i4",
            "data": (address.value, False),
            "version": 2,
        }
