# SPDX-License-Identifier: Apache-2.0
"""The machine: what runs here, and the speeds that nothing can exceed."""

from __future__ import annotations

import os

import torch

import fastcache

from .. import common
from ..common import Row
from .session import Session, times

SMI = ("memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def run(session: Session) -> None:
    with session.attempt("machine"):
        session.row("machine", **machine(session.device))
    backends = {name: str(reason) for name, reason in fastcache.ops.dispatch.backends().items()}
    session.row("backends", status=backends)
    with session.attempt("matmul"):
        session.row("matmul", **matmul(session.device, 256 if session.dry else 8192))
    session.copy()  # again, warm


def machine(device: str) -> Row:
    if device == "cpu":
        return {"cores": os.cpu_count()}
    found = torch.cuda.get_device_properties(0)
    return {
        "processors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "memory_bytes": found.total_memory,
        "capability": f"{found.major}.{found.minor}",
        "cores": os.cpu_count(),
        "smi": common.nvidia_smi(*SMI),
    }


def matmul(device: str, n: int, rounds: int = 5) -> Row:
    """A bf16 product of n x n matrices of random numbers."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    runs = {"matmul": lambda: torch.mm(a, b, out=out)}
    samples = common.interleaved(runs, rounds, device, repeat=2)["matmul"]
    speed = 2 * n**3 / common.quantiles(samples)["p50"]
    return {"size": n, "tflops": speed / 1e12, **times(samples, 1e3, "ms")}
